//! What a request asks of sampling, and the bounds of it.

use crate::error::Error;

/// Entries of `logit_bias` at most.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Sequences in `bad_words` at most.
pub const BAD_WORDS_MAX: usize = 256;
/// Tokens of one of them at most.
pub const BAD_WORD_LEN_MAX: usize = 64;
/// Largest `num_top_logprobs`.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// How tokens are chosen; the default is greedy and changes no logit.
///
/// A row of logits is treated in this order: the grammar's mask, `logit_bias`, the bans
/// (`min_tokens` and `bad_words`), `repetition_penalty`, `frequency_penalty` and
/// `presence_penalty`, `temperature`, `top_k`, `top_p`, `min_p`. Each sees what the ones before it left.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens up to this share of the probability (nucleus sampling, Holtzman
    /// et al. 2020).
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest token's probability.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, Keskar
    /// et al. 2019, as Hugging Face transformers has it); 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens in the output, -2 to 2 (as in the OpenAI API).
    pub presence_penalty: f32,
    /// Taken from the logits of tokens in the output for each time that they occur there, -2 to 2
    /// (as in the OpenAI API).
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, each -100 to 100; entries of one token add up. A bias
    /// lifts no ban.
    pub logit_bias: Vec<(u32, f32)>,
    /// Sequences of tokens that do not occur in the output: the last token is banned where the
    /// others end the output so far. The prompt is no part of them.
    pub bad_words: Vec<Vec<u32>>,
    /// Stop tokens are banned until the output has so many tokens. A grammar that is complete ends
    /// the output before that.
    pub min_tokens: usize,
    /// How many of the likeliest tokens a [`Sample`](super::Sample) lists.
    pub num_top_logprobs: usize,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            bad_words: Vec::new(),
            min_tokens: 0,
            num_top_logprobs: 0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Refuses with [`Error::Request`] what is out of bounds for a vocabulary of `vocab_size`.
    pub fn check(&self, vocab_size: usize) -> Result<(), Error> {
        let number = |name: &str, value: f32, is_good: bool, expected: &str| {
            refuse_unless(is_good, || format!("{name} is {value}, it must be {expected}"))
        };
        let is_at_least_0 = self.temperature >= 0.0 && self.temperature.is_finite();
        number("temperature", self.temperature, is_at_least_0, "a number of at least 0")?;
        let is_share = self.top_p > 0.0 && self.top_p <= 1.0;
        number("top_p", self.top_p, is_share, "above 0 and at most 1")?;
        number("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1")?;
        let penalty = self.repetition_penalty;
        let is_above_0 = penalty > 0.0 && penalty.is_finite();
        number("repetition_penalty", penalty, is_above_0, "a number above 0")?;
        for (name, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            number(name, penalty, (-2.0..=2.0).contains(&penalty), "between -2 and 2")?;
        }
        refuse_unless(self.num_top_logprobs <= TOP_LOGPROBS_MAX, || {
            format!(
                "num_top_logprobs is {}, it must be at most {TOP_LOGPROBS_MAX}",
                self.num_top_logprobs
            )
        })?;
        self.check_logit_bias(vocab_size)?;
        self.check_bad_words(vocab_size)
    }

    /// Whether top-k drops any of `num_tokens`.
    pub(super) fn has_top_k(&self, num_tokens: usize) -> bool {
        self.top_k > 0 && self.top_k < num_tokens
    }

    /// Whether top-k, top-p or min-p may drop any of `num_tokens`.
    pub(super) fn is_filtered(&self, num_tokens: usize) -> bool {
        self.has_top_k(num_tokens) || self.top_p < 1.0 || self.min_p > 0.0
    }

    fn check_logit_bias(&self, vocab_size: usize) -> Result<(), Error> {
        let num_entries = self.logit_bias.len();
        refuse_unless(num_entries <= LOGIT_BIAS_MAX, || {
            format!("logit_bias has {num_entries} entries, give at most {LOGIT_BIAS_MAX}")
        })?;
        for (token, bias) in &self.logit_bias {
            check_token("logit_bias", *token, vocab_size)?;
            refuse_unless((-100.0..=100.0).contains(bias), || {
                format!("logit_bias of token {token} is {bias}, it must be between -100 and 100")
            })?;
        }
        Ok(())
    }

    fn check_bad_words(&self, vocab_size: usize) -> Result<(), Error> {
        let num_words = self.bad_words.len();
        refuse_unless(num_words <= BAD_WORDS_MAX, || {
            format!("bad_words has {num_words} token sequences, give at most {BAD_WORDS_MAX}")
        })?;
        for (idx, word) in self.bad_words.iter().enumerate() {
            refuse_unless((1..=BAD_WORD_LEN_MAX).contains(&word.len()), || {
                format!(
                    "bad_words: sequence {idx} has {} tokens, it must have 1 to {BAD_WORD_LEN_MAX}",
                    word.len()
                )
            })?;
            for token in word {
                check_token("bad_words", *token, vocab_size)?;
            }
        }
        Ok(())
    }
}

fn check_token(name: &str, token: u32, vocab_size: usize) -> Result<(), Error> {
    refuse_unless((token as usize) < vocab_size, || {
        format!("{name}: token id {token} is outside the vocabulary of {vocab_size} tokens")
    })
}

fn refuse_unless(is_good: bool, message: impl FnOnce() -> String) -> Result<(), Error> {
    if is_good { Ok(()) } else { Err(Error::Request(message())) }
}
