//! Where the time goes before the first token.

use std::time::{Duration, Instant};

/// What loading a model consisted of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Startup {
    /// In the order in which they ended.
    pub stages: Vec<Stage>,
    /// What went wrong without stopping anything, such as a cache that could not be written.
    pub warnings: Vec<String>,
}

/// A stretch of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    pub name: &'static str,
    pub time: Duration,
}

impl Startup {
    /// Runs `work`, which is the stage `name`.
    pub fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.stages.push(Stage { name, time: start.elapsed() });
        result
    }
}
