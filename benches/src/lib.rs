//! What the benches share: `Case` sets a kernel up on data that it must fetch from memory, and
//! `Report` relates what it takes to the limits of the machine.

#![allow(clippy::print_stdout, reason = "a bench reports to its terminal")]

use bespoke::Error;
use bespoke::backend::cpu::limits::Limits;
use bespoke::backend::cpu::team::Team;
use bespoke::backend::cpu::work::Work;

use report::{Entry, Samples};

pub mod case;
pub mod report;

pub use case::Case;
pub use report::Report;

/// Bytes of the stream from memory: far beyond any cache.
const STREAM_BYTES: usize = 600 << 20;

/// A team, what the machine can do with it, and what was measured so far.
pub struct Bench {
    pub team: Team,
    pub report: Report,
}

impl Bench {
    /// A team on all cores, and the limits it reaches.
    pub fn new() -> Result<Bench, Error> {
        let num_threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut team = Team::new(num_threads).map_err(|error| {
            Error::Resources(format!("cannot start {num_threads} threads: {error}"))
        })?;
        let limits = Limits::measure(&mut team, STREAM_BYTES)?;
        println!("{}", limits.line());
        Ok(Bench { team, report: Report::new(limits) })
    }

    /// Keeps and prints a measurement; one without samples was only tested, not measured.
    pub fn record(&mut self, group: &str, name: &str, rows: usize, work: Work, samples: Samples) {
        let Some(median) = samples.median() else { return };
        let entry = Entry { group: group.to_owned(), name: name.to_owned(), rows, work, median };
        println!("{:>24}{}\n", "", entry.rates(&self.report.limits));
        self.report.entries.push(entry);
    }

    /// Measures the limits once more, prints the table against the higher ones, and writes it to
    /// the folder that `BESPOKE_BENCH_OUT` names, if it does.
    pub fn finish(mut self, file: &str) -> Result<(), Error> {
        if self.report.entries.is_empty() {
            return Ok(());
        }
        let again = Limits::measure(&mut self.team, STREAM_BYTES)?;
        self.report.limits = self.report.limits.or_higher(again);
        report::publish(file, &self.report.text())
    }
}
