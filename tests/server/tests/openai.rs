//! The routes of the API on the null engine, whose tokens are a function of all tokens before them.

mod chat;
mod completions;
mod description;
mod errors;
mod formats;
mod sessions;
mod streams;

use bespoke::server::Server;
use bespoke_server_tests::{Client, MODEL, Setup, client};
use serde_json::{Map, Value, json};

/// A server, and a client of it.
fn served() -> (Server, Client) {
    let server = Setup::default().start();
    let client = client(&server);
    (server, client)
}

/// A request with `fields` besides model and messages.
fn chat(fields: Value) -> Value {
    let message = json!({"role": "user", "content": "Say something."});
    with(json!({"model": MODEL, "messages": [message]}), fields)
}

/// A request with `fields` besides model and prompt.
fn completion(fields: Value) -> Value {
    with(json!({"model": MODEL, "prompt": "Once"}), fields)
}

fn with(mut body: Value, fields: Value) -> Value {
    let object: &mut Map<String, Value> = body.as_object_mut().expect("an object");
    object.extend(fields.as_object().expect("an object").clone());
    body
}

/// The answer to a request that succeeds.
fn post(client: &Client, path: &str, body: &Value) -> Value {
    let answer = client.post(path, body);
    assert_eq!(answer.status, 200, "{body}: {}", answer.text());
    answer.json()
}

/// The events of a stream that succeeds, without the last, which says that it is done.
fn events(client: &Client, path: &str, body: &Value) -> Vec<Value> {
    let mut reader = client.stream(path, &with(body.clone(), json!({"stream": true})));
    assert_eq!(reader.status, 200, "{body}");
    let mut events = Vec::new();
    while let Some(event) = reader.next_event().expect("a whole event") {
        events.push(event);
    }
    if path != INTERACTIVE {
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{body}");
    }
    events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const INTERACTIVE: &str = "/v1/chat/interactive";
