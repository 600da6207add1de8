//! Progress bars on a terminal, a line per stage elsewhere.

use indicatif::{ProgressBar, ProgressStyle};

use super::console::Console;
use crate::config;
#[cfg(feature = "make")]
use crate::progress::{Progress, Unit};

/// Shows how far one operation is. The bar goes away when it is dropped.
pub(super) struct Meter<'a, 'b> {
    console: &'a mut Console<'b>,
    bar: Option<ProgressBar>,
    stage: String,
}

impl<'a, 'b> Meter<'a, 'b> {
    pub(super) fn new(console: &'a mut Console<'b>) -> Meter<'a, 'b> {
        Meter { console, bar: None, stage: String::new() }
    }

    /// Shows a report of a long operation.
    #[cfg(feature = "make")]
    pub(super) fn show(&mut self, progress: Progress) {
        let template = match progress.unit {
            Unit::Bytes => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}",
            Unit::Tensors => "{msg} {wide_bar} {pos}/{len}",
            Unit::Layers => "{msg} {wide_bar} {pos}/{len} layers",
            Unit::Chunks => "{msg} {wide_bar} {pos}/{len} chunks, {eta} left",
            Unit::Share => "{msg} {wide_bar} {percent} %, {eta} left",
        };
        self.set(progress.stage, template, progress.done, progress.total);
    }

    /// Shows how far the loading of a model is.
    pub(super) fn show_load(&mut self, progress: config::Progress) {
        let (done, total) = (progress.num_done as u64, progress.num_parts as u64);
        self.set("loading weights", "{msg} {wide_bar} {pos}/{len}", done, total);
    }

    /// Shows `done` of `total` things of a stage.
    pub(super) fn set(&mut self, stage: &str, template: &str, done: u64, total: u64) {
        if stage != self.stage {
            self.start(stage, template, done, total);
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total.max(done));
            bar.set_position(done);
        }
    }

    fn start(&mut self, stage: &str, template: &str, done: u64, total: u64) {
        self.clear();
        stage.clone_into(&mut self.stage);
        if !self.console.is_terminal {
            self.console.report(&format!("{stage}\n"));
            return;
        }
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| {
            // Only a spelling mistake in this file leads here, and a plain bar shows it.
            ProgressStyle::default_bar()
        });
        let bar = ProgressBar::new(total).with_style(style).with_message(stage.to_owned());
        // What was done before is no measure of the speed.
        let bar = bar.with_position(done);
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Meter<'_, '_> {
    fn drop(&mut self) {
        self.clear();
    }
}
