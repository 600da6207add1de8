//! `/v1/chat/interactive` and `/v1/sessions`.

use bespoke::server::Keys;
use bespoke_server_tests::{Client, END, Setup, client};
use serde_json::{Value, json};

use super::{INTERACTIVE, events, post, served, with};

fn turn(session: &str, prompt: &str, fields: Value) -> Value {
    let turn = json!({"prompt": prompt, "session_id": session, "interactive_mode": true,
        "temperature": 0, "request_output_len": 10, "ignore_eos": true});
    with(turn, fields)
}

fn session(client: &Client, id: &str) -> Value {
    let answer = client.get(&format!("/v1/sessions/{id}"));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn a_conversation_goes_on_from_its_tokens() {
    let (server, client) = served();
    let one = post(&client, INTERACTIVE, &turn("a", "Hi", json!({})));
    let first = "user\nHi\nassistant\n".len() + 3;
    assert_eq!(
        [&one["input_tokens"], &one["history_tokens"], &one["tokens"]],
        [&json!(first), &json!(0), &json!(10)]
    );
    assert_eq!(one["finish_reason"], "length");
    assert_eq!(one["session_id"], "a");
    let two = post(&client, INTERACTIVE, &turn("a", "Ho", json!({})));
    // The end of the answer before, the turn, and the beginning of the next answer.
    let second = "\nuser\nHo\nassistant\n".len() + 4;
    assert_eq!(two["history_tokens"], first + 10);
    assert_eq!(two["input_tokens"], second);
    assert_eq!(session(&client, "a")["num_tokens"], first + 10 + second + 10);
    // The same tokens as one prompt give the same answer.
    let tokens = server
        .app()
        .handle
        .call(|engine| {
            let id = engine.sessions().remove(0).id;
            engine.session_tokens(&id).expect("the session").to_vec()
        })
        .unwrap();
    let prompt = &tokens[..first + 10 + second];
    let body = json!({"model": "null", "prompt": prompt, "temperature": 0, "max_tokens": 10,
        "ignore_eos": true});
    let plain = post(&client, super::COMPLETIONS, &body);
    assert_eq!(plain["choices"][0]["text"], two["text"]);
    // Where the answer has its end, the end is not repeated.
    let ended = turn("a", "Hm", json!({"ignore_eos": false, "request_output_len": 4000}));
    let three = post(&client, INTERACTIVE, &ended);
    if three["finish_reason"] == "stop" {
        let four = post(&client, INTERACTIVE, &turn("a", "Ho", json!({})));
        assert_eq!(four["input_tokens"], second - 1, "{END}");
    }
}

#[test]
fn conversations_that_are_not_kept_are_gone() {
    let (_server, client) = served();
    let new = json!({"prompt": "a", "request_output_len": 3});
    let one = post(&client, INTERACTIVE, &new);
    assert_eq!(one["session_id"].as_str().unwrap().len(), 32);
    assert_eq!(client.get("/v1/sessions").json()["data"], json!([]));
    let kept = with(new, json!({"interactive_mode": true, "session_id": -1}));
    let two = post(&client, INTERACTIVE, &kept);
    let list = client.get("/v1/sessions").json();
    assert_eq!(list["data"][0]["id"], two["session_id"]);
    // The last turn of a conversation that was kept.
    let last = json!({"prompt": "b", "session_id": two["session_id"], "request_output_len": 3});
    let three = post(&client, INTERACTIVE, &last);
    assert!(three["history_tokens"].as_u64().unwrap() > 0);
    assert_eq!(client.get("/v1/sessions").json()["data"], json!([]));
}

#[test]
fn a_stream_of_a_turn_says_what_one_piece_says() {
    let (_server, client) = served();
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]);
    let fields = json!({"prompt": messages, "request_output_len": 200, "stop": ["a", "zz"]});
    let whole = post(&client, INTERACTIVE, &turn("a", "", fields.clone()));
    let events = events(&client, INTERACTIVE, &turn("b", "", fields));
    let texts: String = events.iter().filter_map(|event| event["text"].as_str()).collect();
    let mut last = events.last().unwrap().clone();
    last["text"] = json!(texts);
    last["session_id"] = json!("a");
    assert_eq!(last, whole);
    assert!(events.iter().rev().skip(1).all(|event| event["finish_reason"].is_null()));
}

#[test]
fn sessions_are_cut_and_branched() {
    let (_server, client) = served();
    let one = post(&client, INTERACTIVE, &turn("a", "Hi", json!({})));
    let cut = one["input_tokens"].as_u64().unwrap() + 10;
    let two = post(&client, INTERACTIVE, &turn("a", "Ho", json!({})));
    let rewind = |num: Value| client.post("/v1/sessions/a/rewind", &json!({"num_tokens": num}));
    assert_eq!(rewind(json!(cut)).json()["num_tokens"], cut);
    assert_eq!(rewind(json!(cut + 1)).error()["param"], "num_tokens");
    assert_eq!(rewind(json!(-1)).status, 400);
    let branch = |body: Value| client.post("/v1/sessions/a/branch", &body);
    assert_eq!(branch(json!({"to": "b"})).json()["num_tokens"], cut);
    assert_eq!(branch(json!({"to": "b"})).status, 409);
    assert_eq!(branch(json!({"to": "a/b"})).error()["param"], "to");
    assert_eq!(branch(json!({"num_tokens": cut + 1})).error()["param"], "num_tokens");
    let unnamed = branch(json!({"num_tokens": 5})).json();
    assert_eq!((&unnamed["num_tokens"], unnamed["id"].as_str().unwrap().len()), (&json!(5), 32));
    for name in ["a", "b"] {
        let again = post(&client, INTERACTIVE, &turn(name, "Ho", json!({})));
        assert_eq!(again["text"], two["text"], "{name}");
    }
    assert_eq!(client.get("/v1/sessions").json()["data"].as_array().unwrap().len(), 3);
    assert_eq!(
        client.delete("/v1/sessions/a").json(),
        json!({"id": "a", "object": "session.deleted", "deleted": true})
    );
    for answer in [
        client.get("/v1/sessions/a"),
        client.delete("/v1/sessions/a"),
        client.post("/v1/sessions/a/rewind", &json!({"num_tokens": 0})),
        client.post("/v1/sessions/a/branch", &json!({})),
        client.get("/v1/sessions/..x"),
    ] {
        assert_eq!(answer.status, 404, "{}", answer.text());
        answer.error();
    }
}

#[test]
fn a_session_has_one_request_at_a_time_which_can_be_cancelled() {
    let (_server, client) = served();
    let long = json!({"request_output_len": 4000, "stream": true});
    for by_delete in [false, true] {
        let mut stream = client.stream(INTERACTIVE, &turn("a", "Hi", long.clone()));
        assert_eq!(stream.status, 200);
        assert!(stream.next_event().unwrap().is_some());
        let busy = client.post(INTERACTIVE, &turn("a", "Ho", json!({})));
        // NOTE: where the machine is slow, the answer may be over by now.
        if busy.status != 200 {
            assert_eq!(busy.status, 409, "{}", busy.text());
            assert_eq!(busy.error()["type"], "conflict_error");
        }
        match by_delete {
            true => assert_eq!(client.delete("/v1/sessions/a").status, 200),
            false => {
                let cancel = json!({"prompt": "", "session_id": "a", "cancel": true});
                assert_eq!(client.post(INTERACTIVE, &cancel).status, 200);
            }
        }
        let mut last = None;
        while let Some(event) = stream.next_event().unwrap() {
            last = Some(event);
        }
        let last: Value = serde_json::from_str(&last.unwrap()).unwrap();
        assert!(["cancelled", "length"].contains(&last["finish_reason"].as_str().unwrap()));
        let num = client.get("/v1/sessions").json()["data"].as_array().unwrap().len();
        assert_eq!(num, usize::from(!by_delete));
    }
}

#[test]
fn callers_see_their_own_sessions_only() {
    let mut setup = Setup::default();
    setup.server.keys = Keys::parse("a:aaaaaaaaaaaaaaaa\nb:bbbbbbbbbbbbbbbb").unwrap();
    let server = setup.start();
    let own = client(&server).with_key("aaaaaaaaaaaaaaaa");
    let other = client(&server).with_key("bbbbbbbbbbbbbbbb");
    let one = post(&own, INTERACTIVE, &turn("x", "Hi", json!({})));
    assert_eq!(other.get("/v1/sessions").json()["data"], json!([]));
    assert_eq!(other.get("/v1/sessions/x").status, 404);
    assert_eq!(other.delete("/v1/sessions/x").status, 404);
    let theirs = post(&other, INTERACTIVE, &turn("x", "Hi", json!({})));
    assert_eq!((&theirs["history_tokens"], &theirs["text"]), (&json!(0), &one["text"]));
    assert_eq!(own.get("/v1/sessions").json()["data"].as_array().unwrap().len(), 1);
}

#[test]
fn sessions_beyond_those_allowed_are_refused() {
    let mut setup = Setup::default();
    setup.engine.max_sessions = 1;
    let server = setup.start();
    let client = client(&server);
    post(&client, INTERACTIVE, &turn("a", "Hi", json!({})));
    let full = client.post(INTERACTIVE, &turn("b", "Hi", json!({})));
    assert_eq!((full.status, full.error()["code"].as_str()), (409, Some("sessions_full")));
    assert_eq!(client.post("/v1/sessions/a/branch", &json!({})).status, 409);
    post(&client, INTERACTIVE, &turn("a", "Hi", json!({})));
    // What is not kept takes no place.
    post(&client, INTERACTIVE, &turn("b", "Hi", json!({"interactive_mode": false})));
}
