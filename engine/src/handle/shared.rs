//! What the handles and the engine's thread share: a queue, a few counters, and how things stand.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::{Engine, EngineStatus};
use crate::error::Error;
use crate::handle::Submission;
use crate::handle::stream::{CancelFlag, Event, EventSink};
use crate::request::Request;

/// How much may wait. A request waits until its first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandleLimits {
    pub waiting_requests_max: usize,
    /// Tokens of the waiting requests' prompts. A request that waits alone may have more.
    pub waiting_tokens_max: usize,
}

/// How an engine stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineState {
    Running,
    /// It takes no new requests and ends with those it has.
    Draining,
    /// It was drained.
    Stopped,
    /// A step failed or panicked, for this reason.
    Dead(String),
}

/// Counters of an engine, as of its last step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandleStats {
    /// Requests taken since the start: waiting, running or ended.
    pub num_accepted: u64,
    /// Requests without a first token.
    pub num_waiting: usize,
    /// Tokens of the waiting requests' prompts.
    pub num_waiting_tokens: usize,
    /// Requests with a first token that have not ended.
    pub num_running: usize,
    pub counts: WorkCounts,
    pub status: EngineStatus,
    pub step_times: StepTimes,
    /// When the thread was last between two steps. While something waits or runs, the time since
    /// is the age of the step at hand.
    pub last_beat: Instant,
}

/// How long steps took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Steps of at most the time of [`StepTimes::BOUNDS`] in the same place, and of more than that
    /// of the place before. The last counts those that took longer than any.
    pub nums: [u64; StepTimes::BOUNDS.len() + 1],
    /// All steps together.
    pub total: Duration,
}

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkCounts {
    pub num_steps: u64,
    pub num_tokens: u64,
    /// Requests by their last event.
    pub num_finished: u64,
    pub num_cancelled: u64,
    pub num_refused: u64,
    pub num_died: u64,
    /// Choices of requests by their finish reason.
    pub num_stop: u64,
    pub num_length: u64,
    pub num_failed: u64,
}

/// A request on its way to the engine.
pub(super) struct Submitted {
    pub(super) request: Request,
    pub(super) live: LiveRequest,
}

/// A request that has not had its last event.
pub(super) struct LiveRequest {
    pub(super) sink: EventSink,
    pub(super) flag: Arc<CancelFlag>,
    pub(super) prompt_len: usize,
    pub(super) num_choices_left: usize,
    /// It counts as waiting: no token has come.
    pub(super) is_waiting: bool,
}

/// Work on the engine between two steps.
pub(super) type Call = Box<dyn FnOnce(&mut Engine) + Send>;

pub(super) struct Shared {
    limits: HandleLimits,
    inbox: Mutex<Inbox>,
    /// Wakes the engine's thread when there is something to do.
    work: Condvar,
    /// Wakes those who wait for the end.
    over: Condvar,
    /// Some request's flag was raised since the engine's thread last looked.
    has_cancels: AtomicBool,
}

/// Locked for a moment only, never while a step or a sink runs.
pub(super) struct Inbox {
    pub(super) state: EngineState,
    /// What is left is cancelled then.
    pub(super) deadline: Option<Instant>,
    /// At most `waiting_requests_max`, as all of these wait.
    pub(super) submitted: Vec<Submitted>,
    /// At most one of each thread, which waits for it.
    pub(super) calls: Vec<Call>,
    /// Run when the engine is drained.
    pub(super) last_call: Option<Call>,
    pub(super) stats: HandleStats,
    /// Every request has had its last event.
    is_over: bool,
}

impl Default for HandleLimits {
    fn default() -> HandleLimits {
        HandleLimits { waiting_requests_max: 256, waiting_tokens_max: 1 << 18 }
    }
}

impl HandleLimits {
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.waiting_requests_max == 0 {
            let message = "waiting_requests_max is 0, it must be at least 1";
            return Err(Error::Request(message.to_owned()));
        }
        Ok(())
    }
}

impl EngineState {
    /// Why nothing more can be asked of an engine that is in this state.
    pub(super) fn error(&self) -> Error {
        Error::Engine(match self {
            EngineState::Dead(reason) => format!("the engine died: {reason}; start it anew"),
            _ => "the engine was stopped; start it anew".to_owned(),
        })
    }
}

impl Submitted {
    pub(super) fn new(request: Request, sink: EventSink, flag: Arc<CancelFlag>) -> Submitted {
        let live = LiveRequest {
            sink,
            flag,
            prompt_len: request.prompt_ids.len(),
            num_choices_left: request.num_choices,
            is_waiting: true,
        };
        Submitted { request, live }
    }
}

impl StepTimes {
    pub const BOUNDS: [Duration; 14] = [
        Duration::from_micros(20),
        Duration::from_micros(50),
        Duration::from_micros(100),
        Duration::from_micros(250),
        Duration::from_micros(500),
        Duration::from_millis(1),
        Duration::from_micros(2500),
        Duration::from_millis(5),
        Duration::from_millis(10),
        Duration::from_millis(25),
        Duration::from_millis(50),
        Duration::from_millis(100),
        Duration::from_millis(500),
        Duration::from_millis(2500),
    ];

    pub(super) fn add(&mut self, time: Duration) {
        self.nums[StepTimes::BOUNDS.partition_point(|bound| *bound < time)] += 1;
        self.total += time;
    }
}

impl WorkCounts {
    /// Counts the last event of a request.
    pub(super) fn count(&mut self, last: &Event) {
        match last {
            Event::Output(_) => {}
            Event::Finished => self.num_finished += 1,
            Event::Cancelled => self.num_cancelled += 1,
            Event::Refused(_) | Event::Busy(_) => self.num_refused += 1,
            Event::Died(_) => self.num_died += 1,
        }
    }
}

impl Shared {
    pub(super) fn new(limits: HandleLimits) -> Shared {
        let stats = HandleStats {
            num_accepted: 0,
            num_waiting: 0,
            num_waiting_tokens: 0,
            num_running: 0,
            counts: WorkCounts::default(),
            status: EngineStatus::default(),
            step_times: StepTimes::default(),
            last_beat: Instant::now(),
        };
        let inbox = Inbox {
            state: EngineState::Running,
            deadline: None,
            submitted: Vec::new(),
            calls: Vec::new(),
            last_call: None,
            stats,
            is_over: false,
        };
        Shared {
            limits,
            inbox: Mutex::new(inbox),
            work: Condvar::new(),
            over: Condvar::new(),
            has_cancels: AtomicBool::new(false),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inbox> {
        // NOTE: nothing panics while it holds the lock, so a poisoned one is whole too.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn submit(&self, submitted: Submitted) -> Result<Submission<()>, Error> {
        let prompt_len = submitted.live.prompt_len;
        let mut inbox = self.lock();
        match inbox.state {
            EngineState::Running => {}
            EngineState::Draining | EngineState::Stopped => return Ok(Submission::Draining),
            EngineState::Dead(_) => return Err(inbox.state.error()),
        }
        let HandleStats { num_waiting, num_waiting_tokens, .. } = inbox.stats;
        let num_tokens = num_waiting_tokens.saturating_add(prompt_len);
        if num_waiting >= self.limits.waiting_requests_max
            || (num_waiting > 0 && num_tokens > self.limits.waiting_tokens_max)
        {
            return Ok(Submission::Overloaded { num_waiting, num_waiting_tokens });
        }
        inbox.stats.num_accepted += 1;
        inbox.stats.num_waiting += 1;
        inbox.stats.num_waiting_tokens = num_tokens;
        inbox.submitted.push(submitted);
        self.work.notify_one();
        Ok(Submission::Accepted(()))
    }

    pub(super) fn call(&self, call: Call) -> Result<(), Error> {
        let mut inbox = self.lock();
        match inbox.state {
            EngineState::Running | EngineState::Draining => inbox.calls.push(call),
            EngineState::Stopped | EngineState::Dead(_) => return Err(inbox.state.error()),
        }
        self.work.notify_one();
        Ok(())
    }

    pub(super) fn set_last_call(&self, call: Call) -> Result<(), Error> {
        let mut inbox = self.lock();
        match inbox.state {
            EngineState::Running | EngineState::Draining => inbox.last_call = Some(call),
            EngineState::Stopped | EngineState::Dead(_) => return Err(inbox.state.error()),
        }
        Ok(())
    }

    pub(super) fn start_drain(&self, timeout: Duration) {
        let mut inbox = self.lock();
        if inbox.state == EngineState::Running {
            inbox.state = EngineState::Draining;
        }
        // NOTE: a timeout beyond what the clock can say is none.
        let deadline = Instant::now().checked_add(timeout);
        inbox.deadline = match (inbox.deadline, deadline) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.work.notify_one();
    }

    /// Waits until it is over, or until `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> EngineState {
        let mut inbox = self.lock();
        while !inbox.is_over {
            let Some(deadline) = deadline else {
                inbox = self.over.wait(inbox).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.over.wait_timeout(inbox, left);
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        inbox.state.clone()
    }

    pub(super) fn set_over(&self) {
        self.lock().is_over = true;
        self.over.notify_all();
    }

    /// Waits for something to do.
    pub(super) fn wait_for_work<'a>(&self, inbox: MutexGuard<'a, Inbox>) -> MutexGuard<'a, Inbox> {
        let is_idle = |inbox: &mut Inbox| {
            inbox.state == EngineState::Running
                && inbox.submitted.is_empty()
                && inbox.calls.is_empty()
        };
        self.work.wait_while(inbox, is_idle).unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn raise_cancel(&self) {
        self.has_cancels.store(true, Ordering::Release);
    }

    /// Whether a flag was raised since the last time.
    pub(super) fn take_cancels(&self) -> bool {
        self.has_cancels.swap(false, Ordering::AcqRel)
    }

    pub(super) fn stats(&self) -> HandleStats {
        self.lock().stats
    }

    pub(super) fn state(&self) -> EngineState {
        self.lock().state.clone()
    }
}
