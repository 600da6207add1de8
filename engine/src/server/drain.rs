//! The life of a server: it serves, drains when it is told to stop, and closes.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How far a server's life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// No new requests are taken; those that run may end.
    Draining,
    /// Connections are closed as soon as what they say has been said.
    Closing,
}

/// Which phase a server is in. It only ever goes forward.
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
}

/// How a server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to stop, and every request has its end.
    Drained,
    /// The engine died, for this reason.
    EngineDied(String),
    /// A step of the engine took too long, and the engine is not waited for.
    EngineStalled(Duration),
    /// It was told to stop a second time.
    Interrupted,
}

/// The first word on how a server ended.
#[derive(Default)]
pub(super) struct Ending {
    ended: Mutex<Option<Ended>>,
    changed: Condvar,
}

impl Default for Lifecycle {
    fn default() -> Lifecycle {
        Lifecycle { phase: watch::Sender::new(Phase::Serving) }
    }
}

impl Lifecycle {
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Whether new requests are refused.
    pub fn is_draining(&self) -> bool {
        self.phase() != Phase::Serving
    }

    /// Goes on to `phase`; false where it was there or further.
    pub(super) fn advance(&self, phase: Phase) -> bool {
        self.phase.send_if_modified(|now| {
            let is_later = *now < phase;
            *now = phase.max(*now);
            is_later
        })
    }

    /// Waits for `phase` or a later one.
    pub(super) async fn reached(&self, phase: Phase) {
        // NOTE: fails only when the sender is gone, which outlives the borrow.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }
}

impl Ending {
    /// Says how the server ended, where nobody has said it yet.
    pub(super) fn set(&self, ended: Ended) {
        let mut first = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(ended);
        self.changed.notify_all();
    }

    pub(super) fn wait(&self) -> Ended {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(ended) = &*ended {
                return ended.clone();
            }
            ended = self.changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As [`Ending::wait`], for `timeout` at most.
    pub(super) fn wait_timeout(&self, timeout: Duration) -> Option<Ended> {
        let deadline = Instant::now() + timeout;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while ended.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(ended, left);
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        ended.clone()
    }
}
