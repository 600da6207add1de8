//! Ctrl-C: it stops the answer at hand, and never the chat of a person at a terminal.

use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::Context as _;
use futures_util::future::{Either, select};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::handle::Cancellation;

/// Exit code of a program that SIGINT has ended, as shells tell it.
const INTERRUPTED: i32 = 130;

/// What Ctrl-C does between two answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhenIdle {
    /// Nothing: the line editor has keys of its own.
    Ignore,
    /// Ends the program, as it would where nobody listens.
    Exit,
}

/// Listens for SIGINT on a thread of its own, until it is dropped.
pub(super) struct Interrupts {
    answer: Arc<Mutex<Option<Answer>>>,
    end: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

/// The answer that is being generated.
struct Answer {
    cancellation: Cancellation,
    is_stopped: bool,
}

impl Interrupts {
    pub(super) fn listen(when_idle: WhenIdle) -> anyhow::Result<Interrupts> {
        let cannot = "cannot listen for Ctrl-C";
        let runtime = Builder::new_current_thread().enable_io().build().context(cannot)?;
        let answer = Arc::new(Mutex::new(None));
        let end = Arc::new(Notify::new());
        let (of_thread, end_of_thread) = (Arc::clone(&answer), Arc::clone(&end));
        // NOTE: registered here, so that from now on no signal ends the program.
        let signals = signals(&runtime).context(cannot)?;
        let thread = thread::Builder::new().name("interrupts".to_owned()).spawn(move || {
            runtime.block_on(serve(signals, &of_thread, when_idle, &end_of_thread));
        });
        Ok(Interrupts { answer, end, thread: Some(thread.context(cannot)?) })
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

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.end.notify_one();
        if let Some(thread) = self.thread.take() {
            // NOTE: the thread has nothing to say.
            drop(thread.join());
        }
    }
}

#[cfg(unix)]
type Signals = tokio::signal::unix::Signal;
#[cfg(windows)]
type Signals = tokio::signal::windows::CtrlC;

fn signals(runtime: &Runtime) -> io::Result<Signals> {
    let _context = runtime.enter();
    #[cfg(unix)]
    let signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt());
    #[cfg(windows)]
    let signals = tokio::signal::windows::ctrl_c();
    signals
}

async fn serve(
    mut signals: Signals,
    answer: &Mutex<Option<Answer>>,
    when_idle: WhenIdle,
    end: &Notify,
) {
    let mut end = pin!(end.notified());
    while let Either::Left((Some(()), _)) = select(pin!(signals.recv()), &mut end).await {
        take(answer, when_idle);
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
