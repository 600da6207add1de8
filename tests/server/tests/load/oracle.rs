//! What the null engine has to answer, computed without an engine.

use bespoke::backend::null::next_token;
use bespoke_server_tests::{END, VOCAB, tokenizer};

/// `<|im_start|>` of the fixture's tokenizer.
const START: u32 = 256;

/// One greedy answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    /// Without the end token.
    pub(crate) tokens: Vec<u32>,
    /// With it.
    pub(crate) num_tokens: usize,
    pub(crate) finish_reason: &'static str,
}

impl Expected {
    /// What follows `history` within `max_tokens`.
    pub(crate) fn after(history: &[u32], max_tokens: usize) -> Expected {
        let mut history = history.to_vec();
        let mut tokens = Vec::new();
        for num_tokens in 1..=max_tokens {
            match next_token(&history, VOCAB) {
                END => return Expected { tokens, num_tokens, finish_reason: "stop" },
                token => tokens.push(token),
            }
            history.extend(tokens.last());
        }
        Expected { tokens, num_tokens: max_tokens, finish_reason: "length" }
    }

    pub(crate) fn text(&self) -> String {
        tokenizer().decode(&self.tokens).expect("tokens of the tokenizer")
    }
}

/// The tokens that the fixture's chat template makes of one message.
pub(crate) fn chat_prompt(content: &str) -> Vec<u32> {
    let mut tokens = vec![START];
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    tokens.extend(bytes("user\n"));
    tokens.extend(bytes(content));
    tokens.extend([END, u32::from(b'\n'), START]);
    tokens.extend(bytes("assistant\n"));
    tokens
}
