//! One thread owns the engine; everybody else talks to it through a handle that can be cloned.
//!
//! Requests go in through [`EngineHandle::submit`] and come back as events, of which exactly one is
//! the last, whatever happens: the end of the output, a cancel, a drain, the death of the engine.
//! Deadlines and heartbeats are here because nothing below knows a clock.

mod async_stream;
mod shared;
mod stream;
mod worker;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::error::Error;
use crate::request::Request;

use shared::{Shared, Submitted};
use worker::{Worker, panic_message};

pub use async_stream::AsyncRequestStream;
pub use shared::{EngineState, HandleLimits, HandleStats, StepTimes, WorkCounts};
pub use stream::{Cancellation, Event, EventSink, RequestStream};

/// Talks to an engine on a thread of its own. When the last clone is dropped, what still runs is
/// cancelled and the thread ends; the drop waits for it, as long as a step takes.
#[derive(Clone)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

/// What became of a request that is possible at all.
#[derive(Debug)]
pub enum Submission<T> {
    /// It waits or runs; its events follow.
    Accepted(T),
    /// Too much waits already; nothing was queued.
    Overloaded {
        /// Requests without a first token.
        num_waiting: usize,
        /// Tokens of their prompts.
        num_waiting_tokens: usize,
    },
    /// The engine takes no new requests any more.
    Draining,
}

/// The thread, which ends with the last handle.
struct Owner {
    shared: Arc<Shared>,
    sizes: Sizes,
    thread_id: ThreadId,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What requests are checked against before they are queued.
#[derive(Clone, Copy)]
struct Sizes {
    vocab_size: usize,
    max_context: usize,
}

impl EngineHandle {
    /// Makes an engine on a new thread and waits until it is there. An error or a panic of `load`
    /// comes back as an error.
    pub fn start(
        load: impl FnOnce() -> Result<Engine, Error> + Send + 'static,
        limits: HandleLimits,
    ) -> Result<EngineHandle, Error> {
        limits.check()?;
        let shared = Arc::new(Shared::new(limits));
        let (loaded, result) = sync_channel(1);
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || serve(load, of_thread, &loaded))
            .map_err(|error| Error::Resources(format!("no thread for the engine: {error}")))?;
        let thread_id = thread.thread().id();
        match result.recv() {
            Ok(Ok(sizes)) => {
                let thread = Mutex::new(Some(thread));
                Ok(EngineHandle { owner: Arc::new(Owner { shared, sizes, thread_id, thread }) })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Engine("the engine's thread ended while it loaded".to_owned())),
        }
    }

    /// Queues a request. `Err` for a request that this engine can never serve, and when the engine
    /// is dead; a request too large for the KV cache is refused by the stream's only event.
    pub fn submit(&self, request: Request) -> Result<Submission<RequestStream>, Error> {
        let (sender, receiver) = channel();
        // NOTE: a receiver that is gone has cancelled its request.
        let sink = Box::new(move |event| drop(sender.send(event)));
        let submission = self.submit_with(request, sink)?;
        Ok(submission.map(|cancellation| RequestStream::new(receiver, cancellation)))
    }

    /// As [`EngineHandle::submit`] with a stream for tasks of any executor. They are woken on the
    /// engine's thread.
    pub fn submit_async(&self, request: Request) -> Result<Submission<AsyncRequestStream>, Error> {
        let (sink, stream) = async_stream::queue();
        Ok(self.submit_with(request, sink)?.map(stream))
    }

    /// As [`EngineHandle::submit`] with events given to `sink` on the engine's thread. The sink
    /// holds up every request while it runs: it must not block, and if it panics the engine dies.
    pub fn submit_with(
        &self,
        request: Request,
        sink: EventSink,
    ) -> Result<Submission<Cancellation>, Error> {
        let Sizes { vocab_size, max_context } = self.owner.sizes;
        // What a session adds is known to the engine's thread alone.
        request.check(vocab_size, max_context, 0)?;
        let shared = &self.owner.shared;
        let cancellation = Cancellation::new(Arc::clone(shared));
        let submission = shared.submit(Submitted::new(request, sink, cancellation.flag()))?;
        Ok(submission.map(|()| cancellation))
    }

    /// Runs `work` between two steps and waits for what it gives; running requests wait as long.
    /// `Err` when the engine has ended, or dies of `work`.
    pub fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T, Error> {
        if self.owner.is_current() {
            let message = "a call from the engine's own thread would wait for itself";
            return Err(Error::Engine(message.to_owned()));
        }
        let (sender, receiver) = sync_channel(1);
        // NOTE: the receiver waits below, so that the one value always finds room.
        self.owner.shared.call(Box::new(move |engine| drop(sender.send(work(engine)))))?;
        receiver.recv().map_err(|_| self.owner.shared.wait(None).error())
    }

    /// Runs `work` when the engine is drained, before its thread ends; not when it dies. Work that
    /// was set before is dropped.
    pub fn at_drained(&self, work: impl FnOnce(&mut Engine) + Send + 'static) -> Result<(), Error> {
        self.owner.shared.set_last_call(Box::new(work))
    }

    /// What the engine has done, without waiting for a step.
    pub fn stats(&self) -> HandleStats {
        self.owner.shared.stats()
    }

    pub fn state(&self) -> EngineState {
        self.owner.shared.state()
    }

    /// Waits until the engine has ended and every stream has its last event; says how it ended. A
    /// server ends its process when this returns [`EngineState::Dead`].
    pub fn wait(&self) -> EngineState {
        match self.owner.is_current() {
            true => self.state(),
            false => self.owner.shared.wait(None),
        }
    }

    /// As [`EngineHandle::wait`], but for `timeout` at most; says how things stand then.
    pub fn wait_timeout(&self, timeout: Duration) -> EngineState {
        match self.owner.is_current() {
            true => self.state(),
            false => self.owner.shared.wait(Instant::now().checked_add(timeout)),
        }
    }

    /// From now on no request is taken; those accepted may go on for `timeout`, then they are
    /// cancelled between two steps, and the engine ends. An earlier deadline stays. Returns at
    /// once; [`EngineHandle::wait_timeout`] bounds the wait for a step that never ends.
    pub fn start_drain(&self, timeout: Duration) {
        self.owner.shared.start_drain(timeout);
    }

    /// [`EngineHandle::start_drain`], then waits until the thread has ended.
    pub fn drain(&self, timeout: Duration) -> EngineState {
        self.start_drain(timeout);
        let state = self.wait();
        self.owner.join();
        state
    }
}

impl<T> Submission<T> {
    /// The same with another value where it was accepted.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Submission<U> {
        match self {
            Submission::Accepted(value) => Submission::Accepted(change(value)),
            Submission::Overloaded { num_waiting, num_waiting_tokens } => {
                Submission::Overloaded { num_waiting, num_waiting_tokens }
            }
            Submission::Draining => Submission::Draining,
        }
    }
}

impl Owner {
    fn is_current(&self) -> bool {
        thread::current().id() == self.thread_id
    }

    /// Waits for the thread, but never for itself.
    fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread.filter(|_| !self.is_current()) {
            // NOTE: a panic that reaches the thread's end comes from dropping the engine, when all
            // streams have ended and nothing is left to be told of it.
            drop(thread.join());
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.start_drain(Duration::ZERO);
        self.join();
    }
}

/// The life of the engine's thread.
fn serve(
    load: impl FnOnce() -> Result<Engine, Error>,
    shared: Arc<Shared>,
    loaded: &SyncSender<Result<Sizes, Error>>,
) {
    let result = catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|panic| {
        let message = panic_message(&*panic);
        Err(Error::Engine(format!("loading the engine panicked: {message}")))
    });
    match result {
        Ok(engine) => {
            let vocab_size = engine.shape().vocab_size;
            let sizes = Sizes { vocab_size, max_context: engine.max_context() };
            // NOTE: start() takes the one value, and the channel has room for it.
            drop(loaded.send(Ok(sizes)));
            Worker::new(engine, shared).run();
        }
        Err(error) => drop(loaded.send(Err(error))),
    }
}
