//! What a user asks of the engine, and what comes back.

use crate::error::Error;
use crate::sampling::{SamplingParams, TokenLogprob};

/// Names a request within one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A prompt and how to go on from it.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub prompt_ids: Vec<u32>,
    /// Tokens to generate at most; the context may end earlier.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Goes on after the model's end token.
    pub ignore_eos: bool,
    /// Further tokens that end the output.
    pub stop_token_ids: Vec<u32>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestOutput {
    pub id: RequestId,
    /// The token; `None` where the request ended without one.
    pub token: Option<u32>,
    /// Log-probability of the token under the model's own distribution.
    pub logprob: f32,
    /// The likeliest tokens in its place, as many as the request asked for.
    pub top_logprobs: Vec<TokenLogprob>,
    /// Present on the last output of a request.
    pub finish_reason: Option<FinishReason>,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, or the caller's own stop condition.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The model gave no finite logit.
    Failed,
}

/// All that one request generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub output_ids: Vec<u32>,
    /// `[output_ids.len()]`
    pub logprobs: Vec<f32>,
    /// `[output_ids.len()]`
    pub top_logprobs: Vec<Vec<TokenLogprob>>,
    pub finish_reason: FinishReason,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Failed => "failed",
        }
    }
}

impl Request {
    /// Refuses what no engine with this vocabulary and context can serve.
    pub fn check(&self, vocab_size: usize, max_context: usize) -> Result<(), Error> {
        check_prompt(&self.prompt_ids, vocab_size)?;
        if self.prompt_ids.len() >= max_context {
            return Err(Error::Request(format!(
                "the prompt has {} tokens, the context of {max_context} leaves no room for an \
                 answer; shorten the prompt or raise the context",
                self.prompt_ids.len()
            )));
        }
        if self.max_tokens == 0 {
            return Err(Error::Request("max_tokens is 0, it must be at least 1".to_owned()));
        }
        self.sampling.check(vocab_size)
    }
}

/// Refuses an empty prompt and tokens outside the vocabulary.
pub(crate) fn check_prompt(prompt_ids: &[u32], vocab_size: usize) -> Result<(), Error> {
    if prompt_ids.is_empty() {
        return Err(Error::Request("the prompt is empty, it needs at least 1 token".to_owned()));
    }
    match prompt_ids.iter().position(|id| *id as usize >= vocab_size) {
        Some(idx) => Err(Error::Request(format!(
            "token id {} at place {idx} of the prompt is outside the vocabulary of {vocab_size} \
             tokens",
            prompt_ids[idx]
        ))),
        None => Ok(()),
    }
}
