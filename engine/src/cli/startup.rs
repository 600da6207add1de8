//! Where the time before the first token went, for people and in JSON.

use std::time::Duration;

use serde::Serialize;

use super::console::Console;
use super::generate::round;
use crate::startup::Startup;

/// Milliseconds by stage, as they followed each other.
#[derive(Serialize)]
pub(super) struct StartupReport {
    /// From the beginning of the program's own code to now.
    total_ms: f64,
    /// Processor time that loading the program took before that; null where the system does not
    /// say.
    before_main_ms: Option<f64>,
    stages: Vec<StageReport>,
    /// What belongs to no stage.
    other_ms: f64,
}

#[derive(Serialize)]
struct StageReport {
    name: &'static str,
    ms: f64,
}

impl StartupReport {
    /// Of the stages so far.
    pub(super) fn new(parts: &[&Startup], console: &Console<'_>) -> StartupReport {
        let stages = || parts.iter().flat_map(|part| &part.stages);
        let total = console.start.elapsed();
        let other = total.saturating_sub(stages().map(|stage| stage.time).sum());
        StartupReport {
            total_ms: ms(total),
            before_main_ms: console.before_main.map(ms),
            stages: stages()
                .map(|stage| StageReport { name: stage.name, ms: ms(stage.time) })
                .collect(),
            other_ms: ms(other),
        }
    }

    /// A line for each stage.
    pub(super) fn text(&self) -> String {
        let line = |name: &str, ms: f64| format!("{ms:10.1} ms  {name}\n");
        let mut text = String::new();
        if let Some(ms) = self.before_main_ms {
            text.push_str(&line("before main, processor time", ms));
        }
        for stage in &self.stages {
            text.push_str(&line(stage.name, stage.ms));
        }
        text.push_str(&line("other", self.other_ms));
        text.push_str(&line("total", self.total_ms));
        text
    }
}

fn ms(time: Duration) -> f64 {
    round(time.as_secs_f64() * 1e3)
}
