//! What is refused says which field is wrong, and why.

use bespoke_server_tests::{Setup, client};
use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, INTERACTIVE, chat, completion, served, with};

struct Case {
    path: &'static str,
    body: Value,
    status: u16,
    /// Of the error; null where it has none.
    param: Value,
    /// A part of the message.
    message: &'static str,
}

fn refused(path: &'static str, body: Value, param: &str, message: &'static str) -> Case {
    Case { path, body, status: 400, param: json!(param), message }
}

fn of_chat(fields: Value, param: &str, message: &'static str) -> Case {
    refused(CHAT, chat(fields), param, message)
}

fn check(cases: Vec<Case>) {
    let (_server, client) = served();
    for Case { path, body, status, param, message } in cases {
        let answer = client.post(path, &body);
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.text());
        let error = answer.error();
        assert_eq!(error["param"], param, "{body}: {error}");
        let text = error["message"].as_str().unwrap();
        assert!(text.contains(message), "{body}: {text}");
    }
}

#[test]
fn fields_that_are_not_there_are_named() {
    let none = |fields: Value, name: &str| of_chat(fields, name, "unknown field");
    check(vec![
        none(json!({"temprature": 1}), "temprature"),
        none(json!({"functions": []}), "functions"),
        none(json!({"audio": {}}), "audio"),
        none(json!({"stream_options": {"x": 1}}), "stream_options.x"),
        none(json!({"messages": [{"role": "user", "content": "a", "x": 1}]}), "messages[0].x"),
        refused(COMPLETIONS, completion(json!({"suffix": "x"})), "suffix", "unknown field"),
        refused(INTERACTIVE, json!({"prompt": "a", "x": 1}), "x", "unknown field"),
        refused(CHAT, json!({"model": "null"}), "messages", "missing field"),
        refused(CHAT, json!({"messages": []}), "model", "missing field"),
    ]);
}

#[test]
fn numbers_have_bounds() {
    let bounds = |name: &'static str, bad: Vec<Value>| {
        let case = move |value: Value| of_chat(json!({name: value}), name, "expected a");
        bad.into_iter().map(case).collect::<Vec<_>>()
    };
    let integers = |min: i64, max: i64| {
        vec![json!(min - 1), json!(max + 1), json!(1.5), json!("1"), json!(u64::MAX), json!(1e30)]
    };
    let numbers = |min: f64, max: f64| vec![json!(min - 0.1), json!(max + 0.1), json!(true)];
    check(
        [
            bounds("n", integers(1, 8)),
            bounds("max_tokens", integers(1, i64::from(i32::MAX))),
            bounds("top_logprobs", integers(0, 20)),
            bounds("top_k", integers(-1, i64::from(i32::MAX))),
            bounds("min_tokens", integers(0, i64::from(i32::MAX))),
            bounds("temperature", numbers(0.0, 2.0)),
            bounds("top_p", numbers(0.0, 1.0)),
            bounds("min_p", numbers(0.0, 1.0)),
            bounds("presence_penalty", numbers(-2.0, 2.0)),
            bounds("frequency_penalty", numbers(-2.0, 2.0)),
            bounds("repetition_penalty", numbers(0.01, 100.0)),
        ]
        .concat(),
    );
}

impl Clone for Case {
    fn clone(&self) -> Case {
        Case { body: self.body.clone(), param: self.param.clone(), ..*self }
    }
}

#[test]
fn values_that_make_no_sense_are_named() {
    let long = "a".repeat(257);
    check(vec![
        of_chat(json!({"messages": []}), "messages", "0 entries"),
        of_chat(json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing field"),
        of_chat(json!({"messages": [{"role": "robot", "content": ""}]}), "messages[0]", "robot"),
        of_chat(json!({"messages": [{"role": "user", "content": 1}]}), "messages[0]", "a string"),
        of_chat(json!({"stop": ["a", "b", "c", "d", "e"]}), "stop", "more than 4"),
        of_chat(json!({"stop": long}), "stop", "257 characters"),
        of_chat(json!({"stop": ""}), "stop", "0 characters"),
        of_chat(json!({"store": true}), "store", "not supported"),
        of_chat(json!({"top_logprobs": 2}), "top_logprobs", "logprobs"),
        of_chat(json!({"stream_options": {"include_usage": true}}), "stream_options", "stream"),
        of_chat(json!({"logit_bias": {"x": 1}}), "logit_bias", "no token id"),
        of_chat(json!({"logit_bias": {"1": 101}}), "logit_bias.1", "from -100 to 100"),
        of_chat(json!({"logit_bias": {"100000": 1}}), "logit_bias", "outside the vocabulary"),
        of_chat(json!({"stop_token_ids": [99999]}), "stop_token_ids", "outside the vocabulary"),
        of_chat(json!({"chat_template_kwargs": {"messages": 1}}), "chat_template_kwargs", "set"),
        of_chat(json!({"tool_choice": "required"}), "tool_choice", "no tools"),
        of_chat(
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools[0].function",
            "cannot name a tool",
        ),
        of_chat(
            json!({"response_format": {"type": "regex", "regex": "("}}),
            "response_format",
            "response_format: ",
        ),
        of_chat(json!({"response_format": {"type": "xml"}}), "response_format", "xml"),
        of_chat(json!({"response_format": {"type": 0}}), "response_format", "must be a string"),
        of_chat(json!({"response_format": {"type": "text", "x": 1}}), "response_format.x", "`x`"),
        of_chat(
            json!({"messages": [{"role": 0, "content": "a"}]}),
            "messages[0]",
            "role is 0, it must be a string",
        ),
        of_chat(
            json!({"response_format": {"type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "object",
                    "unevaluatedProperties": false}}}}),
            "response_format",
            "unevaluatedProperties",
        ),
        refused(COMPLETIONS, completion(json!({"prompt": ""})), "prompt", "empty"),
        refused(COMPLETIONS, completion(json!({"prompt": [[1], []]})), "prompt", "empty"),
        refused(COMPLETIONS, completion(json!({"prompt": [999]})), "prompt", "999"),
        refused(COMPLETIONS, completion(json!({"n": 2, "best_of": 1})), "best_of", "at least n"),
        refused(
            COMPLETIONS,
            completion(json!({"best_of": 2, "stream": true})),
            "best_of",
            "in a stream",
        ),
        refused(
            COMPLETIONS,
            completion(json!({"prompt": vec!["a"; 30], "n": 8})),
            "prompt",
            "at most 64",
        ),
        refused(INTERACTIVE, json!({"prompt": "a", "session_id": -2}), "session_id", "-2"),
        refused(INTERACTIVE, json!({"prompt": "a", "session_id": ".a"}), "session_id", ".a"),
        refused(INTERACTIVE, json!({"prompt": "a", "cancel": true}), "session_id", "needed"),
        refused("/v1/decode", json!({"ids": [1, 9999]}), "ids[1]", "9999"),
    ]);
}

#[test]
fn what_is_not_there_is_404_or_unsupported() {
    let other = json!({"model": "gpt-4o"});
    check(vec![Case {
        path: CHAT,
        body: with(chat(json!({})), other),
        status: 404,
        param: json!("model"),
        message: "gpt-4o",
    }]);
    let (_server, client) = served();
    assert_eq!(client.get("/v1/models/x").error()["code"], "model_not_found");
    for path in ["/v1/models/%ff", "/v1/sessions/%ff", "/v1/sessions/%00", "/v1/sessions/a%2fb"] {
        assert_eq!((client.get(path).error()["code"].clone(), path), (json!("not_found"), path));
    }
    let embeddings = client.post("/v1/embeddings", &json!({"model": "null", "input": "a"}));
    assert_eq!(embeddings.status, 400);
    assert_eq!(embeddings.error()["code"], "unsupported_endpoint");
}

#[test]
fn prompts_beyond_the_context_are_told_so() {
    let (_server, client) = served();
    for (path, body, param) in [
        (
            CHAT,
            chat(json!({"messages": [{"role": "user", "content": "a".repeat(5000)}]})),
            "messages",
        ),
        (COMPLETIONS, completion(json!({"prompt": "a".repeat(4096)})), "prompt"),
        (INTERACTIVE, json!({"prompt": "a".repeat(4096)}), "prompt"),
    ] {
        let error = client.post(path, &body).error();
        assert_eq!(error["code"], "context_length_exceeded", "{path}");
        assert_eq!(error["param"], param, "{path}");
    }
    let fits =
        completion(json!({"prompt": "a".repeat(4095), "max_tokens": 10, "ignore_eos": true}));
    let answer = super::post(&client, COMPLETIONS, &fits);
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn too_much_that_waits_is_429() {
    let mut setup = Setup::default();
    setup.limits.waiting_requests_max = 1;
    let server = setup.start();
    let client = client(&server);
    // A request for each of 8 prompts, of which one may wait.
    let prompts: Vec<String> = (0..8).map(|idx| format!("{idx}{}", "x".repeat(2000))).collect();
    let answer = client.post(COMPLETIONS, &completion(json!({"prompt": prompts})));
    assert_eq!(answer.status, 429, "{}", answer.text());
    assert_eq!(answer.error()["type"], "rate_limit_error");
    assert!(answer.header("retry-after").is_some());
}
