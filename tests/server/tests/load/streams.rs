//! 256 streams at once: every token is there, once, in its place.

use std::sync::Arc;

use bespoke::handle::HandleLimits;
use bespoke_server_tests::{MODEL, Setup};
use serde_json::{Value, json};
use tokio::sync::Barrier;

use crate::client::{Client, Events};
use crate::oracle::{Expected, chat_prompt};
use crate::process::alone;

const NUM_STREAMS: usize = 256;
const MAX_TOKENS: usize = 64;

/// Reads one stream, waiting for all others once it has begun.
async fn read(mut client: Client, idx: usize, all: Arc<Barrier>) {
    let content = "x".repeat(1 + idx) + &idx.to_string();
    let body = json!({
        "model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": MAX_TOKENS, "stream": true, "logprobs": true,
    });
    let mut events = Events::new(client.send("POST", "/v1/chat/completions", &body).await);
    let (mut tokens, mut finish_reasons, mut is_first) = (Vec::new(), Vec::new(), true);
    while let Some(data) = events.next().await {
        if std::mem::take(&mut is_first) {
            all.wait().await;
        }
        if data == "[DONE]" {
            continue;
        }
        let event: Value = serde_json::from_str(&data).expect("events are JSON");
        let choice = &event["choices"][0];
        finish_reasons.extend(choice["finish_reason"].as_str().map(str::to_owned));
        for entry in choice["logprobs"]["content"].as_array().into_iter().flatten() {
            // Every token of the fixture's tokenizer that is no control token is one byte.
            tokens.extend(entry["bytes"].as_array().into_iter().flatten().map(byte));
        }
    }
    let expected = Expected::after(&chat_prompt(&content), MAX_TOKENS);
    assert_eq!(tokens, without_control_tokens(&expected.tokens), "stream {idx}");
    assert_eq!(finish_reasons, [expected.finish_reason], "stream {idx}");
}

fn byte(value: &Value) -> u32 {
    value.as_u64().expect("a byte") as u32
}

/// Control tokens have no bytes in an answer.
fn without_control_tokens(tokens: &[u32]) -> Vec<u32> {
    tokens.iter().copied().filter(|token| *token < 256).collect()
}

#[test]
fn streams_at_once_have_exactly_their_tokens() {
    let _alone = alone();
    let mut setup = Setup::default();
    setup.engine.max_sequences = NUM_STREAMS;
    setup.engine.num_pages = Some(16_384);
    setup.limits = HandleLimits { waiting_requests_max: NUM_STREAMS, ..HandleLimits::default() };
    setup.server.limits.connections_per_client_max = NUM_STREAMS;
    let server = setup.start();
    let all = Arc::new(Barrier::new(NUM_STREAMS));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let reads =
            (0..NUM_STREAMS).map(|idx| read(Client::new(server.address()), idx, Arc::clone(&all)));
        futures_util::future::join_all(reads).await;
    });
}
