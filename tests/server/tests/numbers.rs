//! Every number of every request at and beyond its bounds, and prompts at theirs: an answer or a
//! refusal that names the field, never anything else.

use bespoke::server::Server;
use bespoke_server_tests::client::{Answer, Client};
use bespoke_server_tests::{MODEL, Setup, client};
use serde_json::{Value, json};

const MAX_CONTEXT: usize = 128;

fn server() -> Server {
    let mut setup = Setup::default();
    setup.engine.max_context = Some(MAX_CONTEXT);
    setup.start()
}

/// A field, and what it may be.
enum Bounds {
    Integer(i64, i64),
    /// As many as there is room for: large numbers may be good or not.
    Count(i64),
    Number(f64, f64),
    /// Greater than the first.
    Above(f64),
}

/// What is put in the place of the number, as JSON text: integers and others.
const INTEGERS: &[i128] = &[
    -1 << 64,
    -1 << 63,
    -1 << 31,
    -101,
    -100,
    -2,
    -1,
    0,
    1,
    2,
    4,
    5,
    8,
    9,
    20,
    21,
    100,
    101,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 53,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
];
const NUMBERS: &[&str] = &["0.5", "-0.5", "1.5", "2.5", "1e-320", "1e30", "1e308"];
const NO_NUMBERS: &[&str] = &[
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    "\"1\"",
    "\"\"",
    "true",
    "[]",
    "[1]",
    "{}",
    "0x1",
    "01",
    "+1",
    "1.",
    ".5",
    "--1",
];

impl Bounds {
    /// Whether an integer is good; `None` where both answers are.
    fn allow_integer(&self, value: i128) -> Option<bool> {
        let number = value as f64;
        match *self {
            Bounds::Integer(min, max) => Some((i128::from(min)..=i128::from(max)).contains(&value)),
            Bounds::Count(min) if value > i128::from(min) + 100 => None,
            Bounds::Count(min) => Some(value >= i128::from(min)),
            Bounds::Number(min, max) => Some((min..=max).contains(&number)),
            Bounds::Above(min) => (number <= min).then_some(false),
        }
    }

    fn allow_number(&self, value: f64) -> Option<bool> {
        match *self {
            Bounds::Integer(..) | Bounds::Count(_) => Some(false),
            Bounds::Number(min, max) => Some((min..=max).contains(&value)),
            Bounds::Above(min) => (value <= min).then_some(false),
        }
    }
}

/// Sends `body` with the text `value` in the place of the field.
fn send(client: &Client, path: &str, body: &Value, field: &str, value: &str) -> Answer {
    let mut body = body.clone();
    body[field] = "\u{0}".into();
    let text = body.to_string().replace("\"\\u0000\"", value);
    client.request("POST", path, &[("content-type", "application/json")], text.as_bytes())
}

fn check(answer: &Answer, is_good: Option<bool>, field: &str, value: &str) {
    let text = answer.text();
    match (is_good, answer.status) {
        (Some(true) | None, 200) => {}
        (Some(false) | None, 400) => {
            let error = answer.error();
            let param = error["param"].as_str().unwrap_or_default();
            let is_syntax =
                error["param"].is_null() && serde_json::from_str::<Value>(value).is_err();
            assert!(param.starts_with(field) || is_syntax, "{field} = {value}: {text}");
        }
        (_, status) => panic!("{field} = {value}: status {status}: {text}"),
    }
}

fn check_fields(path: &str, body: &Value, fields: &[(&str, Bounds)]) {
    let server = server();
    let client = client(&server);
    for (field, bounds) in fields {
        for value in INTEGERS {
            let text = value.to_string();
            let answer = send(&client, path, body, field, &text);
            check(&answer, bounds.allow_integer(*value), field, &text);
        }
        for text in NUMBERS {
            let value = text.parse().expect("a number");
            let answer = send(&client, path, body, field, text);
            check(&answer, bounds.allow_number(value), field, text);
        }
        for text in NO_NUMBERS {
            check(&send(&client, path, body, field, text), Some(false), field, text);
        }
    }
    let stats = server.app().handle.stats();
    assert_eq!((stats.num_running, stats.num_waiting), (0, 0));
}

#[test]
fn numbers_of_chat_completions() {
    let body = json!({
        "model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2,
        "logprobs": true,
    });
    let fields = [
        ("max_tokens", Bounds::Count(1)),
        ("n", Bounds::Integer(1, 8)),
        ("temperature", Bounds::Number(0.0, 2.0)),
        ("top_p", Bounds::Number(0.0, 1.0)),
        ("min_p", Bounds::Number(0.0, 1.0)),
        ("presence_penalty", Bounds::Number(-2.0, 2.0)),
        ("frequency_penalty", Bounds::Number(-2.0, 2.0)),
        ("repetition_penalty", Bounds::Above(0.0)),
        ("top_logprobs", Bounds::Integer(0, 20)),
    ];
    check_fields("/v1/chat/completions", &body, &fields);
}

#[test]
fn numbers_of_completions() {
    let body = json!({"model": MODEL, "prompt": [1, 2], "max_tokens": 2});
    let fields = [
        ("n", Bounds::Integer(1, 8)),
        ("temperature", Bounds::Number(0.0, 2.0)),
        ("top_p", Bounds::Number(0.0, 1.0)),
        ("presence_penalty", Bounds::Number(-2.0, 2.0)),
        ("frequency_penalty", Bounds::Number(-2.0, 2.0)),
        ("repetition_penalty", Bounds::Above(0.0)),
    ];
    check_fields("/v1/completions", &body, &fields);
}

#[test]
fn numbers_of_interactive_requests() {
    let body = json!({"prompt": "Hi", "request_output_len": 2});
    let fields = [
        ("request_output_len", Bounds::Count(1)),
        ("temperature", Bounds::Number(0.0, 2.0)),
        ("top_p", Bounds::Number(0.0, 1.0)),
        ("repetition_penalty", Bounds::Above(0.0)),
    ];
    check_fields("/v1/chat/interactive", &body, &fields);
}

fn complete(client: &Client, prompt: &Value) -> Answer {
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 500, "temperature": 0,
        "ignore_eos": true});
    client.post("/v1/completions", &body)
}

#[test]
fn prompts_at_the_ends_of_what_is_possible() {
    let server = server();
    let client = client(&server);
    for prompt in [json!([5]), json!([256, 257, 258]), json!([257]), json!("a")] {
        let answer = complete(&client, &prompt);
        assert_eq!(answer.status, 200, "{prompt}: {}", answer.text());
        let usage = &answer.json()["usage"];
        assert_eq!(usage["total_tokens"], MAX_CONTEXT, "the context ends the answer: {prompt}");
    }
    let last = complete(&client, &json!(vec![1; MAX_CONTEXT - 1]));
    assert_eq!(last.status, 200, "{}", last.text());
    assert_eq!(last.json()["usage"]["completion_tokens"], 1);
    assert_eq!(last.json()["choices"][0]["finish_reason"], "length");
    for len in [MAX_CONTEXT, MAX_CONTEXT + 1, 10 * MAX_CONTEXT] {
        let answer = complete(&client, &json!(vec![1; len]));
        assert_eq!(answer.status, 400, "{len} tokens: {}", answer.text());
        assert_eq!(answer.error()["code"], "context_length_exceeded");
    }
    for prompt in
        [json!([]), json!([[]]), json!([259]), json!([-1]), json!([1.5]), json!([[1], []])]
    {
        let answer = complete(&client, &prompt);
        assert_eq!(answer.status, 400, "{prompt}: {}", answer.text());
        let param = answer.error()["param"].clone();
        assert!(param.as_str().is_some_and(|param| param.starts_with("prompt")), "{param}");
    }
}

#[test]
fn messages_at_the_ends_of_what_is_possible() {
    let server = server();
    let client = client(&server);
    let chat = |content: &str| {
        let messages = json!([{"role": "user", "content": content}]);
        let body = json!({"model": MODEL, "messages": messages, "max_tokens": 1});
        client.post("/v1/chat/completions", &body)
    };
    let empty = chat("");
    assert_eq!(empty.status, 200, "{}", empty.text());
    let num_tokens = empty.json()["usage"]["prompt_tokens"].as_u64().expect("a count") as usize;
    let room = MAX_CONTEXT - 1 - num_tokens;
    for content in ["a".repeat(room), "<|im_end|>".repeat(room / 10), "\u{0}".repeat(room)] {
        let answer = chat(&content);
        assert_eq!(answer.status, 200, "{content:?}: {}", answer.text());
        let usage = answer.json()["usage"]["prompt_tokens"].clone();
        // A byte is a token, also where it spells a control token.
        assert_eq!(usage, num_tokens + content.len(), "{content:?}");
    }
    let answer = chat(&"a".repeat(room + 1));
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert_eq!(answer.error()["code"], "context_length_exceeded");
}
