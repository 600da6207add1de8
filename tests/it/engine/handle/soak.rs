//! A hundred thousand requests, called off at random.

use std::collections::VecDeque;
use std::env;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use bespoke::memory::rss_bytes;

use super::*;

const NUM_THREADS: u64 = 8;
const NUM_REQUESTS: u64 = 100_000;
/// Streams that one thread has at a time.
const STREAMS_MAX: usize = 24;
/// Requests before the memory is measured first.
const NUM_WARM_UP: u64 = 20_000;
/// A hundred bytes lost with each request would be more.
const GROWTH_MAX: u64 = 4 << 20;

/// Says that this process is to run the requests and nothing else.
const ALONE: &str = "BESPOKE_TEST_SOAK";

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// How the requests ended, as their readers saw it.
#[derive(Default)]
struct Seen {
    finished: AtomicU64,
    cancelled: AtomicU64,
    dropped: AtomicU64,
}

/// What is done to a request.
#[derive(Clone, Copy)]
enum Plan {
    Read,
    CancelAfter(u64),
    DropAfter(u64),
}

fn random_request(random: &mut Random) -> (Request, Plan) {
    let len = 1 + random.below(14);
    let prompt_ids = (0..len).map(|_| random.below(VOCAB as u64) as u32).collect();
    let max_tokens = 1 + random.below(8) as usize;
    let plan = match random.below(10) {
        0..6 => Plan::Read,
        6..8 => Plan::CancelAfter(random.below(4)),
        _ => Plan::DropAfter(random.below(4)),
    };
    (Request { prompt_ids, max_tokens, ..Request::default() }, plan)
}

fn finish(request: &Request, plan: Plan, mut stream: RequestStream, seen: &Seen) {
    let mut tokens = Vec::new();
    let num_read = match plan {
        Plan::Read => u64::MAX,
        Plan::CancelAfter(num) | Plan::DropAfter(num) => num,
    };
    let is_done = |stream: &RequestStream, tokens: &[u32]| {
        stream.has_ended() || tokens.len() as u64 >= num_read
    };
    let mut last = None;
    while !is_done(&stream, &tokens) {
        match stream.next_timeout(LONG).expect("the stream does not hang") {
            Event::Output(output) => tokens.extend(output.token),
            event => last = Some(event),
        }
    }
    if let Plan::DropAfter(_) = plan {
        seen.dropped.fetch_add(u64::from(last.is_none()), Ordering::Relaxed);
    } else if last.is_none() {
        stream.cancel();
        let (rest, event) = read(&mut stream);
        tokens.extend(rest);
        last = Some(event);
    }
    let expected = expected(request);
    match last {
        Some(Event::Finished) => {
            assert_eq!(tokens, expected);
            seen.finished.fetch_add(1, Ordering::Relaxed);
        }
        Some(Event::Cancelled) => {
            assert_eq!(tokens, expected[..tokens.len()]);
            seen.cancelled.fetch_add(1, Ordering::Relaxed);
        }
        Some(other) => panic!("{other:?}"),
        None => assert_eq!(tokens, expected[..tokens.len()]),
    }
}

fn submit_many(handle: &EngineHandle, seed: u64, num_requests: u64, seen: &Seen) {
    let mut random = Random(seed);
    let mut streams = VecDeque::new();
    for _ in 0..num_requests {
        if streams.len() == STREAMS_MAX {
            let (request, plan, stream) = streams.pop_front().unwrap();
            finish(&request, plan, stream, seen);
        }
        let (request, plan) = random_request(&mut random);
        let stream = accepted(handle.submit(request.clone()));
        if random.below(8) == 0 {
            stream.cancel();
        }
        streams.push_back((request, plan, stream));
    }
    streams.into_iter().for_each(|(request, plan, stream)| finish(&request, plan, stream, seen));
}

fn run(handle: &EngineHandle, num_requests: u64, seed: u64, seen: &Seen) {
    thread::scope(|scope| {
        for thread_idx in 0..NUM_THREADS {
            let seed = seed + thread_idx;
            scope.spawn(move || submit_many(handle, seed, num_requests / NUM_THREADS, seen));
        }
    });
}

fn run_all() {
    let options = EngineOptions { max_batch_tokens: 32, max_sequences: 16, ..options() };
    let handle = start_with(options, HandleLimits::default());
    let seen = Seen::default();
    run(&handle, NUM_WARM_UP, 1, &seen);
    let before = rss_bytes();
    run(&handle, NUM_REQUESTS - NUM_WARM_UP, 100, &seen);
    let after = rss_bytes();
    assert_idle(&handle);

    let stats = handle.stats();
    let num = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let (finished, cancelled, dropped) =
        (num(&seen.finished), num(&seen.cancelled), num(&seen.dropped));
    println!("{finished} finished, {cancelled} cancelled, {dropped} dropped, {stats:?}");
    println!("resident bytes: {before:?} before, {after:?} after");
    assert_eq!(finished + cancelled + dropped, NUM_REQUESTS);
    assert_eq!(stats.num_accepted, NUM_REQUESTS);
    assert!(finished.min(cancelled).min(dropped) > NUM_REQUESTS / 20);
    // A dropped request may end before its cancel comes.
    let counts = stats.counts;
    assert!((finished..=finished + dropped).contains(&counts.num_finished));
    assert!((cancelled..=cancelled + dropped).contains(&counts.num_cancelled));
    if let (Some(before), Some(after)) = (before, after) {
        assert!(after < before + GROWTH_MAX, "{before} bytes grew to {after}");
    }
}

/// In a process of its own, where no other test uses memory meanwhile.
#[test]
fn a_hundred_thousand_requests_end_once_each() {
    if env::var_os(ALONE).is_some() {
        return run_all();
    }
    let module = module_path!().split_once("::").unwrap().1;
    let name = format!("{module}::a_hundred_thousand_requests_end_once_each");
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains("100000") && said.contains("1 passed"), "{said}\n{complained}");
}
