//! Where the time of steps goes: every few steps each kernel's calls are timed.

use std::time::Instant;

use super::work::Work;
use crate::kernels::Kernel;

/// One step in so many is timed: a clock reading costs tens of nanoseconds, a small op little more.
const STEPS_PER_TIMED: u64 = 8;

/// Times of the kernels of a backend, by their places in [`Meter::new`]'s list.
pub(super) struct Meter {
    counts: Vec<Count>,
    num_steps: u64,
    is_timing: bool,
}

/// What was seen of a kernel in the steps that were timed.
#[derive(Clone, Copy)]
pub(super) struct Count {
    pub(super) kernel: &'static Kernel,
    pub(super) num_calls: u64,
    pub(super) nanoseconds: u64,
    pub(super) work: Work,
}

impl Meter {
    pub(super) fn new(kernels: &[&'static Kernel]) -> Meter {
        let count = |kernel: &&'static Kernel| Count {
            kernel,
            num_calls: 0,
            nanoseconds: 0,
            work: Work::default(),
        };
        Meter { counts: kernels.iter().map(count).collect(), num_steps: 0, is_timing: false }
    }

    pub(super) fn begin_step(&mut self) {
        self.is_timing = self.num_steps.is_multiple_of(STEPS_PER_TIMED);
        self.num_steps += 1;
    }

    pub(super) fn end_step(&mut self) {
        self.is_timing = false;
    }

    /// The start of a call, where it is timed.
    pub(super) fn start(&self) -> Option<Instant> {
        self.is_timing.then(Instant::now)
    }

    /// The end of a call of kernel `idx`.
    pub(super) fn stop(
        &mut self,
        start: Option<Instant>,
        idx: usize,
        work: impl FnOnce(&Kernel) -> Work,
    ) {
        let Some(start) = start else { return };
        let count = &mut self.counts[idx];
        // NOTE: half a thousand years fit.
        count.nanoseconds += start.elapsed().as_nanos() as u64;
        count.num_calls += 1;
        count.work += work(count.kernel);
    }

    /// The kernels that were seen.
    pub(super) fn counts(&self) -> impl Iterator<Item = &Count> {
        self.counts.iter().filter(|count| count.num_calls > 0)
    }
}
