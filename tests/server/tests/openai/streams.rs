//! Streams say what answers in one piece say, and end when the client goes.

use std::time::Instant;

use bespoke_server_tests::{Client, LONG};
use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, chat, completion, events, post, served};

/// Contents of the choices of a stream.
fn contents(events: &[Value], num: usize) -> Vec<String> {
    let mut contents = vec![String::new(); num];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let text = choice["delta"]["content"].as_str().or(choice["text"].as_str());
        contents[choice["index"].as_u64().unwrap() as usize].push_str(text.unwrap_or_default());
    }
    contents
}

#[test]
fn a_stream_says_what_one_piece_says() {
    let (_server, client) = served();
    for fields in [
        json!({"max_tokens": 200, "temperature": 0}),
        json!({"max_tokens": 200, "temperature": 0, "ignore_eos": true, "n": 1}),
        json!({"max_tokens": 50, "seed": 7, "n": 8, "ignore_eos": true}),
        json!({"max_tokens": 50, "seed": 8, "n": 2, "logprobs": true, "top_logprobs": 1}),
        json!({"max_tokens": 300, "seed": 9, "stop": ["a", "\u{e9}", "xyz"]}),
    ] {
        let mut body = chat(fields);
        let whole = post(&client, CHAT, &body);
        body["stream_options"] = json!({"include_usage": true});
        let events = events(&client, CHAT, &body);
        let choices = whole["choices"].as_array().unwrap();
        let expect: Vec<&str> =
            choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap()).collect();
        assert_eq!(contents(&events, choices.len()), expect, "{body}");
        let (last, others) = events.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        let mut usage = whole["usage"].clone();
        usage["prompt_tokens_details"] = last["usage"]["prompt_tokens_details"].clone();
        assert_eq!(last["usage"], usage);
        assert!(others.iter().all(|event| event["usage"].is_null()), "{body}");
        check_choices(others, choices);
    }
}

/// The first chunk of a choice has its role, the last its finish reason, and all of them together
/// its log-probabilities.
fn check_choices(events: &[Value], choices: &[Value]) {
    for (idx, expect) in choices.iter().enumerate() {
        let own: Vec<&Value> = events
            .iter()
            .flat_map(|event| event["choices"].as_array().unwrap())
            .filter(|choice| choice["index"] == idx)
            .collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert!(own[1..].iter().all(|choice| choice["delta"].get("role").is_none()));
        let (last, others) = own.split_last().unwrap();
        assert_eq!(last["finish_reason"], expect["finish_reason"]);
        assert!(others.iter().all(|choice| choice["finish_reason"].is_null()));
        let tokens = |choice: &&Value| choice["logprobs"]["content"].as_array().cloned();
        let logprobs: Vec<Value> = own.iter().filter_map(tokens).flatten().collect();
        let expect = expect["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        assert_eq!(logprobs, expect);
    }
}

#[test]
fn completions_stream_alike() {
    let (_server, client) = served();
    for fields in [
        json!({"max_tokens": 100, "temperature": 0}),
        json!({"prompt": ["a", "b", "c"], "n": 2, "seed": 1, "max_tokens": 30, "logprobs": 1}),
    ] {
        let body = completion(fields);
        let whole = post(&client, COMPLETIONS, &body);
        let choices = whole["choices"].as_array().unwrap();
        let expect: Vec<&str> =
            choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        let events = events(&client, COMPLETIONS, &body);
        assert_eq!(contents(&events, choices.len()), expect);
        assert!(events.iter().all(|event| event.get("usage").is_none()));
    }
}

/// The number behind `name` in the metrics.
fn metric(client: &Client, name: &str) -> u64 {
    let text = client.get("/metrics").text();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[test]
fn a_client_that_goes_ends_its_request() {
    let (_server, client) = served();
    let long = json!({"max_tokens": 4000, "ignore_eos": true, "n": 8});
    let streamed = json!({"stream": true});
    for (path, body, endpoint) in [
        (CHAT, chat(long.clone()), "chat"),
        (CHAT, super::with(chat(long.clone()), streamed.clone()), "chat"),
        (COMPLETIONS, super::with(completion(long), streamed), "completions"),
    ] {
        let name =
            format!("bespoke_requests_total{{endpoint=\"{endpoint}\",outcome=\"disconnected\"}}");
        let before = metric(&client, &name);
        let text = body.to_string();
        let headers = [("content-type", "application/json")];
        let head = client.head("POST", path, &headers, text.len());
        let mut stream = client.connect();
        std::io::Write::write_all(&mut stream, &[head.as_bytes(), text.as_bytes()].concat())
            .unwrap();
        let start = Instant::now();
        while metric(&client, "bespoke_engine_running") == 0 {
            assert!(start.elapsed() < LONG, "the request does not run");
        }
        drop(stream);
        while metric(&client, &name) == before || metric(&client, "bespoke_engine_running") > 0 {
            assert!(start.elapsed() < LONG, "the request goes on");
        }
    }
}
