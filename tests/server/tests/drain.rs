//! The end of a server: told to stop, its engine dead or hanging.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bespoke::backend::null::{Fault, NullOptions};
use bespoke::server::{Ended, Server};
use bespoke_server_tests::process::ServerProcess;
use bespoke_server_tests::{Client, LONG, MODEL, Reader, Setup, VOCAB, client, wait_until};
use serde_json::{Value, json};

const NUM_STREAMS: usize = 256;

fn completion(seed: usize, max_tokens: usize) -> Value {
    json!({
        "model": MODEL, "prompt": [1, 2, seed], "max_tokens": max_tokens, "ignore_eos": true,
        "temperature": 0, "stream": true,
    })
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    Error,
    /// Without a word.
    Cut,
}

/// Reads a stream to its end; says how many events with text came.
fn read_on(mut reader: Reader) -> (End, usize) {
    let (mut num, mut end) = (0, End::Cut);
    while let Ok(Some(event)) = reader.next_event() {
        match event.as_str() {
            "[DONE]" => end = End::Done,
            text => {
                let event: Value = serde_json::from_str(text).expect("JSON");
                assert_eq!(end, End::Cut, "after the end came {event}");
                match event["error"]["message"].is_string() {
                    true => end = End::Error,
                    false => num += 1,
                }
            }
        }
    }
    (end, num)
}

/// Starts streams and waits until each has begun.
fn start_streams(client: &Client, num: usize, max_tokens: usize) -> Vec<Reader> {
    let start = |seed: usize| {
        let client = client.clone();
        thread::spawn(move || {
            let mut reader = client.stream("/v1/completions", &completion(seed, max_tokens));
            assert_eq!(reader.status, 200);
            assert!(reader.next_event().expect("a first event").is_some());
            reader
        })
    };
    let threads: Vec<_> = (0..num).map(start).collect();
    threads.into_iter().map(|thread| thread.join().expect("a stream")).collect()
}

fn read_all(readers: Vec<Reader>) -> Vec<(End, usize)> {
    let threads: Vec<_> =
        readers.into_iter().map(|reader| thread::spawn(move || read_on(reader))).collect();
    threads.into_iter().map(|thread| thread.join().expect("a reader")).collect()
}

/// While the server drains: not ready, nothing new, and time to come back.
fn assert_draining(client: &Client) {
    for answer in [client.get("/ready"), client.post("/v1/completions", &completion(0, 5))] {
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert_eq!(answer.error()["code"], "draining");
        assert!(answer.header("retry-after").is_some());
    }
    assert_eq!(client.get("/live").status, 200);
}

fn many_streams() -> Setup {
    let mut setup = Setup::default();
    setup.engine.max_sequences = NUM_STREAMS;
    // Room for all prompts in one step.
    setup.engine.max_batch_tokens = 4 * NUM_STREAMS;
    setup.engine.num_pages = Some(NUM_STREAMS * 256);
    setup.server.limits.connections_per_client_max = 1024;
    setup
}

/// Starts streams of which each has had its first token, and holds the engine there until what is
/// given with them is dropped.
fn start_and_hold(
    server: &Server,
    client: &Client,
    max_tokens: usize,
) -> (Vec<JoinHandle<Reader>>, Sender<()>) {
    let first = hang(server);
    let start = |seed: usize| {
        let client = client.clone();
        thread::spawn(move || client.stream("/v1/completions", &completion(seed, max_tokens)))
    };
    let readers: Vec<_> = (0..NUM_STREAMS).map(start).collect();
    let stats = || server.app().handle.stats();
    wait_until("all wait", || stats().num_waiting == NUM_STREAMS);
    // The second is taken up together with the requests, before they are; the third after a step.
    let (second, has_started) = queue_hang(server);
    drop(first);
    has_started.recv().expect("the engine takes the call");
    let (release, has_started) = queue_hang(server);
    drop(second);
    has_started.recv().expect("the engine takes the call");
    assert_eq!(stats().num_running, NUM_STREAMS);
    (readers, release)
}

fn join(readers: Vec<JoinHandle<Reader>>) -> Vec<Reader> {
    readers.into_iter().map(|thread| thread.join().expect("a stream")).collect()
}

#[test]
fn streams_that_fit_in_the_drain_come_to_their_end() {
    const NUM_TOKENS: usize = 200;
    let server = many_streams().start();
    let client = client(&server);
    let (readers, held) = start_and_hold(&server, &client, NUM_TOKENS);
    server.start_drain();
    assert_draining(&client);
    drop(held);
    for (end, num) in read_all(join(readers)) {
        // Tokens that end no character have no event, and the end has one.
        assert!(end == End::Done && num <= NUM_TOKENS + 1, "{end:?} {num}");
    }
    assert_eq!(server.wait_timeout(LONG), Some(Ended::Drained));
    assert_eq!(server.app().handle.stats().counts.num_finished, NUM_STREAMS as u64);
}

#[test]
fn streams_that_outlast_the_drain_are_told() {
    let mut setup = many_streams();
    setup.server.timeouts.drain = Duration::ZERO;
    let server = setup.start();
    let client = client(&server);
    let (readers, held) = start_and_hold(&server, &client, 4000);
    server.start_drain();
    drop(held);
    for (end, _) in read_all(join(readers)) {
        assert_eq!(end, End::Error);
    }
    assert_eq!(server.wait_timeout(LONG), Some(Ended::Drained));
    assert_eq!(server.app().handle.stats().counts.num_cancelled, NUM_STREAMS as u64);
}

#[test]
fn a_dead_engine_tells_its_streams_and_ends_the_server() {
    for fault in [Fault::Error { step: 40 }, Fault::Panic { step: 40 }] {
        let null = NullOptions { vocab_size: VOCAB, fault: Some(fault), ..NullOptions::default() };
        let server = Setup { null, ..Setup::default() }.start();
        let client = client(&server);
        let release = hang(&server);
        let start = |seed: usize| {
            let client = client.clone();
            thread::spawn(move || client.stream("/v1/completions", &completion(seed, 1000)))
        };
        let streams: Vec<_> = (0..8).map(start).collect();
        wait_until("eight wait", || server.app().handle.stats().num_waiting == 8);
        drop(release);
        let streams = streams.into_iter().map(|thread| thread.join().unwrap()).collect();
        for (end, num) in read_all(streams) {
            assert_eq!(end, End::Error, "{fault:?}");
            assert!(num < 1000, "{num}");
        }
        let ended = server.wait_timeout(LONG);
        assert!(matches!(ended, Some(Ended::EngineDied(_))), "{fault:?}: {ended:?}");
    }
}

#[test]
fn a_step_that_hangs_ends_the_server() {
    let mut setup = Setup::default();
    setup.server.timeouts.step = Duration::from_millis(300);
    let server = setup.start();
    let client = client(&server);
    let hang = hang(&server);
    let waiting = {
        let client = client.clone();
        thread::spawn(move || drop(client.stream("/v1/completions", &completion(0, 5))))
    };
    wait_until("the server is not ready", || {
        let answer = client.get("/ready");
        answer.status == 503 && answer.error()["code"] == "engine_stalled"
    });
    assert!(matches!(server.wait_timeout(LONG), Some(Ended::EngineStalled(_))));
    drop(hang);
    drop(waiting.join());
}

/// Holds the engine until what is given is dropped.
fn hang(server: &Server) -> Sender<()> {
    let (release, has_started) = queue_hang(server);
    has_started.recv().expect("the engine takes the call");
    release
}

/// As [`hang`], from when the engine says so.
fn queue_hang(server: &Server) -> (Sender<()>, Receiver<()>) {
    let (release, held) = channel::<()>();
    let (started, has_started) = channel();
    let handle = server.app().handle.clone();
    let (asked, has_asked) = channel();
    thread::spawn(move || {
        let _ = asked.send(());
        handle.call(move |_| {
            let _ = started.send(());
            let _ = held.recv();
        })
    });
    has_asked.recv().expect("the thread runs");
    (release, has_started)
}

fn process(drain: &str) -> ServerProcess {
    let args =
        ["--drain-timeout", drain, "--max-sequences", "256", "--max-connections-per-client", "999"];
    ServerProcess::start(&args)
}

#[test]
fn signals_drain_the_process() {
    for name in ["TERM", "INT", "HUP"] {
        let mut server = process("30");
        let client = server.client();
        let readers = start_streams(&client, 16, 500);
        server.signal(name);
        wait_until("it drains", || server.log().contains("draining"));
        for (end, _) in read_all(readers) {
            assert_eq!(end, End::Done, "{name}");
        }
        assert_eq!(server.wait().code(), Some(0), "{name}: {}", server.log());
    }
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let mut server = process("600");
    let client = server.client();
    let readers = start_streams(&client, 64, 4000);
    server.signal("TERM");
    wait_until("it drains", || server.log().contains("draining"));
    server.signal("INT");
    assert_eq!(server.wait().code(), Some(130), "{}", server.log());
    drop(readers);
}

#[test]
fn a_broken_pipe_ends_nothing() {
    let mut server = process("30");
    server.signal("PIPE");
    assert_eq!(server.client().get("/ready").status, 200);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn sessions_outlive_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sessions");
    let args = ["--session-dir", path.to_str().unwrap()];
    let turn = |client: &Client| {
        let body = json!({
            "prompt": "a canary", "session_id": "talk", "interactive_mode": true, "stream": false,
            "request_output_len": 8, "ignore_eos": true,
        });
        let answer = client.post("/v1/chat/interactive", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["history_tokens"].as_u64().unwrap()
    };
    let mut first = ServerProcess::start(&args);
    assert_eq!(turn(&first.client()), 0);
    first.signal("TERM");
    assert_eq!(first.wait().code(), Some(0));
    let mut second = ServerProcess::start(&args);
    assert!(turn(&second.client()) > 8);
    assert_eq!(second.client().delete("/v1/sessions/talk").status, 200);
    second.signal("TERM");
    second.wait();
    let third = ServerProcess::start(&args);
    assert_eq!(third.client().get("/v1/sessions/talk").status, 404);
    assert!(!(first.log() + &second.log()).contains("canary"), "{}", second.log());
}

#[test]
fn logs_say_nothing_that_a_client_said() {
    let server = ServerProcess::start(&["--log-format", "json"]);
    let client = server.client();
    let canary = "canary\u{1b}[31m\r\n\u{7}";
    let body = json!({"model": MODEL, "prompt": canary, "max_tokens": 4, "stop": ["canary stop"]});
    assert_eq!(client.post("/v1/completions", &body).status, 200);
    assert_eq!(client.get("/canary/%1b%5b31m?canary=%0a").status, 404);
    let unknown = json!({"model": MODEL, "prompt": "x", "canary": canary});
    assert_eq!(client.post("/v1/completions", &unknown).status, 400);
    wait_until("three requests are logged", || server.log().matches("\"access\"").count() >= 3);
    let log = server.log();
    assert!(!log.contains("canary"), "{log}");
    assert!(log.chars().all(|c| c == '\n' || !c.is_control()), "{log:?}");
    for line in log.lines().filter(|line| line.contains("\"access\"")) {
        let line: Value = serde_json::from_str(line).expect("a line of the log is JSON");
        assert!(line["route"].is_string() && line["status"].is_number(), "{line}");
    }
}
