//! What a user asks of the engine, and what comes back.

use crate::error::Error;
use crate::grammar::Grammar;
use crate::kv_cache::Namespace;
use crate::sampling::{SamplingParams, TokenLogprob};
use crate::session::SessionTurn;

/// Names a request within one engine. Ids ascend in the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A prompt and how to go on from it.
#[derive(Clone, Debug)]
pub struct Request {
    /// With a session, the tokens that follow its history.
    pub prompt_ids: Vec<u32>,
    /// Tokens to generate at most; the context may end earlier.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Goes on after the model's end token.
    pub ignore_eos: bool,
    /// Further tokens that end the output.
    pub stop_token_ids: Vec<u32>,
    /// Texts that end the output, also where they begin or end within a token.
    pub stop_strings: Vec<String>,
    /// Answers to generate; each has a seed of its own.
    pub num_choices: usize,
    /// What every answer is held to. A choice follows it from its first output token on; the prompt
    /// and a session's history are no part of it. An answer that it completes ends there, with or
    /// without an end token and whatever `ignore_eos` and `min_tokens` say; before that, end tokens
    /// come only where the grammar lets the answer end. Other stop tokens, stop strings and the
    /// length limit end an answer as ever, complete or not.
    pub grammar: Option<Grammar>,
    /// Whose pages of the KV cache the request may use, and who may use its.
    pub namespace: Namespace,
    /// The session that the request continues.
    pub session: Option<SessionTurn>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestOutput {
    pub id: RequestId,
    /// Which of the request's answers.
    pub choice_idx: usize,
    /// The token; `None` where the answer ended without one.
    pub token: Option<u32>,
    /// Log-probability of the token under the model's own distribution.
    pub logprob: f32,
    /// The likeliest tokens in its place, as many as the request asked for.
    pub top_logprobs: Vec<TokenLogprob>,
    /// Leading tokens of the prompt that were found in the KV cache.
    pub num_cached: usize,
    /// Present on the last output of an answer.
    pub finish_reason: Option<FinishReason>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FinishReason {
    /// An end token, or the caller's own stop condition.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// There was no token to go on with.
    Failed(Failure),
}

/// Why an answer could not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    NoFiniteLogit,
    /// Bans, or logits of −∞, took every token that the grammar allows.
    NoAllowedToken,
    /// What may follow could not be found within the grammar's limits of work.
    GrammarTooComplex,
}

/// One answer to a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    pub output_ids: Vec<u32>,
    /// `[output_ids.len()]`
    pub logprobs: Vec<f32>,
    /// `[output_ids.len()]`
    pub top_logprobs: Vec<Vec<TokenLogprob>>,
    /// `None` where the caller broke off.
    pub finish_reason: Option<FinishReason>,
}

impl Generation {
    /// Appends an output of the answer.
    pub fn push(&mut self, output: &RequestOutput) {
        if let Some(token) = output.token {
            self.output_ids.push(token);
            self.logprobs.push(output.logprob);
            self.top_logprobs.push(output.top_logprobs.clone());
        }
        self.finish_reason = output.finish_reason;
    }

    /// Mean log-probability of the tokens, by which the best of several answers is chosen.
    pub fn mean_logprob(&self) -> f32 {
        self.logprobs.iter().sum::<f32>() / self.logprobs.len().max(1) as f32
    }
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Failed(_) => "failed",
        }
    }
}

impl Failure {
    /// What happened and what to do, for the one who asked.
    pub fn message(self) -> &'static str {
        match self {
            Failure::NoFiniteLogit => {
                "the model gave no finite logits; its weights are damaged or do not fit its config"
            }
            Failure::NoAllowedToken => {
                "the request's bans leave no token that its grammar allows; change one of them"
            }
            Failure::GrammarTooComplex => {
                "the grammar takes too much work at this point of the answer; make it simpler"
            }
        }
    }
}

impl Default for Request {
    /// Greedy, one answer, no prompt.
    fn default() -> Request {
        Request {
            prompt_ids: Vec::new(),
            max_tokens: 0,
            sampling: SamplingParams::default(),
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            stop_strings: Vec::new(),
            num_choices: 1,
            grammar: None,
            namespace: Namespace::default(),
            session: None,
        }
    }
}

impl Request {
    /// Largest [`Request::num_choices`].
    pub const CHOICES_MAX: usize = 64;
    /// Most stop strings, and bytes of each.
    pub const STOP_STRINGS_MAX: usize = 16;
    pub const STOP_STRING_BYTES_MAX: usize = 1024;

    /// Refuses what no engine with this vocabulary and context can serve after a history of
    /// `history_len` tokens.
    pub fn check(
        &self,
        vocab_size: usize,
        max_context: usize,
        history_len: usize,
    ) -> Result<(), Error> {
        check_prompt(&self.prompt_ids, vocab_size)?;
        let len = history_len.saturating_add(self.prompt_ids.len());
        if len >= max_context {
            let history = match history_len {
                0 => String::new(),
                _ => format!(" after a history of {history_len}"),
            };
            return Err(Error::Request(format!(
                "the prompt has {} tokens{history}, the context of {max_context} leaves no room \
                 for an answer; shorten the prompt or raise the context",
                self.prompt_ids.len()
            )));
        }
        if self.max_tokens == 0 {
            return Err(Error::Request("max_tokens is 0, it must be at least 1".to_owned()));
        }
        self.check_choices()?;
        if let Some(turn) = &self.session
            && turn.id.namespace() != self.namespace
        {
            return Err(Error::Request(format!(
                "session {} belongs to namespace {}, the request to {}",
                turn.id,
                turn.id.namespace().0,
                self.namespace.0
            )));
        }
        self.check_stops(vocab_size)?;
        self.sampling.check(vocab_size)
    }

    fn check_choices(&self) -> Result<(), Error> {
        let num_choices_max = if self.session.is_some() { 1 } else { Request::CHOICES_MAX };
        if (1..=num_choices_max).contains(&self.num_choices) {
            return Ok(());
        }
        let whom = if self.session.is_some() { "a session" } else { "a request" };
        Err(Error::Request(format!(
            "{} answers to one prompt; {whom} can have 1 to {num_choices_max}",
            self.num_choices
        )))
    }

    fn check_stops(&self, vocab_size: usize) -> Result<(), Error> {
        let outside = self.stop_token_ids.iter().find(|id| **id as usize >= vocab_size);
        if let Some(id) = outside {
            return Err(Error::Request(format!(
                "stop token {id} is outside the vocabulary of {vocab_size} tokens"
            )));
        }
        if self.stop_strings.len() > Request::STOP_STRINGS_MAX {
            return Err(Error::Request(format!(
                "{} stop strings; at most {} are possible",
                self.stop_strings.len(),
                Request::STOP_STRINGS_MAX
            )));
        }
        let lengths = 1..=Request::STOP_STRING_BYTES_MAX;
        match self.stop_strings.iter().find(|stop| !lengths.contains(&stop.len())) {
            Some(stop) => Err(Error::Request(format!(
                "a stop string has {} bytes, it must have 1 to {}",
                stop.len(),
                Request::STOP_STRING_BYTES_MAX
            ))),
            None => Ok(()),
        }
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
