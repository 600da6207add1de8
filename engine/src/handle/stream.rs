//! What comes back of one request, and how it is called off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use crate::handle::shared::Shared;
use crate::request::RequestOutput;

/// News of a request. Every request has exactly one last event, all others are outputs, of which
/// each choice has at most `max_tokens`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token, or the end of a choice without one.
    Output(RequestOutput),
    /// Last: every choice has ended.
    Finished,
    /// Last: the request was cancelled, or the engine stopped before it ended.
    Cancelled,
    /// Last: the engine can never serve the request, for this reason.
    Refused(String),
    /// Last: what the request needs is in use, such as its session, for this reason.
    Busy(String),
    /// Last: the engine died, for this reason.
    Died(String),
}

/// Takes the events of one request, on the engine's thread.
pub type EventSink = Box<dyn FnMut(Event) + Send>;

/// Calls a request off. Clones call off the same request; dropping one does nothing.
#[derive(Clone)]
pub struct Cancellation {
    flag: Arc<CancelFlag>,
    shared: Arc<Shared>,
}

/// Whether a request has been called off.
#[derive(Debug, Default)]
pub(super) struct CancelFlag(AtomicBool);

/// The events of one request. Dropping it cancels the request.
///
/// Events are kept until they are read, so a slow reader holds up nothing, and as there are at most
/// `max_tokens` and one more (of each choice, and never more than the context has), they need no
/// other bound.
pub struct RequestStream {
    events: Receiver<Event>,
    cancellation: Cancellation,
    has_ended: bool,
}

impl Event {
    pub fn is_last(&self) -> bool {
        !matches!(self, Event::Output(_))
    }
}

impl Cancellation {
    pub(super) fn new(shared: Arc<Shared>) -> Cancellation {
        Cancellation { flag: Arc::default(), shared }
    }

    pub(super) fn flag(&self) -> Arc<CancelFlag> {
        Arc::clone(&self.flag)
    }

    /// Ends the request and gives its pages back when the step at hand is done, before the next.
    /// Never blocks; does nothing to a request that has ended.
    pub fn cancel(&self) {
        self.flag.0.store(true, Ordering::Release);
        self.shared.raise_cancel();
    }
}

impl CancelFlag {
    pub(super) fn is_raised(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl RequestStream {
    pub(super) fn new(events: Receiver<Event>, cancellation: Cancellation) -> RequestStream {
        RequestStream { events, cancellation, has_ended: false }
    }

    /// The next event; `None` where none comes within `timeout`, or the last has come.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Event> {
        if self.has_ended {
            return None;
        }
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(self.note(event)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.note(lost())),
        }
    }

    /// Whether the last event has been read.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// As [`Cancellation::cancel`]; what was generated before, and the last event, still come.
    pub fn cancel(&self) {
        self.cancellation.cancel();
    }

    /// Calls the request off from elsewhere.
    pub fn cancellation(&self) -> Cancellation {
        self.cancellation.clone()
    }

    fn note(&mut self, event: Event) -> Event {
        self.has_ended = event.is_last();
        event
    }
}

impl Iterator for RequestStream {
    type Item = Event;

    /// Waits for the next event; `None` after the last.
    fn next(&mut self) -> Option<Event> {
        if self.has_ended {
            return None;
        }
        let event = self.events.recv().unwrap_or_else(|_| lost());
        Some(self.note(event))
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if !self.has_ended {
            self.cancel();
        }
    }
}

/// The last event of a stream whose sender is gone; the engine's thread never lets that happen.
pub(super) fn lost() -> Event {
    Event::Died("the engine's thread is gone".to_owned())
}
