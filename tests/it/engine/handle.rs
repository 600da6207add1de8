//! The engine's thread and its handles, on the null backend.

mod endings;
mod soak;

use std::sync::Barrier;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use bespoke::Error;
use bespoke::backend::null::{Fault, NullOptions, next_token};
use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::handle::{
    EngineHandle, EngineState, Event, HandleLimits, RequestStream, Submission, WorkCounts,
};
use bespoke::kernels::KernelTable;
use bespoke::request::{FinishReason, Request};

const VOCAB: usize = 64;
const NUM_PAGES: usize = 64;
/// Longer than anything takes that does not hang.
const LONG: Duration = Duration::from_secs(60);

/// 4 rows a step, 2 sequences.
fn options() -> EngineOptions {
    EngineOptions {
        max_context: Some(128),
        num_pages: Some(NUM_PAGES),
        max_batch_tokens: 4,
        max_sequences: 2,
        ..EngineOptions::new(KernelTable::default())
    }
}

fn engine(fault: Option<Fault>, options: &EngineOptions) -> Result<Engine, Error> {
    let null = NullOptions { vocab_size: VOCAB, page_size: 4, fault, ..NullOptions::default() };
    Engine::null(&null, options)
}

fn start_with(options: EngineOptions, limits: HandleLimits) -> EngineHandle {
    EngineHandle::start(move || engine(None, &options), limits).unwrap()
}

fn start() -> EngineHandle {
    start_with(options(), HandleLimits::default())
}

fn request(prompt_len: usize, max_tokens: usize) -> Request {
    let prompt_ids = (0..prompt_len).map(|i| ((i * 37 + max_tokens) % VOCAB) as u32).collect();
    Request { prompt_ids, max_tokens, ..Request::default() }
}

/// What greedy decoding gives, by the oracle.
fn expected(request: &Request) -> Vec<u32> {
    let mut history = request.prompt_ids.clone();
    (0..request.max_tokens).for_each(|_| history.push(next_token(&history, VOCAB)));
    history.split_off(request.prompt_ids.len())
}

#[track_caller]
fn accepted<T>(submission: Result<Submission<T>, Error>) -> T {
    match submission.unwrap() {
        Submission::Accepted(value) => value,
        Submission::Overloaded { .. } => panic!("overloaded"),
        Submission::Draining => panic!("draining"),
    }
}

/// The tokens and the last event; an event that does not come fails.
#[track_caller]
fn read(stream: &mut RequestStream) -> (Vec<u32>, Event) {
    let mut tokens = Vec::new();
    loop {
        match stream.next_timeout(LONG).expect("the stream does not hang") {
            Event::Output(output) => tokens.extend(output.token),
            last => {
                assert!(stream.has_ended() && stream.next().is_none(), "nothing follows the last");
                return (tokens, last);
            }
        }
    }
}

/// No page is lost and no request is left.
#[track_caller]
fn assert_idle(handle: &EngineHandle) {
    let is_idle = handle.call(|engine| (engine.is_idle(), engine.status().pages.active)).unwrap();
    assert_eq!(is_idle, (true, 0));
    let stats = handle.stats();
    assert_eq!((stats.num_waiting, stats.num_waiting_tokens, stats.num_running), (0, 0, 0));
    let WorkCounts { num_finished, num_cancelled, num_refused, num_died, .. } = stats.counts;
    assert_eq!(stats.num_accepted, num_finished + num_cancelled + num_refused + num_died);
}

/// A running request that holds the engine's thread after each of its tokens, so that a test says
/// when the next step begins.
struct Gate {
    at_token: Receiver<()>,
    go_on: SyncSender<()>,
}

impl Gate {
    /// Takes one of the two sequences; the engine stands still after its first token.
    fn close(handle: &EngineHandle) -> Gate {
        let (arrived, at_token) = channel();
        let (go_on, may_go) = sync_channel::<()>(1);
        let sink = Box::new(move |event| {
            if let Event::Output(_) = event {
                // Once the gate is gone, nothing holds the thread.
                let _ = arrived.send(());
                let _ = may_go.recv();
            }
        });
        accepted(handle.submit_with(request(1, 120), sink));
        let gate = Gate { at_token, go_on };
        gate.at_token.recv_timeout(LONG).unwrap();
        gate
    }

    /// Exactly one step.
    fn step(&self) {
        self.go_on.send(()).unwrap();
        self.at_token.recv_timeout(LONG).unwrap();
    }
}

/// Does `work` while a call holds the engine's thread, which has taken what came before.
fn while_held<T>(handle: &EngineHandle, work: impl FnOnce() -> T) -> T {
    let (arrived, at_call) = sync_channel(1);
    let (release, held) = sync_channel::<()>(1);
    let hold = move |_: &mut Engine| {
        arrived.send(()).unwrap();
        held.recv().unwrap();
    };
    let holder = handle.clone();
    thread::scope(|scope| {
        scope.spawn(move || holder.call(hold).unwrap());
        at_call.recv_timeout(LONG).unwrap();
        let done = work();
        release.send(()).unwrap();
        done
    })
}

#[test]
fn streams_give_the_oracles_tokens() {
    let handle = start();
    let requests = [request(1, 1), request(3, 9), request(50, 20), request(4, 4), request(17, 30)];
    let streams: Vec<_> =
        requests.iter().map(|request| accepted(handle.submit(request.clone()))).collect();
    for (request, mut stream) in requests.iter().zip(streams) {
        let (tokens, last) = read(&mut stream);
        assert_eq!((tokens, last), (expected(request), Event::Finished));
    }
    let mut stopping = request(3, 9);
    stopping.stop_token_ids = vec![expected(&stopping)[0]];
    let events: Vec<Event> = accepted(handle.submit(stopping)).collect();
    let [Event::Output(output), Event::Finished] = &events[..] else { panic!("{events:?}") };
    assert_eq!(output.finish_reason, Some(FinishReason::Stop));

    assert_idle(&handle);
    let stats = handle.stats();
    let WorkCounts { num_tokens, num_stop, num_length, num_failed, num_steps, .. } = stats.counts;
    assert_eq!((num_tokens, num_stop, num_length, num_failed), (65, 1, 5, 0));
    assert!(num_steps >= 30, "{num_steps}");
}

#[test]
fn threads_submit_at_once() {
    let handle = start();
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for thread_idx in 0..8 {
            let (handle, barrier) = (handle.clone(), &barrier);
            scope.spawn(move || {
                barrier.wait();
                let requests: Vec<_> = (0..20).map(|i| request(1 + i, 1 + thread_idx)).collect();
                let streams: Vec<_> =
                    requests.iter().map(|r| accepted(handle.submit(r.clone()))).collect();
                for (request, mut stream) in requests.iter().zip(streams) {
                    assert_eq!(read(&mut stream), (expected(request), Event::Finished));
                }
            });
        }
    });
    assert_eq!(handle.stats().num_accepted, 160);
    assert_idle(&handle);
}

#[test]
fn a_cancel_takes_effect_within_a_step() {
    // The prompt of the second sequence takes 3 rows a step beside the first one's decode row.
    for (num_sequences, prompt_len, num_steps, num_tokens) in
        [(1, 40, 0, 0), (1, 40, 3, 0), (2, 40, 0, 0), (2, 40, 4, 0), (2, 3, 1, 1), (2, 3, 5, 5)]
    {
        let options = EngineOptions { max_sequences: num_sequences, ..options() };
        let handle = start_with(options, HandleLimits::default());
        let gate = Gate::close(&handle);
        let mut stream = accepted(handle.submit(request(prompt_len, 30)));
        let mut next = accepted(handle.submit(request(3, 2)));
        (0..num_steps).for_each(|_| gate.step());
        stream.cancel();
        gate.step();
        // What was said before this step is all there is.
        let outputs = std::iter::from_fn(|| stream.next_timeout(Duration::ZERO));
        let events: Vec<Event> = outputs.collect();
        assert_eq!(events.last(), Some(&Event::Cancelled), "{num_sequences} {num_steps}");
        assert_eq!(events.len(), num_tokens + 1, "{num_sequences} {num_steps}");
        // The next in line has taken its place in the same step; its token comes after the gate's.
        gate.step();
        let has_token = next.next_timeout(Duration::ZERO).is_some();
        assert_eq!(has_token, num_sequences == 2, "{num_steps}");
        stream.cancel();
        drop(gate);
        assert_eq!(read(&mut next).1, Event::Finished);
        assert_eq!(handle.drain(Duration::MAX), EngineState::Stopped);
        let counts = handle.stats().counts;
        assert_eq!((counts.num_finished, counts.num_cancelled), (2, 1));
    }
}

#[test]
fn a_cancel_before_the_engine_looks_is_not_lost() {
    let handle = start();
    // The thread looks for cancels after the call, and at what was submitted after that.
    let mut streams = while_held(&handle, || {
        let streams = [20, 21].map(|max_tokens| accepted(handle.submit(request(3, max_tokens))));
        streams[0].cancel();
        streams
    });
    assert_eq!(read(&mut streams[0]), (Vec::new(), Event::Cancelled));
    assert_eq!(read(&mut streams[1]), (expected(&request(3, 21)), Event::Finished));
    assert_idle(&handle);
}

#[test]
fn cancelled_and_dropped_requests_give_their_pages_back() {
    let handle = start();
    let gate = Gate::close(&handle);
    let mut streams: Vec<_> = (0..8).map(|i| accepted(handle.submit(request(9, 10 + i)))).collect();
    // Neither was seen by the engine yet.
    streams[0].cancel();
    drop(streams.swap_remove(1));
    (0..5).for_each(|_| gate.step());
    let cancellation = streams[3].cancellation();
    cancellation.cancel();
    gate.step();
    drop(gate);
    let lasts: Vec<Event> = streams.iter_mut().map(|stream| read(stream).1).collect();
    let is_cancelled = |idx: usize| lasts[idx] == Event::Cancelled;
    assert_eq!((0..7).filter(|idx| is_cancelled(*idx)).collect::<Vec<_>>(), [0, 3]);
    // A cancel after the end changes nothing.
    cancellation.cancel();
    streams[5].cancel();
    let (tokens, last) = read(&mut accepted(handle.submit(request(5, 5))));
    assert_eq!((tokens, last), (expected(&request(5, 5)), Event::Finished));
    // The gate's request and a dropped stream's have ended too.
    assert_eq!(handle.drain(Duration::MAX), EngineState::Stopped);
    let counts = handle.stats().counts;
    assert_eq!((counts.num_finished, counts.num_cancelled), (7, 3));
}

#[test]
fn overload_is_a_value_with_its_numbers() {
    let limits = HandleLimits { waiting_requests_max: 3, waiting_tokens_max: 20 };
    let handle = start_with(EngineOptions { max_sequences: 1, ..options() }, limits);
    let gate = Gate::close(&handle);
    // The counters are as of the last step.
    gate.step();
    let overloaded = |prompt_len: usize| match handle.submit(request(prompt_len, 2)).unwrap() {
        Submission::Overloaded { num_waiting, num_waiting_tokens } => {
            (num_waiting, num_waiting_tokens)
        }
        _ => panic!("accepted"),
    };
    // Alone a request may have more tokens than the limit, but nothing may follow it.
    let large = accepted(handle.submit(request(30, 2)));
    assert_eq!(overloaded(1), (1, 30));
    drop(large);
    gate.step();
    gate.step();
    let streams = [6, 7, 7].map(|len| accepted(handle.submit(request(len, 2))));
    assert_eq!(overloaded(1), (3, 20));
    streams[0].cancel();
    gate.step();
    gate.step();
    assert_eq!((handle.stats().num_waiting, handle.stats().num_waiting_tokens), (2, 14));
    assert_eq!(overloaded(7), (2, 14));
    let last = accepted(handle.submit(request(6, 2)));
    assert_eq!(handle.stats().num_running, 1);
    drop(gate);
    let mut streams = streams.into_iter().skip(1).chain([last]);
    assert!(streams.all(|mut stream| read(&mut stream).1 == Event::Finished));
}

#[test]
fn impossible_requests_are_refused() {
    let handle = start();
    assert!(matches!(handle.submit(request(0, 1)), Err(Error::Request(_))));
    assert!(matches!(handle.submit(request(128, 1)), Err(Error::Request(_))));
    assert_eq!(handle.stats().num_accepted, 0);

    let small = EngineOptions { num_pages: Some(2), ..options() };
    let handle = start_with(small, HandleLimits::default());
    let (tokens, last) = read(&mut accepted(handle.submit(request(5, 20))));
    let Event::Refused(message) = last else { panic!("{last:?}") };
    assert!(tokens.is_empty() && message.contains("6 pages"), "{message}");
    assert_eq!(handle.call(|engine| engine.status().pages.active).unwrap(), 0);
    assert_eq!(handle.stats().counts.num_refused, 1);

    let limits = HandleLimits { waiting_requests_max: 0, ..HandleLimits::default() };
    let result = EngineHandle::start(|| engine(None, &options()), limits);
    assert!(matches!(result, Err(Error::Request(_))));
}

#[test]
fn a_slow_reader_holds_up_nobody() {
    let handle = start();
    let mut unread = accepted(handle.submit(request(3, 40)));
    let (tokens, _) = read(&mut accepted(handle.submit(request(3, 100))));
    assert_eq!(tokens.len(), 100);
    assert_eq!(handle.drain(Duration::MAX), EngineState::Stopped);
    assert_eq!(read(&mut unread), (expected(&request(3, 40)), Event::Finished));
}

#[test]
fn calls_run_between_steps() {
    let handle = start();
    let gate = Gate::close(&handle);
    let caller = handle.clone();
    let ids = thread::scope(|scope| {
        let ids = scope.spawn(move || caller.call(|engine| engine.add_request(request(2, 3))));
        drop(gate);
        ids.join().unwrap().unwrap()
    });
    // The request that the call added has no stream; it runs along.
    assert!(ids.is_ok());
    assert_eq!(handle.drain(Duration::MAX), EngineState::Stopped);
    let error = handle.call(|engine| engine.is_idle()).unwrap_err();
    assert!(error.to_string().contains("stopped"), "{error}");
}
