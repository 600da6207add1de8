//! Clients that say nothing, take nothing or go away, and a system without room for more of them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use bespoke::backend::null::next_token;
use bespoke::server::{Server, ServerOptions};
use bespoke_server_tests::process::ServerProcess;
use bespoke_server_tests::{Client, MODEL, Reader, Setup, VOCAB, client, metrics, wait_until};
use serde_json::{Value, json};

/// Time-outs that tests can wait for.
const SHORT: Duration = Duration::from_millis(200);

fn start(change: impl FnOnce(&mut ServerOptions)) -> (Server, Client) {
    let mut setup = Setup::default();
    change(&mut setup.server);
    let server = setup.start();
    let client = client(&server);
    (server, client)
}

/// A counter of the server, 0 where it has not moved yet.
fn metric(server: &Server, name: &str) -> f64 {
    metrics::parse(&server.app().metrics.encode()).get(name).copied().unwrap_or(0.0)
}

fn ended(reason: &str) -> String {
    format!("bespoke_connection_ends_total{{reason=\"{reason}\"}}")
}

fn outcome(name: &str) -> String {
    format!("bespoke_requests_total{{endpoint=\"completions\",outcome=\"{name}\"}}")
}

/// Whether the server closes the connection, without a word.
fn is_closed(mut stream: TcpStream) -> bool {
    match stream.read(&mut [0; 64]) {
        Ok(num) => num == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

fn completion(max_tokens: usize) -> Value {
    json!({
        "model": MODEL, "prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": true,
        "temperature": 0, "stream": true,
    })
}

/// Every page is free or kept for later, and nobody waits or runs.
fn wait_until_idle(server: &Server) {
    wait_until("all pages are given back", || {
        let stats = server.app().handle.stats();
        let pages = stats.status.pages;
        stats.num_waiting + stats.num_running == 0 && pages.active == 0
    });
}

#[test]
fn silent_and_dribbling_clients_are_given_up() {
    let (server, client) = start(|options| {
        options.timeouts.header = SHORT;
        options.timeouts.keep_alive = SHORT * 2;
    });
    assert!(is_closed(client.connect()));
    assert_eq!(metric(&server, &ended("header_timeout")), 1.0);
    // Bytes do not buy time.
    let mut dribbling = client.connect();
    let mut reader = dribbling.try_clone().unwrap();
    let (done, is_done) = channel::<()>();
    let dribble = thread::spawn(move || {
        for byte in b"GET /live HTTP/1.1\r\nx-long: ".iter().chain(std::iter::repeat(&b'x')) {
            if dribbling.write_all(&[*byte]).is_err()
                || is_done.recv_timeout(Duration::from_millis(5)).is_ok()
            {
                break;
            }
        }
    });
    assert!(matches!(reader.read(&mut [0; 64]), Ok(0) | Err(_)));
    let _ = done.send(());
    dribble.join().unwrap();
    assert_eq!(metric(&server, &ended("header_timeout")), 2.0);
    // After an answer, another time counts.
    let mut stream = client.connect();
    let head = client.head("GET", "/live", &[("connection", "keep-alive")], 0);
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = Reader::new(stream).unwrap();
    assert_eq!(answer.status, 200);
    while answer.next_piece().unwrap().is_some() {}
    assert!(is_closed(answer.into_stream()));
    assert_eq!(metric(&server, &ended("keep_alive_timeout")), 1.0);
    wait_until("no connection is left", || metric(&server, "bespoke_connections") == 0.0);
}

#[test]
fn connections_are_kept_and_pipelined_requests_answered() {
    let (_server, client) = start(|_| ());
    let mut stream = client.connect();
    let keep = client.head("GET", "/live", &[("connection", "keep-alive")], 0);
    let last = client.head("GET", "/ready", &[], 0);
    stream.write_all(format!("{keep}{keep}{last}").as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 3, "{text}");
}

#[test]
fn a_body_that_does_not_come_is_not_waited_for() {
    let (_server, client) = start(|options| options.timeouts.body = SHORT);
    let headers = [("content-type", "application/json"), ("content-length", "100")];
    let head = client.head("POST", "/v1/completions", &headers, 0);
    let answer = client.send(format!("{head}{{").as_bytes()).into_answer();
    assert_eq!((answer.status, &answer.error()["code"]), (408, &json!("request_timeout")));
}

#[test]
fn a_reader_that_takes_nothing_is_given_up() {
    let (server, client) = start(|options| options.timeouts.write = SHORT);
    let reader = stalled_reader(&server, &client);
    wait_until("the reader is given up", || metric(&server, &ended("write_timeout")) == 1.0);
    wait_until("the request has its outcome", || metric(&server, &outcome("slow_reader")) == 1.0);
    wait_until_idle(&server);
    wait_until("it is closed", || metric(&server, "bespoke_connections") == 0.0);
    drop(reader);
    assert_eq!(client.get("/ready").status, 200);
}

/// Has asked for more than the system holds for it, and reads nothing.
fn stalled_reader(server: &Server, client: &Client) -> TcpStream {
    let mut body = completion(4000);
    body["logprobs"] = 5.into();
    let body = body.to_string();
    let headers = [("content-type", "application/json")];
    let head = client.head("POST", "/v1/completions", &headers, body.len());
    let mut stream = narrow(server.address());
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    stream
}

/// A connection for which the system holds a few kilobytes at most, where it would hold megabytes.
fn narrow(address: SocketAddr) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let stream = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(address).await.unwrap().into_std().unwrap()
    });
    stream.set_nonblocking(false).unwrap();
    stream
}

/// How a client goes away.
#[derive(Clone, Copy, Debug)]
enum Leave {
    /// In good order, with everything read.
    Close,
    /// With bytes unread, so that the system resets the connection.
    Reset,
    /// It only says that it will say nothing more.
    HalfClose,
}

#[test]
fn a_client_that_goes_away_gives_its_pages_back() {
    let mut setup = Setup::default();
    setup.engine.max_sequences = 2;
    let server = setup.start();
    let client = client(&server);
    let mut num_gone = 0.0;
    for leave in [Leave::Close, Leave::Reset, Leave::HalfClose] {
        for num_events in [0, 1, 20] {
            let mut reader = client.stream("/v1/completions", &completion(4000));
            for _ in 0..num_events {
                assert!(reader.next_event().unwrap().is_some());
            }
            let stream = reader.into_stream();
            match leave {
                Leave::Close => {
                    stream.set_nonblocking(true).unwrap();
                    while (&stream).read(&mut [0; 4096]).is_ok_and(|num| num > 0) {}
                }
                Leave::Reset => wait_until("there is something to read", || {
                    stream.peek(&mut [0]).is_ok_and(|num| num > 0)
                }),
                Leave::HalfClose => stream.shutdown(Shutdown::Write).unwrap(),
            }
            let held = matches!(leave, Leave::HalfClose).then_some(stream);
            num_gone += 1.0;
            wait_until(&format!("{leave:?} after {num_events} is noticed"), || {
                metric(&server, &outcome("disconnected")) == num_gone
            });
            drop(held);
            wait_until_idle(&server);
        }
    }
    assert_eq!(metric(&server, "bespoke_engine_cancelled_total"), num_gone);
    assert_eq!(metric(&server, &outcome("finished")), 0.0);
}

#[test]
fn a_client_that_goes_away_before_its_first_token_is_called_off() {
    let (server, client) = start(|_| ());
    let (release, held) = channel::<()>();
    let paused = pause(&server, held);
    let body = completion(100).to_string();
    let headers = [("content-type", "application/json")];
    let head = client.head("POST", "/v1/completions", &headers, body.len());
    let mut stream = client.connect();
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    wait_until("the request waits", || server.app().handle.stats().num_waiting == 1);
    // And one that has not even sent its body.
    let mut half = client.connect();
    half.write_all(&head.as_bytes()[..head.len()]).unwrap();
    drop((stream, half));
    wait_until("its end is counted", || metric(&server, &outcome("disconnected")) == 1.0);
    drop(release);
    paused.join().unwrap();
    wait_until_idle(&server);
    assert_eq!(metric(&server, "bespoke_engine_cancelled_total"), 1.0);
    assert_eq!(metric(&server, "bespoke_output_tokens_total"), 0.0);
}

/// Holds the engine between two steps until the sender is gone.
fn pause(server: &Server, held: std::sync::mpsc::Receiver<()>) -> thread::JoinHandle<()> {
    let handle = server.app().handle.clone();
    let (started, has_started): (Sender<()>, _) = channel();
    let thread = thread::spawn(move || {
        let wait = move |_: &mut bespoke::engine::Engine| {
            let _ = started.send(());
            let _ = held.recv();
        };
        handle.call(wait).expect("the engine runs");
    });
    has_started.recv().expect("the engine takes the call");
    thread
}

#[test]
fn an_engine_that_stands_still_keeps_its_clients_and_a_bounded_queue() {
    let mut setup = Setup::default();
    setup.limits.waiting_requests_max = 4;
    let server = setup.start();
    let client = client(&server);
    let (release, held) = channel::<()>();
    let paused = pause(&server, held);
    let ask = |client: Client| {
        let mut body = completion(5);
        body["stream"] = false.into();
        thread::spawn(move || client.post("/v1/completions", &body))
    };
    let waiting: Vec<_> = (0..4).map(|_| ask(client.clone())).collect();
    wait_until("four wait", || server.app().handle.stats().num_waiting == 4);
    let refused = ask(client.clone()).join().unwrap();
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("overloaded")));
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=30).contains(&seconds), "{seconds}");
    drop(release);
    paused.join().unwrap();
    for answer in waiting {
        assert_eq!(answer.join().unwrap().status, 200);
    }
    assert_eq!(metric(&server, &outcome("overloaded")), 1.0);
    assert_eq!(metric(&server, &outcome("finished")), 4.0);
    assert_eq!(metric(&server, &outcome("disconnected")), 0.0);
}

#[test]
fn connections_are_bounded_in_all_and_by_client() {
    for (all, of_client, status, reason) in
        [(3, 64, 503, "too_many"), (64, 3, 429, "too_many_of_client")]
    {
        let (server, client) = start(|options| {
            options.limits.connections_max = all;
            options.limits.connections_per_client_max = of_client;
        });
        let held: Vec<TcpStream> = (0..3).map(|_| client.connect()).collect();
        wait_until("three are open", || metric(&server, "bespoke_connections") == 3.0);
        let refused = Reader::new(client.connect()).unwrap().into_answer();
        assert_eq!(refused.status, status);
        assert_eq!(refused.header("retry-after"), Some("1"));
        refused.error();
        assert_eq!(metric(&server, &ended(reason)), 1.0);
        drop(held);
        wait_until("they are closed", || metric(&server, "bespoke_connections") == 0.0);
        assert_eq!(client.get("/ready").status, 200);
    }
}

/// 1,000 sockets that keep the server waiting, in every way there is, beside clients that behave.
#[test]
fn a_thousand_hostile_sockets_do_no_harm() {
    const NUM_EACH: usize = 317;
    const NUM_STALLED: usize = 49;
    let (server, client) = start(|options| {
        options.limits.connections_max = 2048;
        options.limits.connections_per_client_max = 2048;
        options.timeouts.header = Duration::from_secs(2);
        options.timeouts.body = Duration::from_secs(2);
        options.timeouts.write = Duration::from_secs(2);
    });
    let rss_before = bespoke::memory::rss_bytes();
    let json = [("content-type", "application/json"), ("content-length", "1000")];
    let half_body = client.head("POST", "/v1/completions", &json, 0) + "{";
    let mut hostile = Vec::new();
    for _ in 0..NUM_EACH {
        // Silent.
        hostile.push(client.connect());
        // A head that goes on forever, one byte now and then.
        let mut dribbling = client.connect();
        dribbling.write_all(b"GET /live HTTP/1.1\r\nx: ").unwrap();
        hostile.push(dribbling);
        let mut half = client.connect();
        half.write_all(half_body.as_bytes()).unwrap();
        hostile.push(half);
    }
    // And those who read nothing of a long answer.
    hostile.extend((0..NUM_STALLED).map(|_| stalled_reader(&server, &client)));
    let rss_during = bespoke::memory::rss_bytes();
    let expected = good_text();
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                for _ in 0..8 {
                    assert_eq!(good_client(&client), expected);
                }
            });
        }
        for idx in 0..NUM_EACH {
            // Those that were given up already cannot take it.
            let _ = (&hostile[idx * 3 + 1]).write_all(b"x");
        }
    });
    if let (Some(before), Some(during)) = (rss_before, rss_during) {
        let per_socket = during.saturating_sub(before) / hostile.len() as u64;
        assert!(per_socket <= 64 << 10, "{per_socket} bytes of memory for each hostile socket");
    }
    wait_until("silent and dribbling ones are given up", || {
        metric(&server, &ended("header_timeout")) == 2.0 * NUM_EACH as f64
    });
    wait_until("stalled ones are given up", || {
        metric(&server, &ended("write_timeout")) == NUM_STALLED as f64
    });
    drop(hostile);
    wait_until("no connection is left", || metric(&server, "bespoke_connections") == 0.0);
    wait_until_idle(&server);
    assert_eq!(good_client(&client), expected);
}

const GOOD_TOKENS: usize = 20;

/// What a good client has to be told, by the null backend's oracle.
fn good_text() -> String {
    let mut history = vec![1, 2, 3];
    (0..GOOD_TOKENS).for_each(|_| history.push(next_token(&history, VOCAB)));
    bespoke_server_tests::tokenizer().decode(&history[3..]).unwrap()
}

fn good_client(client: &Client) -> String {
    let mut reader = client.stream("/v1/completions", &completion(GOOD_TOKENS));
    assert_eq!(reader.status, 200);
    let mut text = String::new();
    while let Some(event) = reader.next_event().unwrap() {
        if event != "[DONE]" {
            let event: Value = serde_json::from_str(&event).unwrap();
            text += event["choices"][0]["text"].as_str().unwrap_or_default();
        }
    }
    text
}

/// The system has no file descriptors left: the server rests, says so, and goes on later.
#[test]
fn a_server_without_file_descriptors_waits_for_some() {
    let server = ServerProcess::start_after(
        "ulimit -n 64",
        &["--max-connections", "1000", "--max-connections-per-client", "1000"],
    );
    let client = server.client();
    let held: Vec<TcpStream> = (0..100).map(|_| client.connect()).collect();
    wait_until("the server has no room", || server.log().contains("cannot accept a connection"));
    drop(held);
    let answer = client.get("/ready");
    assert_eq!(answer.status, 200);
    let samples = metrics::parse(&client.get("/metrics").text());
    let num = samples.get(&ended("no_resources")).copied().unwrap_or(0.0);
    // A loop without rests would have tried a hundred thousand times.
    assert!((1.0..1000.0).contains(&num), "{num}");
}
