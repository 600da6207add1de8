//! What a token costs beside the model: processor time of server and scheduler, with many streams.
//!
//! The null backend stands for the model, so nearly all that is left is ours. The processor time of
//! every thread of this process is read from the kernel; that of the client's thread is left out.
//! An engine without a model is so fast that several tokens share an event, which is cheaper than
//! what a real model leads to; so it is also measured with steps that are as far apart as those of
//! a model, when each token is an event and a packet of its own. `--test` runs a small measurement
//! once.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench reports to its terminal")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bespoke::Error;
use bespoke::backend::null::NullOptions;
use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::request::Request;
use bespoke::sampling::SamplingParams;
use bespoke::server::Server;
use bespoke_benches::report::publish;
use bespoke_server_tests::{MODEL, Setup, VOCAB};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What one point measures.
#[derive(Clone, Copy)]
struct Case {
    num_streams: usize,
    prompt_len: usize,
    max_tokens: usize,
    /// Least time between two steps.
    step: Duration,
    num_rounds: usize,
}

const PROMPT_LEN: usize = 32;
const STEP: Duration = Duration::from_millis(20);

const CASES: [Case; 6] = [
    case(256, 128, STEP),
    case(32, 128, STEP),
    case(1, 128, STEP),
    case(256, 256, Duration::ZERO),
    case(32, 512, Duration::ZERO),
    case(1, 2048, Duration::ZERO),
];
const SMALL: [Case; 2] = [
    Case { num_rounds: 1, ..case(8, 8, Duration::from_millis(1)) },
    Case { num_rounds: 1, ..case(8, 8, Duration::ZERO) },
];

const fn case(num_streams: usize, max_tokens: usize, step: Duration) -> Case {
    Case { num_streams, prompt_len: PROMPT_LEN, max_tokens, step, num_rounds: 5 }
}

/// What the goal is: microseconds of one core for a token of 256 streams.
const GOAL_MICROSECONDS: f64 = 20.0;

/// The threads that are no part of the server.
const CLIENT: &str = "client";
const PACER: &str = "pacer";

/// Processor time of each kind of thread.
type Times = BTreeMap<String, Duration>;

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    let cases = if is_test { &SMALL[..] } else { &CASES[..] };
    if let Err(error) = run(cases) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(cases: &[Case]) -> Result<(), Error> {
    if times().is_empty() {
        println!("skipped: this system does not tell the processor time of threads");
        return Ok(());
    }
    let mut text = format!(
        "Processor time per generated token, in microseconds, beside a model that costs nearly \
         nothing: medians of rounds; the goal for 256 streams is {GOAL_MICROSECONDS}.\n\
         `engine alone` is the same load without server and threads. The client's thread is not \
         part of the sum.\n\n\
         | streams | tokens | ms between steps | events per token | engine alone | all of the \
         server | its threads | client | tokens/s |\n|---|---|---|---|---|---|---|---|---|\n"
    );
    for case in cases {
        let line = measure(case)?;
        println!("{line}");
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    }
    publish("serving.md", &text)
}

/// A line of the table.
fn measure(case: &Case) -> Result<String, Error> {
    let alone = median((0..case.num_rounds).map(|_| engine_alone(case)).collect::<Result<_, _>>()?);
    let mut setup = Setup { engine: engine_options(case), ..Setup::default() };
    setup.server.limits.connections_per_client_max = 2 * case.num_streams.max(64);
    let server = setup.start();
    let (mut sums, mut clients, mut rates, mut events) = (vec![], vec![], vec![], vec![]);
    let mut threads: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    // One round to warm up.
    for round in 0..=case.num_rounds {
        let Round { spent, elapsed, num_events } = paced(case, &server)?;
        if round == 0 && case.num_rounds > 1 {
            continue;
        }
        let num_tokens = (case.num_streams * case.max_tokens) as f64;
        let per_token = |time: Duration| time.as_secs_f64() * 1e6 / num_tokens;
        let ours = spent.iter().filter(|(name, _)| ![CLIENT, PACER].contains(&name.as_str()));
        sums.push(ours.clone().map(|(_, time)| per_token(*time)).sum());
        for (name, time) in ours {
            threads.entry(name.clone()).or_default().push(per_token(*time));
        }
        clients.push(per_token(spent.get(CLIENT).copied().unwrap_or_default()));
        rates.push(num_tokens / elapsed.as_secs_f64());
        events.push(num_events as f64 / num_tokens);
    }
    let threads = threads.into_iter().map(|(name, values)| (name, median(values)));
    let threads: Vec<String> = threads
        .filter(|(_, microseconds)| *microseconds >= 0.05)
        .map(|(name, microseconds)| format!("{name} {microseconds:.1}"))
        .collect();
    Ok(format!(
        "| {} | {} | {} | {:.2} | {alone:.1} | {:.1} | {} | {:.1} | {:.0} |",
        case.num_streams,
        case.max_tokens,
        case.step.as_millis(),
        median(events),
        median(sums),
        threads.join(", "),
        median(clients),
        median(rates)
    ))
}

fn engine_options(case: &Case) -> EngineOptions {
    let len = case.prompt_len + case.max_tokens;
    EngineOptions {
        max_context: Some(len + 64),
        max_sequences: case.num_streams,
        max_batch_tokens: case.num_streams.max(512),
        num_pages: None,
        // Every round sends the same prompts, and computes them.
        prefix_cache: false,
        ..EngineOptions::new(KernelTable::default())
    }
}

/// Microseconds per token of scheduler, sampler and null backend.
fn engine_alone(case: &Case) -> Result<f64, Error> {
    let null = NullOptions { vocab_size: VOCAB, ..NullOptions::default() };
    let mut engine = Engine::null(&null, &engine_options(case))?;
    let request = |idx: usize| Request {
        prompt_ids: prompt_ids(case, idx),
        max_tokens: case.max_tokens,
        ignore_eos: true,
        sampling: SamplingParams { logit_bias: vec![(104, 100.0)], ..SamplingParams::default() },
        ..Request::default()
    };
    for idx in 1..case.num_streams {
        engine.add_request(request(idx))?;
    }
    let start = own_time();
    // The last request ends when all have.
    engine.generate(request(0), &mut |_| ControlFlow::Continue(()))?;
    let spent = own_time().saturating_sub(start);
    Ok(spent.as_secs_f64() * 1e6 / (case.num_streams * case.max_tokens) as f64)
}

/// What one round took.
struct Round {
    spent: Times,
    elapsed: Duration,
    num_events: usize,
}

/// A round with steps that are as far apart as the case says.
fn paced(case: &Case, server: &Server) -> Result<Round, Error> {
    let is_over = AtomicBool::new(false);
    let handle = server.app().handle.clone();
    thread::scope(|scope| {
        let pacer = thread::Builder::new().name(PACER.to_owned()).spawn_scoped(scope, || {
            let step = case.step;
            // NOTE: a call runs between two steps, and holds the next one up as long as it takes.
            // An engine that has ended is told of by the requests.
            while !step.is_zero() && !is_over.load(Ordering::Relaxed) {
                let _ = handle.call(move |_| thread::sleep(step));
            }
        });
        pacer.map_err(|error| Error::Resources(format!("no thread: {error}")))?;
        let round = round_of(case, server.address());
        is_over.store(true, Ordering::Relaxed);
        round
    })
}

/// Sends all requests at once and reads all answers to their ends.
fn round_of(case: &Case, address: SocketAddr) -> Result<Round, Error> {
    let before = times();
    let start = Instant::now();
    let case = *case;
    let client = thread::Builder::new().name(CLIENT.to_owned()).spawn(move || {
        let result = talk(&case, address);
        // Read here: the time of a thread goes with it.
        (result, own_time())
    });
    let client = client.map_err(|error| Error::Resources(format!("no thread: {error}")))?;
    let (result, of_client) =
        client.join().map_err(|_| Error::Engine("the client panicked".to_owned()))?;
    let elapsed = start.elapsed();
    let mut spent = times();
    let num_events = result.map_err(Error::Engine)?;
    spent.iter_mut().for_each(|(name, time)| {
        *time = time.saturating_sub(before.get(name).copied().unwrap_or_default());
    });
    spent.insert(CLIENT.to_owned(), of_client);
    Ok(Round { spent, elapsed, num_events })
}

/// All streams of a round, on this thread; gives the number of events.
fn talk(case: &Case, address: SocketAddr) -> Result<usize, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let case = *case;
    runtime.block_on(async {
        let streams: Vec<_> = (0..case.num_streams)
            .map(|idx| tokio::spawn(async move { stream(&case, idx, address).await }))
            .collect();
        let mut num_events = 0;
        for stream in streams {
            num_events += stream.await.map_err(|error| error.to_string())??;
        }
        Ok(num_events)
    })
}

/// One stream, and its number of events; an error where it is not what was asked for.
async fn stream(case: &Case, idx: usize, address: SocketAddr) -> Result<usize, String> {
    let body = json!({
        "model": MODEL, "prompt": prompt_ids(case, idx), "max_tokens": case.max_tokens,
        "ignore_eos": true, "temperature": 0, "stream": true,
        "stream_options": {"include_usage": true},
        // A letter each time, or many tokens would be no text and no event.
        "logit_bias": {"104": 100},
    })
    .to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let fail = |error: io::Error| error.to_string();
    let mut socket = TcpStream::connect(address).await.map_err(fail)?;
    socket.write_all((head + &body).as_bytes()).await.map_err(fail)?;
    let (mut bytes, mut end, mut num_events) = (vec![0; 16 << 10], Vec::new(), 0);
    loop {
        let len = socket.read(&mut bytes).await.map_err(fail)?;
        if len == 0 {
            break;
        }
        // Events begin with it; one that is cut here is missed, which happens to few.
        num_events += bytes[..len].windows(6).filter(|window| window == b"data: ").count();
        end.extend_from_slice(&bytes[..len]);
        // Only the end is looked at: the client shall cost little.
        let num_old = end.len().saturating_sub(4096);
        end.drain(..num_old);
    }
    let end = String::from_utf8_lossy(&end);
    let usage = format!("\"completion_tokens\":{}", case.max_tokens);
    match end.contains(&usage) && end.contains("data: [DONE]") {
        true => Ok(num_events),
        false => Err(format!("stream {idx} ended with: {end}")),
    }
}

fn prompt_ids(case: &Case, idx: usize) -> Vec<u32> {
    (0..case.prompt_len).map(|place| ((idx * 31 + place * 7) % 256) as u32).collect()
}

/// Processor time of all threads that there are, by name without numbers; empty where the system
/// does not tell it.
fn times() -> Times {
    let mut times = Times::new();
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return times };
    for task in tasks.flatten() {
        let Ok(name) = fs::read_to_string(task.path().join("comm")) else { continue };
        let name = name.trim().trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
        if let Some(time) = thread_time(&task.path()) {
            *times.entry(name.to_owned()).or_default() += time;
        }
    }
    times
}

/// Processor time of this thread.
fn own_time() -> Duration {
    // NOTE: the kernel adds up the time of a running thread when it lets go.
    thread::yield_now();
    thread_time("/proc/thread-self".as_ref()).unwrap_or_default()
}

fn thread_time(task: &std::path::Path) -> Option<Duration> {
    let text = fs::read_to_string(task.join("schedstat")).ok()?;
    text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
