//! Ctrl-C: it stops the answer at hand, and never the chat of a person at a terminal.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cli::interrupt::{INTERRUPTED, Listener};
use crate::handle::Cancellation;

/// What Ctrl-C does between two answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhenIdle {
    /// Nothing: the line editor has keys of its own.
    Ignore,
    /// Ends the program, as it would where nobody listens.
    Exit,
}

/// Listens for SIGINT until it is dropped.
pub(super) struct Interrupts {
    answer: Arc<Mutex<Option<Answer>>>,
    _listener: Listener,
}

/// The answer that is being generated.
struct Answer {
    cancellation: Cancellation,
    is_stopped: bool,
}

impl Interrupts {
    pub(super) fn listen(when_idle: WhenIdle) -> anyhow::Result<Interrupts> {
        let answer = Arc::new(Mutex::new(None));
        let of_listener = Arc::clone(&answer);
        let listener = Listener::new(move || take(&of_listener, when_idle))?;
        Ok(Interrupts { answer, _listener: listener })
    }

    /// From now on Ctrl-C calls this answer off.
    pub(super) fn start(&self, cancellation: Cancellation) {
        *lock(&self.answer) = Some(Answer { cancellation, is_stopped: false });
    }

    /// The answer is over; says whether Ctrl-C was pressed.
    pub(super) fn finish(&self) -> bool {
        lock(&self.answer).take().is_some_and(|answer| answer.is_stopped)
    }
}

/// Takes one signal.
fn take(answer: &Mutex<Option<Answer>>, when_idle: WhenIdle) {
    match &mut *lock(answer) {
        Some(answer) => {
            answer.is_stopped = true;
            answer.cancellation.cancel();
        }
        None if when_idle == WhenIdle::Exit => std::process::exit(INTERRUPTED),
        None => {}
    }
}

fn lock(answer: &Mutex<Option<Answer>>) -> MutexGuard<'_, Option<Answer>> {
    // NOTE: nothing panics while it holds the lock.
    answer.lock().unwrap_or_else(PoisonError::into_inner)
}
