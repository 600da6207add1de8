//! 100,000 requests, 256 at a time: each ends in exactly one way, with exactly its tokens, and
//! nothing is left of them.

use std::collections::BTreeMap;
use std::env;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bespoke::handle::HandleLimits;
use bespoke::server::Server;
use bespoke_server_tests::{MODEL, Setup, VOCAB, metrics};
use serde_json::{Value, json};

use crate::client::{Client, Events};
use crate::oracle::{Expected, chat_prompt};
use crate::process::{alone, memory_bytes, num_files, wait_until};

const NUM_CLIENTS: usize = 256;
const NUM_REQUESTS: usize = 100_000;
const MEMORY_GROWTH_MAX: u64 = 16 << 20;

/// Requests and how they ended, as the clients saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    finished: usize,
    /// The client went away.
    left: usize,
    /// 400, on purpose.
    refused: usize,
    /// 429 or 503.
    overloaded: usize,
    /// Requests that generate nothing.
    managed: usize,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

impl Tally {
    fn sum(&self) -> usize {
        self.finished + self.left + self.refused + self.overloaded + self.managed
    }

    fn add(&mut self, other: Tally) {
        self.finished += other.finished;
        self.left += other.left;
        self.refused += other.refused;
        self.overloaded += other.overloaded;
        self.managed += other.managed;
    }
}

/// One of the clients.
struct User {
    client: Client,
    random: Random,
    tally: Tally,
}

impl User {
    async fn run(mut self, num_left: &AtomicUsize) -> Tally {
        while num_left.load(Ordering::Relaxed) > 0 {
            let before = self.tally.sum();
            match self.random.below(20) {
                0..=8 => self.stream_completion().await,
                9..=14 => self.complete().await,
                15 | 16 => self.chat().await,
                17 => self.leave().await,
                18 => self.ask_nonsense().await,
                _ => self.use_session().await,
            }
            let num = self.tally.sum() - before;
            // NOTE: the last few of all clients may go below zero, hence saturating.
            let _ = num_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(num))
            });
        }
        self.tally
    }

    /// A prompt of some tokens; one of three begins as others do.
    fn prompt(&mut self) -> Vec<u32> {
        let mut prompt = match self.random.below(3) {
            0 => {
                let seed = self.random.below(4) as u64;
                let mut shared = Random(seed);
                (0..40).map(|_| shared.below(VOCAB) as u32).collect()
            }
            _ => Vec::new(),
        };
        let num = 1 + self.random.below(24);
        prompt.extend((0..num).map(|_| self.random.below(VOCAB) as u32));
        prompt
    }

    /// Sends until the server takes it.
    async fn open(&mut self, path: &str, body: &Value) -> Events {
        loop {
            let response = self.client.send("POST", path, body).await;
            match response.status().as_u16() {
                200 => return Events::new(response),
                429 | 503 => {
                    assert!(response.headers().contains_key("retry-after"));
                    self.tally.overloaded += 1;
                    // Sooner than told: this load is meant to be too much.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    self.client.leave();
                }
                status => panic!("{status} for {body}"),
            }
        }
    }

    async fn ask(&mut self, path: &str, body: &Value) -> Value {
        loop {
            match self.client.ask("POST", path, body).await {
                (200, answer) => return answer,
                (429 | 503, _) => {
                    self.tally.overloaded += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                (status, answer) => panic!("{status} {answer} for {body}"),
            }
        }
    }

    async fn stream_completion(&mut self) {
        let (prompt, max_tokens) = (self.prompt(), 1 + self.random.below(12));
        let body = json!({
            "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let events = self.open("/v1/completions", &body).await;
        let streamed = Streamed::read(events, |choice| &choice["text"]).await;
        streamed.check(&Expected::after(&prompt, max_tokens), &body);
        self.tally.finished += 1;
    }

    async fn complete(&mut self) {
        let (prompt, max_tokens) = (self.prompt(), 1 + self.random.below(12));
        let num_choices = 1 + self.random.below(2);
        let body = json!({
            "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "n": num_choices,
        });
        let answer = self.ask("/v1/completions", &body).await;
        let expected = Expected::after(&prompt, max_tokens);
        let choices = answer["choices"].as_array().expect("choices");
        assert_eq!(choices.len(), num_choices, "{body}");
        for choice in choices {
            assert_eq!(choice["text"], expected.text(), "{body}");
            assert_eq!(choice["finish_reason"], expected.finish_reason, "{body}");
        }
        let num_tokens = expected.num_tokens * num_choices;
        assert_eq!(answer["usage"]["completion_tokens"], num_tokens, "{body}");
        self.tally.finished += 1;
    }

    async fn chat(&mut self) {
        let content = format!("Message {} of a client", self.random.below(1000));
        let max_tokens = 1 + self.random.below(12);
        let body = json!({
            "model": MODEL, "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens, "temperature": 0,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let events = self.open("/v1/chat/completions", &body).await;
        let streamed = Streamed::read(events, |choice| &choice["delta"]["content"]).await;
        streamed.check(&Expected::after(&chat_prompt(&content), max_tokens), &body);
        self.tally.finished += 1;
    }

    /// Goes away in the midst of an answer.
    async fn leave(&mut self) {
        let body = json!({
            "model": MODEL, "prompt": self.prompt(), "max_tokens": 2000, "temperature": 0,
            "stream": true, "ignore_eos": true,
        });
        let mut events = self.open("/v1/completions", &body).await;
        for _ in 0..self.random.below(4) {
            events.next().await.expect("an answer of 2,000 tokens");
        }
        self.client.leave();
        self.tally.left += 1;
    }

    async fn ask_nonsense(&mut self) {
        let body = json!({"model": MODEL, "prompt": [1], "temperature": 9});
        let (status, answer) = self.client.ask("POST", "/v1/completions", &body).await;
        assert_eq!(status, 400, "{answer}");
        assert_eq!(answer["error"]["param"], "temperature");
        self.tally.refused += 1;
    }

    /// A session of one turn.
    async fn use_session(&mut self) {
        let content = format!("Turn {}", self.random.below(1000));
        let max_tokens = 1 + self.random.below(12);
        let body = json!({
            "prompt": content, "interactive_mode": true, "request_output_len": max_tokens,
            "temperature": 0,
        });
        let answer = self.ask("/v1/chat/interactive", &body).await;
        let expected = Expected::after(&chat_prompt(&content), max_tokens);
        assert_eq!(answer["text"], expected.text(), "{body}");
        assert_eq!(answer["tokens"], expected.num_tokens, "{body}");
        self.tally.finished += 1;
        let id = answer["session_id"].as_str().expect("an id of the server's own");
        let path = format!("/v1/sessions/{id}");
        loop {
            let (status, answer) = self.client.ask("DELETE", &path, &Value::Null).await;
            // Only so many may wait for the engine between two steps; the others come again.
            if status == 429 {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
            assert!((200..300).contains(&status), "{status} {answer}");
            break;
        }
        self.tally.managed += 1;
    }
}

/// What came of a stream with one choice and its usage.
#[derive(Debug, Default)]
pub(crate) struct Streamed {
    text: String,
    finish_reasons: Vec<String>,
    usages: Vec<Value>,
    num_done: usize,
}

impl Streamed {
    pub(crate) async fn read(mut events: Events, text: fn(&Value) -> &Value) -> Streamed {
        let mut streamed = Streamed::default();
        while let Some(data) = events.next().await {
            if data == "[DONE]" {
                streamed.num_done += 1;
                continue;
            }
            let event: Value = serde_json::from_str(&data).expect("events are JSON");
            assert!(event.get("error").is_none(), "{event}");
            for choice in event["choices"].as_array().expect("choices") {
                streamed.text += text(choice).as_str().unwrap_or_default();
                streamed.finish_reasons.extend(choice["finish_reason"].as_str().map(str::to_owned));
            }
            streamed.usages.extend(event.get("usage").filter(|usage| !usage.is_null()).cloned());
        }
        streamed
    }

    /// Exactly the expected tokens, and exactly one end.
    fn check(&self, expected: &Expected, body: &Value) {
        assert_eq!(self.text, expected.text(), "{body}");
        assert_eq!(self.finish_reasons, [expected.finish_reason], "{body}");
        assert_eq!(self.usages.len(), 1, "{body}");
        assert_eq!(self.usages[0]["completion_tokens"], expected.num_tokens, "{body}");
        assert_eq!(self.num_done, 1, "{body}");
    }
}

/// As many requests as the goal says, or as the environment does.
fn num_requests() -> usize {
    env::var("BESPOKE_LOAD_REQUESTS").map_or(NUM_REQUESTS, |num| num.parse().expect("a number"))
}

fn load_server() -> Server {
    let mut setup = Setup::default();
    setup.engine.max_sequences = 64;
    setup.engine.num_pages = Some(1024);
    // Less than the clients together, so that some are sent away.
    setup.limits = HandleLimits { waiting_requests_max: 160, ..HandleLimits::default() };
    // Clients that leave come back before the server has noticed.
    setup.server.limits.connections_per_client_max = setup.server.limits.connections_max;
    setup.start()
}

/// Reads the metrics now and then: at any time they agree with each other.
async fn scrape(address: SocketAddr, num_left: &AtomicUsize) {
    let mut client = Client::new(address);
    while num_left.load(Ordering::Relaxed) > 0 {
        let (status, text) = client.ask("GET", "/metrics", &Value::Null).await;
        assert_eq!(status, 200);
        check_sums(&metrics::parse(text.as_str().expect("text")));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whatever was accepted waits, runs or has ended.
fn check_sums(samples: &BTreeMap<String, f64>) {
    let get = |name: &str| samples[&format!("bespoke_engine_{name}")];
    let open = get("waiting") + get("running");
    let ended = ["finished", "cancelled", "refused", "died"];
    let ended: f64 = ended.into_iter().map(|name| get(&format!("{name}_total"))).sum();
    assert_eq!(open + ended, get("accepted_total"), "{samples:?}");
}

fn run_clients(address: SocketAddr, num_requests: usize) -> Tally {
    let num_left = AtomicUsize::new(num_requests);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let users = (0..NUM_CLIENTS).map(|idx| User {
            client: Client::new(address),
            random: Random(idx as u64),
            tally: Tally::default(),
        });
        let runs = futures_util::future::join_all(users.map(|user| user.run(&num_left)));
        let (tallies, ()) = futures_util::future::join(runs, scrape(address, &num_left)).await;
        tallies.into_iter().fold(Tally::default(), |mut sum, tally| {
            sum.add(tally);
            sum
        })
    })
}

#[test]
fn a_hundred_thousand_requests_leave_nothing_behind() {
    let _alone = alone();
    let num_requests = num_requests();
    let server = load_server();
    let num_files_before = num_files();
    let mut tally = run_clients(server.address(), num_requests / 10);
    let memory_before = memory_bytes();
    tally.add(run_clients(server.address(), num_requests - num_requests / 10));
    assert!(tally.sum() >= num_requests, "{tally:?}");
    println!("{tally:?}");
    let handle = &server.app().handle;
    wait_until("requests still run", || {
        let stats = handle.stats();
        stats.num_running == 0 && stats.num_waiting == 0
    });
    wait_until("file descriptors stay open", || num_files() <= num_files_before);
    let growth = memory_bytes().saturating_sub(memory_before);
    assert!(growth <= MEMORY_GROWTH_MAX, "memory grew by {growth} bytes");
    let (status, check) =
        handle.call(|engine| (engine.status(), engine.check())).expect("the engine runs");
    assert_eq!(check, Ok(()));
    assert_eq!(status.pages.active, 0, "{status:?}");
    assert_eq!(status.num_sessions, 0, "{status:?}");
    check_outcomes(&metrics::parse(&server.app().metrics.encode()), tally);
}

/// The server counted what the clients saw.
fn check_outcomes(samples: &BTreeMap<String, f64>, tally: Tally) {
    check_sums(samples);
    let outcome = |name: &str| -> usize {
        let label = format!("outcome=\"{name}\"");
        let of = |(sample, value): (&String, &f64)| {
            (sample.starts_with("bespoke_requests_total") && sample.contains(&label))
                .then_some(*value)
        };
        samples.iter().filter_map(of).sum::<f64>() as usize
    };
    assert_eq!(samples["bespoke_requests_open"], 0.0);
    assert_eq!(outcome("overloaded"), tally.overloaded);
    assert!(outcome("disconnected") <= tally.left, "{tally:?}");
    // Who leaves after the last token has not left.
    assert_eq!(outcome("finished") + outcome("disconnected"), tally.finished + tally.left);
    for never in ["slow_reader", "timed_out", "failed", "died", "drained", "busy"] {
        assert_eq!(outcome(never), 0, "{never}");
    }
    assert_eq!(samples["bespoke_handler_panics_total"], 0.0);
}
