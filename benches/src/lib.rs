//! What the benches share: `limits` measures what the machine can do, `Case` sets a kernel up on
//! data that it must fetch from memory, and `Report` relates the two.

#![allow(clippy::print_stdout, reason = "a bench reports to its terminal")]

use bespoke::Error;
use bespoke::backend::cpu::team::Team;

use report::{Entry, Samples};

pub mod case;
pub mod limits;
pub mod report;

pub use case::Case;
pub use limits::Limits;
pub use report::Report;

/// What one call must move and compute, whatever the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes that come from memory: weights, KV pages.
    pub memory_bytes: usize,
    /// Bytes read and written that a cache holds: activations.
    pub cache_bytes: usize,
    /// Operations on bytes, 2 per multiply-add.
    pub dot_ops: usize,
    /// Operations on float32, 2 per multiply-add.
    pub fma_ops: usize,
}

/// What holds a call back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    Memory,
    Cache,
    Dot,
    Fma,
}

impl Bound {
    pub fn name(self) -> &'static str {
        match self {
            Bound::Memory => "memory",
            Bound::Cache => "cache",
            Bound::Dot => "int8 dot",
            Bound::Fma => "f32 fma",
        }
    }
}

impl Work {
    pub fn bytes(&self) -> usize {
        self.memory_bytes + self.cache_bytes
    }

    pub fn ops(&self) -> usize {
        self.dot_ops + self.fma_ops
    }

    /// The shortest time that the machine's limits allow, in nanoseconds, and which limit sets it:
    /// moving and computing overlap perfectly. (A GB/s is a byte per nanosecond.)
    pub fn bound(&self, limits: &Limits) -> (f64, Bound) {
        let times = [
            (self.memory_bytes as f64 / limits.memory_gb_per_s, Bound::Memory),
            (self.cache_bytes as f64 / limits.cache_gb_per_s, Bound::Cache),
            (self.dot_ops as f64 / limits.dot_gop_per_s, Bound::Dot),
            (self.fma_ops as f64 / limits.fma_gop_per_s, Bound::Fma),
        ];
        times.into_iter().fold((0.0, Bound::Memory), |a, b| if b.0 > a.0 { b } else { a })
    }
}

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
        let limits = Limits::measure(&mut team)?;
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
        let again = Limits::measure(&mut self.team)?;
        self.report.limits = self.report.limits.or_higher(again);
        report::publish(file, &self.report.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_limit_binds() {
        let limits = Limits {
            target: bespoke_kernel_gen::target::Target::Portable,
            num_threads: 2,
            memory_gb_per_s: 20.0,
            cache_gb_per_s: 100.0,
            dot_gop_per_s: 1000.0,
            fma_gop_per_s: 200.0,
        };
        let work = Work { memory_bytes: 2000, cache_bytes: 9000, dot_ops: 50_000, fma_ops: 0 };
        assert_eq!(work.bound(&limits), (100.0, Bound::Memory));
        let work = Work { dot_ops: 500_000, ..work };
        assert_eq!(work.bound(&limits), (500.0, Bound::Dot));
    }
}
