//! A persistent team of threads that enters a parallel region in a fraction of a microsecond.
//!
//! Workers wait for the next region by spinning for a bounded time and then park; so does the
//! caller while it waits for them. An unbounded spin would cost milliseconds a region as soon as
//! two threads share a core, which CPU quotas make common.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use super::ahead::{Ahead, Asking};

/// Turns of the wait loop before a thread parks: some tens of microseconds.
const SPIN_TURNS: u32 = 2000;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    region: Region,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// One per worker: whether it parks or is about to.
    parked: Vec<AtomicBool>,
    caller_parked: AtomicBool,
    /// Written before it parks: a handle is a counter that all threads would change in each region.
    caller: Mutex<Option<Thread>>,
}

/// What threads hand to each other in each region, in one cache line.
#[repr(align(64))]
struct Region {
    /// Counts regions; a change is the signal to start.
    generation: AtomicU32,
    /// The region's work; written before `generation` changes, read after.
    job: UnsafeCell<Option<Job>>,
    /// What the threads ask for after the region; as `job`.
    ahead: UnsafeCell<Ahead>,
    /// Workers that have not finished the region.
    num_running: AtomicUsize,
}

// SAFETY: `job` and `ahead` are written only by the caller between regions, while no worker reads
// them, and the release store of `generation` orders the writes before the workers' reads.
unsafe impl Sync for Shared {}
// SAFETY: the job pointer is only followed while the region's caller waits in `run`.
unsafe impl Send for Shared {}

/// `len()` threads, the caller included, that run one closure at a time together.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Team {
    /// A team of `len` threads; `len - 1` are started.
    pub fn new(len: usize) -> std::io::Result<Team> {
        assert!(len > 0);
        let shared = Arc::new(Shared {
            region: Region {
                generation: AtomicU32::new(0),
                job: UnsafeCell::new(None),
                ahead: UnsafeCell::new(Ahead::default()),
                num_running: AtomicUsize::new(0),
            },
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: (1..len).map(|_| AtomicBool::new(false)).collect(),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
        });
        let mut team = Team { shared, workers: Vec::new() };
        for worker_idx in 0..len - 1 {
            let shared = Arc::clone(&team.shared);
            let builder = thread::Builder::new().name(format!("bespoke-{}", worker_idx + 1));
            team.workers.push(builder.spawn(move || work(&shared, worker_idx))?);
        }
        Ok(team)
    }

    pub fn len(&self) -> usize {
        self.workers.len() + 1
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    /// Calls `job(idx)` once for every `idx` in `0..len()`, each on its own thread, `job(0)` here,
    /// and returns when all have returned. Panics if any of them did; the team stays usable.
    pub fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        self.run_before(Ahead::default(), job);
    }

    /// As [`Team::run`]; threads that wait afterwards ask for their shares of `ahead`.
    pub(super) fn run_before(&mut self, ahead: Ahead, job: &(dyn Fn(usize) + Sync)) {
        let mut asking = ahead.share(0, self.len());
        if self.workers.is_empty() {
            job(0);
            return asking.ask_least();
        }
        let shared = &*self.shared;
        let region = &shared.region;
        // SAFETY: no worker runs between regions, so nobody else touches `job`. The lifetime is
        // erased because this function does not return before the last use.
        unsafe {
            *region.job.get() =
                Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job));
            *region.ahead.get() = ahead;
        }
        region.num_running.store(self.workers.len(), Ordering::Relaxed);
        // NOTE: SeqCst pairs with the worker's store of `parked` and second look at `generation`:
        // either it sees the new generation or we see it parked.
        region.generation.fetch_add(1, Ordering::SeqCst);
        for (worker, parked) in self.workers.iter().zip(&shared.parked) {
            if parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        let is_done = || region.num_running.load(Ordering::SeqCst) == 0;
        let set_caller = || shared.set_caller(thread::current());
        wait(&shared.caller_parked, is_done, &mut asking, set_caller);
        asking.ask_least();
        let worker_panicked = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(payload) = own {
            std::panic::resume_unwind(payload);
        }
        assert!(!worker_panicked, "a thread of the team panicked");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.region.generation.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its jobs, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn set_caller(&self, caller: Thread) {
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(caller);
    }

    fn unpark_caller(&self) {
        if let Some(caller) = &*self.caller.lock().unwrap_or_else(PoisonError::into_inner) {
            caller.unpark();
        }
    }
}

/// Returns once `ready()`: spins first, asking for what lies ahead, then parks with `parked` set,
/// after `before_parking()`.
fn wait(
    parked: &AtomicBool,
    ready: impl Fn() -> bool,
    asking: &mut Asking,
    before_parking: impl FnOnce(),
) {
    for _ in 0..SPIN_TURNS {
        if ready() {
            return;
        }
        if !asking.ask() {
            std::hint::spin_loop();
        }
    }
    before_parking();
    // NOTE: a swap, not a store: on x86, qemu lets the load in `ready()` pass aarch64's
    // store-release, and the wakeup would be lost.
    parked.swap(true, Ordering::SeqCst);
    while !ready() {
        thread::park();
    }
    parked.store(false, Ordering::Relaxed);
}

fn work(shared: &Shared, worker_idx: usize) {
    let region = &shared.region;
    let (idx, count) = (worker_idx + 1, shared.parked.len() + 1);
    let mut seen = 0;
    let mut asking = Asking::default();
    loop {
        let has_begun = || region.generation.load(Ordering::SeqCst) != seen;
        wait(&shared.parked[worker_idx], has_begun, &mut asking, || ());
        seen = region.generation.load(Ordering::SeqCst);
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: the caller wrote both before the generation changed and waits for us in `run`.
        let (job, ahead) = unsafe { ((*region.job.get()).map(|job| &*job), *region.ahead.get()) };
        if let Some(job) = job
            && catch_unwind(AssertUnwindSafe(|| job(idx))).is_err()
        {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        // NOTE: whoever finds the caller parked finds its handle, or an older one's, which is woken
        // for nothing while the caller itself looks once more before it parks.
        if region.num_running.fetch_sub(1, Ordering::SeqCst) == 1
            && shared.caller_parked.load(Ordering::SeqCst)
        {
            shared.unpark_caller();
        }
        asking = ahead.share(idx, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_each_region_once() {
        for len in 1..=4 {
            let mut team = Team::new(len).unwrap();
            let counts: Vec<AtomicUsize> = (0..len).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..1000 {
                team.run(&|idx| {
                    counts[idx].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1000));
        }
    }

    #[test]
    fn a_panic_surfaces_and_the_team_stays_usable() {
        let mut team = Team::new(3).unwrap();
        for idx_of_panic in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|idx| assert!(idx != idx_of_panic, "planted"));
            }));
            assert!(result.is_err(), "the panic of thread {idx_of_panic} was lost");
            let sum = AtomicUsize::new(0);
            team.run(&|idx| {
                sum.fetch_add(idx + 1, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 6);
        }
    }
}
