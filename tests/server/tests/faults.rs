//! What may go wrong around a request: it alone fails, with a name, and one counter moves by one.

use bespoke::backend::null::{Fault, NullOptions, next_token};
use bespoke::handle::{Event, Submission};
use bespoke::request::Request;
use bespoke::server::Server;
use bespoke_server_tests::client::Client;
use bespoke_server_tests::{LONG, MODEL, Setup, VOCAB, client, metrics, tokenizer};
use serde_json::{Value, json};

/// Does `cause` and asserts that of all counters of trouble exactly these have moved.
fn check_moved(server: &Server, expected: &[(&str, f64)], cause: impl FnOnce(&Client)) {
    let scrape = || metrics::parse(&server.app().metrics.encode());
    let before = scrape();
    cause(&client(server));
    let expected = expected.iter().map(|(sample, change)| ((*sample).to_owned(), *change));
    let expected: metrics::Samples = expected.collect();
    // The last counter moves when the answer is out.
    let deadline = std::time::Instant::now() + LONG;
    while metrics::moved(&before, &scrape()) != expected && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert_eq!(metrics::moved(&before, &scrape()), expected);
}

fn completion(prompt: &[u32]) -> Value {
    json!({"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0})
}

/// A prompt of one token after which `token` comes as the output of index `idx`, and not before.
fn prompt_that_leads_to(token: u32, idx: usize) -> [u32; 2] {
    let leads = |prompt: &[u32; 2]| {
        let mut history = prompt.to_vec();
        let outputs: Vec<u32> = (0..=idx)
            .map(|_| {
                history.push(next_token(&history, VOCAB));
                history[history.len() - 1]
            })
            .collect();
        outputs[..idx].iter().all(|output| *output < 128 && *output != token)
            && outputs[idx] == token
    };
    let pairs = (0..VOCAB as u32).flat_map(|a| (0..VOCAB as u32).map(move |b| [a, b]));
    pairs.filter(|pair| !pair.contains(&token)).find(leads).expect("one of 67,081 prompts")
}

/// A token after which the model has no finite logit.
const POISON: u32 = 7;

fn poisoned_server() -> Server {
    let null = NullOptions {
        vocab_size: VOCAB,
        fault: Some(Fault::NotFinite { token: POISON }),
        ..NullOptions::default()
    };
    Setup { null, ..Setup::default() }.start()
}

const FAILED: &[(&str, f64)] = &[
    ("bespoke_nan_rows_total", 1.0),
    ("bespoke_requests_total{endpoint=\"completions\",outcome=\"failed\"}", 1.0),
];

#[test]
fn logits_that_are_not_finite_fail_their_request() {
    let server = poisoned_server();
    let sampled = json!({"temperature": 1.0, "seed": 1});
    let filtered = json!({"temperature": 0.7, "top_p": 0.5, "top_k": 3, "min_p": 0.1});
    for fields in [json!({}), json!({"logprobs": 3}), sampled, filtered] {
        check_moved(&server, FAILED, |client| {
            let mut body = completion(&[1, POISON]);
            for (name, value) in fields.as_object().expect("fields") {
                body[name] = value.clone();
            }
            let answer = client.post("/v1/completions", &body);
            assert_eq!(answer.status, 500, "{}", answer.text());
            assert_eq!(answer.error()["type"], "server_error");
            assert!(answer.error()["code"].is_string(), "{}", answer.text());
            // The same request would fail again.
            assert_eq!(answer.header("x-should-retry"), Some("false"));
        });
    }
    // And others are served.
    assert_eq!(client(&server).post("/v1/completions", &completion(&[1])).status, 200);
}

#[test]
fn logits_that_are_not_finite_end_a_stream_with_an_error() {
    let server = poisoned_server();
    let prompt = prompt_that_leads_to(POISON, 2);
    check_moved(&server, FAILED, |client| {
        let mut body = completion(&prompt);
        body["stream"] = true.into();
        let mut reader = client.stream("/v1/completions", &body);
        assert_eq!(reader.status, 200);
        let (mut text, mut errors) = (String::new(), 0);
        while let Some(data) = reader.next_event().expect("a stream that ends") {
            assert_eq!(errors, 0, "after the error came {data}");
            let event: Value = match data.as_str() {
                "[DONE]" => continue,
                data => serde_json::from_str(data).expect("JSON"),
            };
            errors += usize::from(event["error"]["message"].is_string());
            text += event["choices"][0]["text"].as_str().unwrap_or_default();
        }
        assert_eq!(errors, 1);
        assert!(!text.is_empty(), "what came before the fault is shown");
    });
}

#[test]
fn a_failed_request_leaves_its_neighbours_alone() {
    let server = poisoned_server();
    let clean = (0..).map(|seed| [seed, 200]).find(|prompt| {
        let mut history = prompt.to_vec();
        (0..8).for_each(|_| history.push(next_token(&history, VOCAB)));
        !history.contains(&POISON)
    });
    let body = completion(&clean.expect("some prompt avoids one token"));
    let alone = client(&server).post("/v1/completions", &body).json()["choices"].clone();
    std::thread::scope(|scope| {
        let good: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| client(&server).post("/v1/completions", &body)))
            .collect();
        for _ in 0..8 {
            scope.spawn(|| client(&server).post("/v1/completions", &completion(&[POISON])));
        }
        for answer in good {
            assert_eq!(answer.join().expect("an answer").json()["choices"], alone);
        }
    });
}

#[test]
fn tokens_that_the_tokenizer_lacks_are_never_sampled() {
    // Models pad their vocabulary; the ids behind the tokenizer's have logits and no text.
    let null = NullOptions { vocab_size: VOCAB + 200, ..NullOptions::default() };
    let server = Setup { null, ..Setup::default() }.start();
    for temperature in [0.0, 1.0] {
        for first in 0..16 {
            let mut request = Request {
                prompt_ids: vec![first],
                max_tokens: 64,
                ignore_eos: true,
                ..Request::default()
            };
            request.sampling.temperature = temperature;
            let Ok(Submission::Accepted(stream)) = server.app().handle.submit(request) else {
                panic!("one request is not too much");
            };
            for event in stream {
                let Event::Output(output) = event else { continue };
                assert!(output.token.is_none_or(|token| (token as usize) < VOCAB), "{output:?}");
            }
        }
    }
}

#[test]
fn what_is_too_large_is_refused_by_its_name() {
    let server = Setup::default().start();
    let refused = &[("bespoke_requests_total{endpoint=\"completions\",outcome=\"refused\"}", 1.0)];
    check_moved(&server, refused, |client| {
        let answer = client.post("/v1/completions", &completion(&[1; 5000]));
        assert_eq!(answer.status, 400);
        assert_eq!(answer.error()["code"], "context_length_exceeded");
        assert_eq!(answer.error()["param"], "prompt");
    });
    let too_large = &[("bespoke_rejections_total{reason=\"too_large\"}", 1.0)];
    check_moved(&server, too_large, |client| {
        let headers = [("content-type", "application/json")];
        let answer = client.request("POST", "/v1/completions", &headers, &[b' '; 3 << 20]);
        assert_eq!((answer.status, &answer.error()["code"]), (413, &json!("request_too_large")));
    });
    check_moved(&server, too_large, |client| {
        let headers: Vec<_> = (0..80).map(|_| ("x-filler", "y")).collect();
        assert_eq!(client.request("GET", "/v1/models", &headers, b"").status, 431);
    });
    check_moved(&server, too_large, |client| {
        let long = "y".repeat(40_000);
        assert_eq!(client.request("GET", "/v1/models", &[("x-filler", &long)], b"").status, 431);
    });
}

#[test]
fn bodies_that_are_no_request_are_refused_and_counted() {
    let server = Setup::default().start();
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    let with = |tail: &str| format!("{{\"model\":\"null\",\"prompt\":\"a\"{tail}}}").into_bytes();
    let bodies = [
        (b"\xff\xfe".to_vec(), "no UTF-8"),
        (with(",\"user\":\"\\ud800\""), "half a surrogate pair"),
        ([&with("")[..10], b"\x80\x80", &with("")[10..]].concat(), "stray bytes"),
        (with(",\"user\":\"a\0b\""), "a bare NUL"),
        (nested(100_000).into_bytes(), "a hundred thousand arrays"),
        (with(&format!(",\"logit_bias\":{}", nested(65))), "65 arrays in a field"),
        (with(",\"seed\":1,\"seed\":2"), "a field twice"),
        (with("")[..20].to_vec(), "half a body"),
        (Vec::new(), "nothing"),
    ];
    for (body, what) in bodies {
        check_moved(&server, &[], |client| {
            let headers = [("content-type", "application/json")];
            let answer = client.request("POST", "/v1/completions", &headers, &body);
            assert_eq!(answer.status, 400, "{what}: {}", answer.text());
            assert_eq!(answer.error()["type"], "invalid_request_error", "{what}");
        });
    }
}

#[test]
fn bytes_that_are_no_text_are_shown_as_the_replacement_character() {
    let server = Setup::default().start();
    let client = client(&server);
    let mut num_broken = 0;
    for first in 0..64 {
        let mut body = completion(&[first, 3]);
        body["max_tokens"] = 24.into();
        let whole = client.post("/v1/completions", &body).json()["choices"][0]["text"].clone();
        let mut history = vec![first, 3];
        while history.len() < 26 {
            match next_token(&history, VOCAB) {
                bespoke_server_tests::END => break,
                token => history.push(token),
            }
        }
        let text = tokenizer().decode(&history[2..]).expect("tokens of the tokenizer");
        assert_eq!(whole, text);
        num_broken += usize::from(text.contains('\u{fffd}'));
        body["stream"] = true.into();
        let mut reader = client.stream("/v1/completions", &body);
        let mut streamed = String::new();
        while let Some(data) = reader.next_event().expect("a stream") {
            let event: Value = serde_json::from_str(&data).unwrap_or_default();
            streamed += event["choices"][0]["text"].as_str().unwrap_or_default();
        }
        assert_eq!(streamed, text);
    }
    assert!(num_broken > 32, "{num_broken} answers had bytes that are no text");
}

#[test]
fn nul_is_a_character_like_others() {
    let server = Setup::default().start();
    let body = json!({
        "model": MODEL, "prompt": "a\u{0}b", "max_tokens": 1, "temperature": 0, "echo": true,
    });
    let answer = client(&server).post("/v1/completions", &body).json();
    let next = next_token(&[97, 0, 98], VOCAB);
    let expected = tokenizer().decode(&[97, 0, 98, next]).expect("tokens of the tokenizer");
    assert_eq!(answer["choices"][0]["text"], expected);
}

fn say(session_id: &str, max_tokens: usize) -> Value {
    json!({
        "prompt": "Hi", "session_id": session_id, "interactive_mode": true, "ignore_eos": true,
        "request_output_len": max_tokens, "temperature": 0,
    })
}

#[test]
fn a_full_store_takes_no_more_sessions() {
    let mut setup = Setup::default();
    setup.engine.max_sessions = 2;
    let server = setup.start();
    let client = client(&server);
    for id in ["one", "two"] {
        assert_eq!(client.post("/v1/chat/interactive", &say(id, 2)).status, 200);
    }
    let answer = client.post("/v1/chat/interactive", &say("three", 2));
    assert!([409, 429, 503].contains(&answer.status), "{}", answer.text());
    answer.error();
    // The first two are as they were.
    let answer = client.post("/v1/chat/interactive", &say("one", 2));
    assert_eq!(answer.status, 200);
    assert!(answer.json()["history_tokens"].as_u64() > Some(0));
    assert!((200..300).contains(&client.delete("/v1/sessions/two").status));
    assert_eq!(client.post("/v1/chat/interactive", &say("three", 2)).status, 200);
}

#[test]
fn a_guessed_session_is_not_found() {
    let server = Setup::default().start();
    let client = client(&server);
    let rewind = json!({"num_tokens": 0});
    for path in ["/v1/sessions/guess", "/v1/sessions/0", "/v1/sessions/%00", "/v1/sessions/.."] {
        for answer in [
            client.get(path),
            client.delete(path),
            client.post(&format!("{path}/rewind"), &rewind),
            client.post(&format!("{path}/branch"), &rewind),
        ] {
            assert_eq!(answer.status, 404, "{path}: {}", answer.text());
            answer.error();
        }
    }
}

#[test]
fn a_session_has_one_writer() {
    let server = Setup::default().start();
    let busy = &[
        ("bespoke_requests_total{endpoint=\"interactive\",outcome=\"busy\"}", 1.0),
        ("bespoke_requests_total{endpoint=\"interactive\",outcome=\"disconnected\"}", 1.0),
        ("bespoke_engine_cancelled_total", 1.0),
    ];
    check_moved(&server, busy, |client| {
        let mut first = say("shared", 4000);
        first["stream"] = true.into();
        let mut reader = client.stream("/v1/chat/interactive", &first);
        reader.next_event().expect("a stream").expect("a first event");
        let answer = client.post("/v1/chat/interactive", &say("shared", 1));
        assert_eq!(answer.status, 409, "{}", answer.text());
        assert_eq!(answer.error()["type"], "conflict_error");
        let rewind = client.post("/v1/sessions/shared/rewind", &json!({"num_tokens": 0}));
        assert_eq!(rewind.status, 409, "{}", rewind.text());
    });
}
