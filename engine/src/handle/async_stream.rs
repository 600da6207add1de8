//! The events of a request for tasks: a stream that wakes whoever polls it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_core::Stream;

use super::stream::{Cancellation, Event, EventSink, lost};

/// The events of one request, for any executor. Dropping it cancels the request.
///
/// As [`RequestStream`](super::RequestStream) it keeps what has not been read, and ends after the
/// last event.
pub struct AsyncRequestStream {
    queue: Arc<Queue>,
    cancellation: Cancellation,
    has_ended: bool,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<Event>,
    /// Of the task that found no event.
    waker: Option<Waker>,
    /// Nothing comes any more.
    is_closed: bool,
}

/// The engine's end of the queue.
struct Sender(Arc<Queue>);

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes outside of the lock: a waker may poll at once.
    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        let mut waiting = self.lock();
        change(&mut waiting);
        let waker = waiting.waker.take();
        drop(waiting);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.change(|waiting| waiting.is_closed = true);
    }
}

/// Where the engine puts events, and a function that makes their stream.
pub(super) fn queue() -> (EventSink, impl FnOnce(Cancellation) -> AsyncRequestStream) {
    let queue = Arc::<Queue>::default();
    let sender = Sender(Arc::clone(&queue));
    let sink = Box::new(move |event| sender.0.change(|waiting| waiting.events.push_back(event)));
    (sink, |cancellation| AsyncRequestStream { queue, cancellation, has_ended: false })
}

impl AsyncRequestStream {
    /// The next event; `None` after the last. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll(context)).await
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

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        let mut waiting = self.queue.lock();
        let event = match waiting.events.pop_front() {
            Some(event) => event,
            None if waiting.is_closed => lost(),
            None => {
                match &mut waiting.waker {
                    Some(waker) => waker.clone_from(context.waker()),
                    waker => *waker = Some(context.waker().clone()),
                }
                return Poll::Pending;
            }
        };
        drop(waiting);
        self.has_ended = event.is_last();
        Poll::Ready(Some(event))
    }
}

impl Stream for AsyncRequestStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.poll(context)
    }
}

impl Drop for AsyncRequestStream {
    fn drop(&mut self) {
        if !self.has_ended {
            self.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Wake;
    use std::thread::{self, Thread};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backend::null::{NullOptions, next_token};
    use crate::config::EngineOptions;
    use crate::engine::Engine;
    use crate::handle::{EngineHandle, HandleLimits, Submission};
    use crate::kernels::KernelTable;
    use crate::request::Request;

    const VOCAB: usize = 64;
    /// Longer than anything takes that does not hang.
    const LONG: Duration = Duration::from_secs(60);

    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Unpark>) {
            self.0.unpark();
        }
    }

    /// The smallest executor: it sleeps until it is woken, and a future that never wakes it fails.
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let waker = Arc::new(Unpark(thread::current())).into();
        let (mut future, start) = (pin!(future), Instant::now());
        loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(value) => return value,
                Poll::Pending => thread::park_timeout(LONG),
            }
            assert!(start.elapsed() < LONG, "nobody woke the task");
        }
    }

    fn start() -> EngineHandle {
        let options = EngineOptions {
            max_context: Some(4096),
            max_sequences: 4,
            ..EngineOptions::new(KernelTable::default())
        };
        let null = NullOptions { vocab_size: VOCAB, ..NullOptions::default() };
        EngineHandle::start(move || Engine::null(&null, &options), HandleLimits::default()).unwrap()
    }

    fn submit(handle: &EngineHandle, prompt: u32, max_tokens: usize) -> AsyncRequestStream {
        let prompt_ids = vec![prompt];
        let request = Request { prompt_ids, max_tokens, ignore_eos: true, ..Request::default() };
        match handle.submit_async(request).unwrap() {
            Submission::Accepted(stream) => stream,
            _ => panic!("an idle engine takes a request"),
        }
    }

    async fn read(stream: &mut AsyncRequestStream) -> (Vec<u32>, Option<Event>) {
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                Event::Output(output) => tokens.extend(output.token),
                last => return (tokens, Some(last)),
            }
        }
        (tokens, None)
    }

    #[test]
    fn a_task_reads_all_events() {
        let handle = start();
        let mut streams: Vec<_> = (1..=4).map(|prompt| submit(&handle, prompt, 50)).collect();
        for (prompt, stream) in (1..=4).zip(&mut streams) {
            let mut history = vec![prompt];
            (0..50).for_each(|_| history.push(next_token(&history, VOCAB)));
            let (tokens, last) = block_on(read(stream));
            assert_eq!((&tokens[..], last), (&history[1..], Some(Event::Finished)));
            assert!(stream.has_ended());
            assert_eq!(block_on(stream.next()), None);
        }
    }

    #[test]
    fn cancelled_and_dropped_streams_end_their_requests() {
        let handle = start();
        let mut stream = submit(&handle, 1, 4000);
        let first = block_on(stream.next());
        assert!(matches!(first, Some(Event::Output(_))), "{first:?}");
        stream.cancellation().cancel();
        assert_eq!(block_on(read(&mut stream)).1, Some(Event::Cancelled));
        drop(submit(&handle, 2, 4000));
        drop(stream);
        handle.drain(LONG);
        let counts = handle.stats().counts;
        assert_eq!((counts.num_cancelled, counts.num_finished), (2, 0));
    }

    #[test]
    fn a_stream_ends_with_its_engine() {
        let handle = start();
        let mut stream = submit(&handle, 1, 4000);
        handle.drain(Duration::ZERO);
        assert_eq!(block_on(read(&mut stream)).1, Some(Event::Cancelled));
    }

    #[test]
    fn a_stream_without_a_sender_ends() {
        let (sink, stream) = queue();
        drop(sink);
        let handle = start();
        // Any cancellation will do.
        let mut stream = stream(submit(&handle, 1, 1).cancellation());
        let last = block_on(stream.next());
        assert!(matches!(last, Some(Event::Died(_))), "{last:?}");
        assert_eq!(block_on(stream.next()), None);
    }
}
