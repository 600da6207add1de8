//! Two tenants: nothing of the one ever shows up at the other.

use bespoke::backend::null::next_token;
use bespoke::server::{Keys, Server};
use bespoke_server_tests::client::Client;
use bespoke_server_tests::{END, MODEL, Setup, VOCAB, client, metrics, tokenizer};
use serde_json::{Value, json};

const KEYS: [&str; 2] = ["first-key-0123456789", "second-key-0123456789"];
const CANARY: &str = "axolotl-Meridian-2291";
const NUM_ROUNDS: u64 = 300;

fn server() -> Server {
    let mut setup = Setup::default();
    // Few pages: they change hands all the time.
    setup.engine.num_pages = Some(48);
    setup.engine.max_context = Some(512);
    let keys = format!("one:{}\ntwo:{}\n", KEYS[0], KEYS[1]);
    setup.server.keys = Keys::parse(&keys).expect("two sound keys");
    setup.start()
}

/// A prompt of three pages that is a tenant's own, or everybody's.
fn prompt(number: u64) -> Vec<u32> {
    (0..48).map(|idx| ((number * 7919 + idx * 104_729) % 256) as u32).collect()
}

/// The text that follows, and the tokens of the prompt that were found.
fn complete(client: &Client, prompt: &[u32]) -> (Value, u64) {
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0});
    let answer = client.post("/v1/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    (answer["choices"][0]["text"].clone(), cached.expect("a count"))
}

fn expected(prompt: &[u32]) -> String {
    let mut history = prompt.to_vec();
    while history.len() < prompt.len() + 8 {
        match next_token(&history, VOCAB) {
            END => break,
            token => history.push(token),
        }
    }
    tokenizer().decode(&history[prompt.len()..]).expect("tokens of the tokenizer")
}

#[test]
fn pages_of_one_tenant_are_never_found_by_another() {
    let server = server();
    let tenants = KEYS.map(|key| client(&server).with_key(key));
    for round in 0..NUM_ROUNDS {
        let prompt = prompt(round);
        let (one, two) = (round as usize % 2, (round as usize + 1) % 2);
        // The first to ask has it in the cache then; for the other it is as new.
        let (text, cached) = complete(&tenants[one], &prompt);
        assert_eq!((text, cached), (expected(&prompt).into(), 0), "round {round}");
        let (_, cached) = complete(&tenants[one], &prompt);
        assert!(cached > 0, "round {round}: a repeated prompt is found");
        let (text, cached) = complete(&tenants[two], &prompt);
        assert_eq!((text, cached), (expected(&prompt).into(), 0), "round {round}");
    }
}

#[test]
fn sessions_of_one_tenant_do_not_exist_for_another() {
    let server = server();
    let [one, two] = KEYS.map(|key| client(&server).with_key(key));
    let say = |prompt: &str| {
        json!({"prompt": prompt, "session_id": CANARY, "interactive_mode": true,
            "request_output_len": 4, "temperature": 0})
    };
    let secret = one.post("/v1/chat/interactive", &say("What the first says."));
    assert_eq!(secret.status, 200, "{}", secret.text());
    assert!(one.get("/v1/sessions").text().contains(CANARY));
    assert!(!two.get("/v1/sessions").text().contains(CANARY));
    let path = format!("/v1/sessions/{CANARY}");
    let rewind = json!({"num_tokens": 0});
    for answer in [
        two.get(&path),
        two.delete(&path),
        two.post(&format!("{path}/rewind"), &rewind),
        two.post(&format!("{path}/branch"), &json!({})),
    ] {
        assert_eq!(answer.status, 404, "{}", answer.text());
    }
    // The same id is another session, which begins empty.
    let other = two.post("/v1/chat/interactive", &say("Hi"));
    assert_eq!(other.json()["history_tokens"], 0, "{}", other.text());
    let again = one.post("/v1/chat/interactive", &say("And again."));
    assert!(again.json()["history_tokens"].as_u64() > Some(0), "{}", again.text());
    // Metrics name neither sessions nor keys nor what was said.
    let text = server.app().metrics.encode();
    metrics::parse(&text);
    for secret in [CANARY, KEYS[0], KEYS[1], "What the first says"] {
        assert!(!text.contains(secret), "{secret} is in the metrics");
    }
}
