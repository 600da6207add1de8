//! What is sent: prompts of exact lengths as token ids, or of about that length as chat messages.

use bytes::Bytes;
use clap::ValueEnum;
use serde::Serialize;

use crate::cli::bench::workload::{Lengths, Workload};
use crate::sampling::{choice_seed, uniform};

/// Where requests go.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Endpoint {
    /// /v1/completions: prompts are token ids, of exactly the lengths asked for
    Completions,
    /// /v1/chat/completions: prompts are words, of about those lengths
    Chat,
}

/// The bodies of a measurement's requests, made one by one when they are sent.
pub(super) struct Bodies {
    pub(super) endpoint: Endpoint,
    /// The server's name of the model.
    pub(super) model: String,
    pub(super) workload: Workload,
}

/// Words that most vocabularies have as one token each, with the space before it.
const WORDS: [&str; 32] = [
    "time", "people", "water", "day", "house", "world", "life", "hand", "part", "place", "work",
    "week", "point", "number", "room", "fact", "money", "night", "book", "story", "city", "name",
    "line", "school", "power", "car", "light", "land", "air", "food", "war", "music",
];

/// The fields that both endpoints have in common.
#[derive(Serialize)]
struct Body<'a, P> {
    model: &'a str,
    #[serde(flatten)]
    prompt: P,
    max_tokens: usize,
    ignore_eos: bool,
    temperature: f32,
    stream: bool,
    stream_options: StreamOptions,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
struct PromptIds {
    prompt: Vec<u32>,
}

#[derive(Serialize)]
struct Messages {
    messages: [Message; 1],
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
}

impl Bodies {
    pub(super) fn endpoint(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Completions => "/v1/completions",
            Endpoint::Chat => "/v1/chat/completions",
        }
    }

    /// The body of request `idx`, and the tokens it asks for.
    pub(super) fn body(&self, idx: usize) -> (Bytes, usize) {
        let Lengths { max_tokens, .. } = self.workload.lengths[idx];
        let json = match self.endpoint {
            Endpoint::Completions => {
                let prompt = self.workload.request(idx).prompt_ids;
                self.json(PromptIds { prompt }, max_tokens)
            }
            Endpoint::Chat => {
                let message = Message { role: "user", content: self.words(idx) };
                self.json(Messages { messages: [message] }, max_tokens)
            }
        };
        (Bytes::from(json), max_tokens)
    }

    fn json(&self, prompt: impl Serialize, max_tokens: usize) -> Vec<u8> {
        let body = Body {
            model: &self.model,
            prompt,
            max_tokens,
            ignore_eos: true,
            temperature: 0.0,
            stream: true,
            stream_options: StreamOptions { include_usage: true },
        };
        serde_json::to_vec(&body).expect("a body is plain data")
    }

    /// As many words as the request's prompt has tokens.
    fn words(&self, idx: usize) -> String {
        let Workload { lengths, seed, num_shared, .. } = &self.workload;
        let word = |place: usize| {
            let stream = if place < *num_shared { 0 } else { idx + 1 };
            let value = uniform(choice_seed(*seed, stream), place as u64);
            WORDS[(value * WORDS.len() as f64) as usize]
        };
        let words: Vec<&str> = (0..lengths[idx].prompt_tokens).map(word).collect();
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::workload::Source;
    use serde_json::{Value, json};

    fn body(endpoint: Endpoint, idx: usize) -> Value {
        let lengths = Source::Fixed(Lengths { prompt_tokens: 5, max_tokens: 7 });
        let lengths = lengths.lengths(3, 1, usize::MAX);
        let workload = Workload { lengths, vocab_size: 50, seed: 1, num_shared: 2 };
        let bodies = Bodies { endpoint, model: "m".to_owned(), workload };
        let (bytes, max_tokens) = bodies.body(idx);
        assert_eq!(max_tokens, 7);
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn prompts_have_the_lengths_that_are_asked_for() {
        let value = body(Endpoint::Completions, 0);
        let ids: Vec<u32> = serde_json::from_value(value["prompt"].clone()).unwrap();
        assert!(ids.len() == 5 && ids.iter().all(|id| *id < 50), "{value}");
        assert_eq!(value["stream_options"], json!({"include_usage": true}));
        let (a, b) = (body(Endpoint::Chat, 0), body(Endpoint::Chat, 1));
        let words = |value: &Value| -> Vec<String> {
            let text = value["messages"][0]["content"].as_str().unwrap();
            text.split(' ').map(str::to_owned).collect()
        };
        assert_eq!((words(&a).len(), &words(&a)[..2]), (5, &words(&b)[..2]));
        assert_ne!(words(&a), words(&b));
        assert_eq!(a["ignore_eos"], true);
    }
}
