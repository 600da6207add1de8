//! `bespoke bench --mode serving` against servers that do what a test wants of them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use bespoke::cli::{self, Console, Exit};
use bespoke::kernels::generated;
use bespoke::server::Keys;
use bespoke_server_tests::{MODEL, Setup};
use serde_json::{Value, json};

/// What a request is answered with.
#[derive(Clone, Copy, Debug)]
enum Reply {
    /// As a sound server does.
    Whole,
    /// The same, one byte a packet.
    Bytes,
    /// Two tokens, then the connection breaks.
    Break,
    /// Two tokens, then nothing.
    Hang,
    /// An error with this status.
    Status(u16),
    /// Two tokens, then an error.
    ErrorEvent,
    /// An event that is no JSON.
    Nonsense,
    /// No usage.
    NoUsage,
    /// No `[DONE]`.
    NoDone,
    /// No finish reason.
    NoEnd,
    /// One token less than asked for.
    Short,
    /// The server goes away.
    Die,
}

/// A server of a few lines.
struct FakeServer {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    reply: fn(usize) -> Reply,
    num_requests: AtomicUsize,
    is_dead: AtomicBool,
    /// Requests that are held until so many are there at once; 0 holds none.
    num_together: usize,
    gate: Mutex<Gate>,
    opened: Condvar,
    bodies: Mutex<Vec<Value>>,
    heads: Mutex<Vec<String>>,
}

#[derive(Default)]
struct Gate {
    num_waiting: usize,
    num_rounds: usize,
    num_live: usize,
    num_live_max: usize,
}

impl FakeServer {
    /// `reply` says how request `idx` is answered; the first is the one to warm up.
    fn start(num_together: usize, reply: fn(usize) -> Reply) -> FakeServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            reply,
            num_requests: AtomicUsize::new(0),
            is_dead: AtomicBool::new(false),
            num_together,
            gate: Mutex::default(),
            opened: Condvar::new(),
            bodies: Mutex::default(),
            heads: Mutex::default(),
        });
        let of_thread = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if of_thread.is_dead.load(Ordering::SeqCst) {
                    return;
                }
                let state = Arc::clone(&of_thread);
                // An error is a client that went away.
                thread::spawn(move || drop(state.serve(stream.unwrap(), address)));
            }
        });
        FakeServer { address, state }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Bodies of the requests behind the one to warm up.
    fn bodies(&self) -> Vec<Value> {
        self.state.bodies.lock().unwrap()[1..].to_vec()
    }
}

impl State {
    fn serve(&self, stream: TcpStream, address: SocketAddr) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if reader.read_line(&mut head)? == 0 {
                    return Ok(());
                }
            }
            let len = head
                .to_lowercase()
                .split("content-length: ")
                .nth(1)
                .map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
            let mut body = vec![0; len];
            reader.read_exact(&mut body)?;
            self.heads.lock().unwrap().push(head.clone());
            if head.starts_with("GET ") {
                write(&stream, "200 OK", MODELS)?;
                continue;
            }
            let idx = self.num_requests.fetch_add(1, Ordering::SeqCst);
            let body: Value = serde_json::from_slice(&body).unwrap();
            let max_tokens = body["max_tokens"].as_u64().unwrap() as usize;
            let is_chat = head.starts_with("POST /v1/chat/completions ");
            self.bodies.lock().unwrap().push(body);
            if idx > 0 {
                self.meet();
            }
            let reply = (self.reply)(idx);
            if matches!(reply, Reply::Die) {
                self.is_dead.store(true, Ordering::SeqCst);
                // The listener sees that it is dead when it has one more connection.
                drop(TcpStream::connect(address));
            }
            let result = answer(&stream, reply, max_tokens, is_chat);
            self.gate.lock().unwrap().num_live -= usize::from(idx > 0);
            result?;
        }
    }

    /// Waits until as many requests are there as the test wants.
    fn meet(&self) {
        let mut gate = self.gate.lock().unwrap();
        gate.num_live += 1;
        gate.num_live_max = gate.num_live_max.max(gate.num_live);
        gate.num_waiting += 1;
        if gate.num_waiting >= self.num_together {
            gate.num_waiting = 0;
            gate.num_rounds += 1;
            self.opened.notify_all();
        }
        let round = gate.num_rounds;
        let is_held = |gate: &mut Gate| gate.num_waiting > 0 && gate.num_rounds == round;
        drop(self.opened.wait_while(gate, is_held).unwrap());
    }
}

const MODELS: &str = r#"{"object": "list", "data": [
    {"id": "one", "vocab_size": 100, "max_model_len": 512}, {"id": "two"}]}"#;

fn write(mut stream: &TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let len = body.len();
    write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {len}\r\n\r\n{body}")
}

fn answer(
    mut stream: &TcpStream,
    reply: Reply,
    max_tokens: usize,
    is_chat: bool,
) -> std::io::Result<()> {
    if let Reply::Status(status) = reply {
        let error = json!({"error": {"message": "come back later", "type": "x"}});
        return write(stream, &format!("{status} No"), &error.to_string());
    }
    let broken = || Err(std::io::Error::other("the test wants it so"));
    if matches!(reply, Reply::Die) {
        return broken();
    }
    write!(stream, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
    let mut say = |text: &str| write!(stream, "{:x}\r\n{text}\r\n", text.len());
    let choice = |text: &str, reason: Option<&str>| match is_chat {
        true => json!({"delta": {"content": text}, "finish_reason": reason}),
        false => json!({"text": text, "finish_reason": reason}),
    };
    let event = |choice: Value| format!("data: {}\n\n", json!({"choices": [choice]}));
    if is_chat {
        say(&event(json!({"delta": {"role": "assistant"}, "finish_reason": null})))?;
    }
    let num_tokens = match reply {
        Reply::Short => max_tokens - 1,
        Reply::Break | Reply::Hang | Reply::ErrorEvent => 2,
        _ => max_tokens,
    };
    for _ in 0..num_tokens {
        say(&event(choice("a", None)))?;
    }
    match reply {
        Reply::Break => return broken(),
        // The client goes away first.
        Reply::Hang => return stream.read(&mut [0]).and_then(|_| broken()),
        Reply::ErrorEvent => {
            say("data: {\"error\": {\"message\": \"the engine died\"}}\n\n")?;
        }
        Reply::Nonsense => say("data: {oops\n\n")?,
        _ => {}
    }
    let mut end = String::new();
    if !matches!(reply, Reply::NoEnd) {
        end += &event(choice("", Some("length")));
    }
    if !matches!(reply, Reply::NoUsage) {
        let usage = json!({
            "prompt_tokens": 10, "completion_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": 3},
        });
        end += &format!("data: {}\n\n", json!({"choices": [], "usage": usage}));
    }
    if !matches!(reply, Reply::NoDone) {
        end += "data: [DONE]\n\n";
    }
    match reply {
        Reply::Bytes => end.chars().try_for_each(|c| say(&c.to_string()))?,
        _ => say(&end)?,
    }
    write!(stream, "0\r\n\r\n")
}

/// What a command left behind.
struct Run {
    exit: Exit,
    out: String,
    err: String,
}

fn bench(args: &[&str]) -> Run {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut console = Console {
        out: &mut out,
        err: &mut err,
        is_terminal: false,
        kernels: generated::table(),
        home: None,
        program: None,
        bundle: None,
        start: Instant::now(),
        before_main: None,
    };
    let args = [&["bespoke", "bench", "--mode", "serving"], args].concat();
    let exit = cli::run(args, &mut console);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { exit, out: text(out), err: text(err) }
}

/// The JSON of a run that ends as expected.
#[track_caller]
fn report(server: &FakeServer, args: &[&str], exit: Exit) -> Value {
    let url = server.url();
    let run = bench(&[&["--url", &url, "--json"], args].concat());
    assert_eq!(run.exit, exit, "{}{}", run.out, run.err);
    serde_json::from_str(&run.out).unwrap()
}

#[track_caller]
fn count(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("{key} in {report}"))
}

const SMALL: [&str; 4] = ["--prompt-tokens", "10", "--max-tokens", "5"];

/// Keys of the JSON, those of the other modes among them.
const KEYS: [&str; 28] = [
    "model",
    "url",
    "seed",
    "mode",
    "prompt_tokens",
    "max_tokens",
    "concurrency",
    "request_rate",
    "requests",
    "completed_requests",
    "failed_requests",
    "failures",
    "prompt_tokens_per_s",
    "decode_tokens_per_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "requests_per_s",
    "requests_per_min",
    "ttft_ms",
    "tpot_ms",
    "request_tpot_ms",
    "e2e_ms",
    "elapsed_s",
    "start_lag_ms_max",
    "total_prompt_tokens",
    "total_output_tokens",
    "cached_tokens",
    "points",
];

#[test]
fn a_closed_loop_keeps_so_many_requests_under_way() {
    let server = FakeServer::start(4, |_| Reply::Whole);
    let args = [&SMALL[..], &["--concurrency", "4", "--requests", "12"]].concat();
    let report = report(&server, &args, Exit::Done);
    let keys: Vec<&str> = report.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, KEYS);
    assert_eq!((&report["model"], &report["mode"]), (&json!("one"), &json!("serving")));
    let counts = [
        ("requests", 12),
        ("completed_requests", 12),
        ("failed_requests", 0),
        ("concurrency", 4),
        ("prompt_tokens", 10),
        ("max_tokens", 5),
        ("total_prompt_tokens", 120),
        ("total_output_tokens", 60),
        ("cached_tokens", 36),
    ];
    for (key, expected) in counts {
        assert_eq!(count(&report, key), expected, "{key}");
    }
    for key in ["ttft_ms", "tpot_ms", "request_tpot_ms", "e2e_ms"] {
        let values = ["min", "p50", "p75", "p95", "p99", "max"];
        let values = values.map(|name| report[key][name].as_f64().unwrap());
        assert!(values[0] >= 0.0 && values.is_sorted(), "{key}: {values:?}");
    }
    // The server held each until four were there, and never saw a fifth.
    assert_eq!(server.state.gate.lock().unwrap().num_live_max, 4);
    for body in server.bodies() {
        let ids: Vec<u32> = serde_json::from_value(body["prompt"].clone()).unwrap();
        assert!(ids.len() == 10 && ids.iter().all(|id| *id < 100), "{body}");
        assert_eq!((&body["ignore_eos"], &body["stream"]), (&json!(true), &json!(true)));
    }
    // Connections are used again.
    assert!(server.state.heads.lock().unwrap().iter().all(|head| head.contains("host: 127.0.0.1")));
}

#[test]
fn an_open_loop_starts_requests_by_the_clock() {
    let server = FakeServer::start(30, |_| Reply::Whole);
    let args = [&SMALL[..], &["--request-rate", "inf", "--requests", "30"]].concat();
    let unbounded = report(&server, &args, Exit::Done);
    assert_eq!((&unbounded["request_rate"], count(&unbounded, "requests")), (&json!("inf"), 30));
    assert_eq!(server.state.gate.lock().unwrap().num_live_max, 30);

    let server = FakeServer::start(3, |_| Reply::Whole);
    let args = [&SMALL[..], &["--request-rate", "2000", "--requests", "30"]].concat();
    let bounded = report(&server, &[&args[..], &["--concurrency", "3"]].concat(), Exit::Done);
    assert_eq!((&bounded["request_rate"], count(&bounded, "requests")), (&json!(2000.0), 30));
    assert_eq!(server.state.gate.lock().unwrap().num_live_max, 3);
    // No sooner than the last arrival, which a seed decides.
    assert!(bounded["elapsed_s"].as_f64() > Some(0.005), "{bounded}");
}

#[test]
fn chats_are_measured_too() {
    let server = FakeServer::start(0, |_| Reply::Bytes);
    let args = ["--endpoint", "chat", "--requests", "3", "--model", "two", "--concurrency", "1,2"];
    let report = report(&server, &[&SMALL[..], &args].concat(), Exit::Done);
    assert_eq!(report["points"].as_array().unwrap().len(), 2);
    assert_eq!((&report["model"], count(&report, "total_output_tokens")), (&json!("two"), 15));
    // The role comes before the first token and is none.
    let heads = server.state.heads.lock().unwrap();
    assert!(heads.iter().skip(1).all(|head| head.starts_with("POST /v1/chat/completions ")));
    let body = &server.bodies()[0];
    assert_eq!(body["messages"][0]["content"].as_str().unwrap().split(' ').count(), 10);
}

#[test]
fn lengths_come_from_a_trace() {
    let server = FakeServer::start(0, |_| Reply::Whole);
    let file = tempfile::NamedTempFile::new().unwrap();
    let lines =
        "{\"prompt_tokens\": 3, \"max_tokens\": 2}\n{\"prompt_tokens\": 9, \"max_tokens\": 4}";
    std::fs::write(file.path(), lines).unwrap();
    let path = file.path().to_str().unwrap();
    let args = ["--trace", path, "--shared-prefix-tokens", "2", "--concurrency", "1"];
    let found = report(&server, &args, Exit::Done);
    assert_eq!((count(&found, "requests"), count(&found, "total_output_tokens")), (2, 6));
    let bodies = server.bodies();
    let len = |body: &Value| body["prompt"].as_array().unwrap().len();
    assert_eq!(bodies.iter().map(len).collect::<Vec<_>>(), [3, 9]);
    assert_eq!(bodies[0]["prompt"][1], bodies[1]["prompt"][1]);
    // The server tells its context.
    let run = bench(&["--url", &server.url(), "--prompt-tokens", "512"]);
    assert!(run.err.contains("do not fit the model's context of 512"), "{}", run.err);
}

#[test]
fn failures_are_counted_by_their_kind() {
    let check = |reply: fn(usize) -> Reply, kind: &str, example: &str| {
        let server = FakeServer::start(0, reply);
        let args = ["--requests", "4", "--concurrency", "2", "--timeout", "0.3"];
        let found = report(&server, &[&SMALL[..], &args].concat(), Exit::Done);
        let failures: BTreeMap<String, Value> =
            serde_json::from_value(found["failures"].clone()).unwrap();
        assert_eq!(failures.keys().collect::<Vec<_>>(), [kind], "{found}");
        assert_eq!(count(&failures[kind], "count"), 2);
        let text = failures[kind]["example"].as_str().unwrap();
        assert!(text.contains(example), "{text}");
        let counts = ["requests", "completed_requests", "failed_requests", "total_output_tokens"];
        assert_eq!(counts.map(|key| count(&found, key)), [4, 2, 2, 10]);
    };
    check(|idx| pick(idx, Reply::Status(429)), "status 429", "come back later");
    check(|idx| pick(idx, Reply::Status(503)), "status 503", "come back later");
    check(|idx| pick(idx, Reply::Break), "connection", "the connection broke");
    check(|idx| pick(idx, Reply::Hang), "timeout", "nothing came for 0.3 s");
    check(|idx| pick(idx, Reply::ErrorEvent), "error event", "the engine died");
    check(|idx| pick(idx, Reply::Nonsense), "stream", "{oops");
    check(|idx| pick(idx, Reply::NoUsage), "stream", "without its usage");
    check(|idx| pick(idx, Reply::NoDone), "stream", "without [DONE]");
    check(|idx| pick(idx, Reply::NoEnd), "stream", "without a finish reason");
    check(|idx| pick(idx, Reply::Short), "length", "4 tokens where 5 were asked for");
}

/// Every second request goes wrong, but not the one to warm up.
fn pick(idx: usize, reply: Reply) -> Reply {
    if idx % 2 == 1 { reply } else { Reply::Whole }
}

#[test]
fn a_server_that_goes_away_is_told() {
    let server = FakeServer::start(0, |idx| if idx == 5 { Reply::Die } else { Reply::Whole });
    let url = server.url();
    let args = [&SMALL[..], &["--requests", "1000", "--concurrency", "1", "--url", &url]].concat();
    let run = bench(&args);
    assert_eq!(run.exit, Exit::Failed);
    assert!(run.err.contains("went away; ") && run.err.contains("have failed"), "{}", run.err);
    // What was measured until then is shown.
    assert!(run.out.contains("4 completed, ") && run.out.contains("× connection"), "{}", run.out);

    let server =
        FakeServer::start(0, |idx| if idx == 0 { Reply::Whole } else { Reply::Status(500) });
    let run = bench(&[&SMALL[..], &["--requests", "3", "--url", &server.url()]].concat());
    assert!(run.exit == Exit::Failed && run.err.contains("no request succeeded"), "{}", run.err);
    let server = FakeServer::start(0, |_| Reply::Status(401));
    let run = bench(&["--url", &server.url()]);
    assert!(run.err.contains("the first request failed: status 401: come back"), "{}", run.err);
}

#[test]
fn what_cannot_be_measured_is_said() {
    let check = |args: &[&str], exit: Exit, expected: &str| {
        let run = bench(args);
        assert!(run.exit == exit && run.err.contains(expected), "{args:?}: {}", run.err);
    };
    // A port that nobody listens on: it was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{address}");
    check(&["--url", &url], Exit::Failed, "nobody listens there");
    check(&["--url", "https://a"], Exit::WrongUsage, "no TLS");
    check(&["--url", &url, "--request-rate", "0"], Exit::WrongUsage, "at least 0.001");
    check(&["--url", &url, "--rounds", "2"], Exit::Failed, "--mode latency only");
    check(&["--url", &url, "--api-key-file", "/no/key"], Exit::Failed, "/no/key");
    check(&["--url", &url, "--goodput", "x=1"], Exit::WrongUsage, "is not ttft");
    let server = FakeServer::start(0, |_| Reply::Whole);
    let expected = "the server has no model 'three', but one, two";
    check(&["--url", &server.url(), "--model", "three"], Exit::Failed, expected);
}

#[test]
fn the_key_of_a_file_is_sent_and_goodput_counted() {
    let server = FakeServer::start(0, |_| Reply::Whole);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "key-1\n").unwrap();
    let path = file.path().to_str().unwrap();
    let args = ["--api-key-file", path, "--requests", "2", "--goodput", "ttft=0.000001"];
    let found = report(&server, &[&SMALL[..], &args].concat(), Exit::Done);
    let heads = server.state.heads.lock().unwrap();
    assert!(heads.len() == 4, "{heads:?}");
    assert!(heads.iter().all(|head| head.contains("authorization: Bearer key-1\r\n")), "{heads:?}");
    assert_eq!(found["goodput_requests_per_s"], 0.0);
}

/// The real server on the null engine: every token arrives, and is counted as the engine counts it.
#[test]
fn our_own_server_is_measured() {
    let mut setup = Setup::default();
    setup.server.keys = Keys::parse("bench:a-key-that-is-long-enough-0123456789").unwrap();
    let server = setup.start();
    let url = format!("http://{}", server.address());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "bench:a-key-that-is-long-enough-0123456789\n").unwrap();
    let key = file.path().to_str().unwrap();
    let found = |args: &[&str]| -> Value {
        let common = ["--url", &url, "--api-key-file", key, "--json", "--vocab-size", "250"];
        let run = bench(&[&common[..], args].concat());
        assert_eq!(run.exit, Exit::Done, "{}{}", run.out, run.err);
        serde_json::from_str(&run.out).unwrap()
    };
    let lengths = ["--prompt-tokens", "40", "--max-tokens", "30", "--requests", "40"];
    let closed = found(&[&lengths[..], &["--concurrency", "8,32"]].concat());
    let open = found(&[&lengths[..], &["--request-rate", "inf,500"]].concat());
    for point in [&closed, &open].iter().flat_map(|report| report["points"].as_array().unwrap()) {
        let keys = ["completed_requests", "failed_requests", "total_prompt_tokens"];
        assert_eq!(keys.map(|key| count(point, key)), [40, 0, 1600], "{point}");
        assert_eq!(count(point, "total_output_tokens"), 1200);
    }
    assert_eq!(closed["model"], MODEL);
    let chats = found(&[&lengths[..], &["--endpoint", "chat", "--concurrency", "4"]].concat());
    assert_eq!((count(&chats, "failed_requests"), count(&chats, "total_output_tokens")), (0, 1200));
    // The template's tokens come on top of the words.
    assert!(count(&chats, "total_prompt_tokens") > 1600, "{chats}");
    let run = bench(&["--url", &url]);
    assert!(run.exit == Exit::Failed && run.err.contains("/v1/models: status 401"), "{}", run.err);
}
