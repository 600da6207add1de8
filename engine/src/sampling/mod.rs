//! From a row of logits to a token.
//!
//! The choice is a function of the logits, the parameters and the sequence alone: the random number
//! comes from a counter, not from a state, so that neither neighbours in a batch nor the order of
//! steps can change it.

mod adjusted_logits;
mod candidates;
mod mask;
mod params;
mod softmax;

pub use mask::TokenMask;
pub use params::{
    BAD_WORD_LEN_MAX, BAD_WORDS_MAX, LOGIT_BIAS_MAX, SamplingParams, TOP_LOGPROBS_MAX,
};

use crate::kernels::abi::LogitStats;
use adjusted_logits::AdjustedLogits;
use candidates::Candidates;
use softmax::Softmax;

/// What sampling sees of a sequence. Tokens outside the vocabulary are passed over.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// Prompt, then output so far.
    pub tokens: &'a [u32],
    pub num_prompt: usize,
    /// The tokens that `min_tokens` bans.
    pub stop_token_ids: &'a [u32],
    /// The tokens that a grammar allows, where there is one.
    pub mask: Option<&'a TokenMask>,
}

/// A token and its log-probability under the model's own distribution, before any parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub token: u32,
    /// −∞ where the model itself excludes the token.
    pub logprob: f32,
    /// The likeliest tokens of the model's own distribution, likeliest first, ties by id; as many
    /// as asked for, less where fewer have a probability.
    pub top_logprobs: Vec<TokenLogprob>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    pub logprob: f32,
}

/// Chooses tokens; holds scratch memory for one row.
#[derive(Clone, Debug)]
pub struct Sampler {
    /// Tokens from here on are never chosen.
    num_tokens: usize,
    adjusted: AdjustedLogits,
    candidates: Candidates,
    sums: Vec<f64>,
}

/// Whether [`Sampler::sample`] would look at the logits, and not at their statistics alone.
pub fn needs_logits(params: &SamplingParams, history: &History<'_>, stats: &LogitStats) -> bool {
    params.temperature != 0.0
        || params.num_top_logprobs > 0
        || adjusted_logits::is_changed(params, history)
        || (stats.log_sum_exp.is_nan() && stats.max != f32::INFINITY)
}

/// What [`Sampler::sample`] gives where [`needs_logits`] is false.
pub fn sample_greedily(stats: &LogitStats) -> Option<Sample> {
    if stats.max == f32::NEG_INFINITY {
        return None;
    }
    let logprob = logprob(stats.max, stats.log_sum_exp.max(stats.max));
    Some(Sample { token: stats.argmax, logprob, top_logprobs: Vec::new() })
}

impl Sampler {
    /// For rows of `vocab_size` logits.
    pub fn new(vocab_size: usize) -> Sampler {
        Sampler {
            num_tokens: vocab_size,
            adjusted: AdjustedLogits::new(vocab_size),
            candidates: Candidates::new(vocab_size),
            sums: Vec::with_capacity(Softmax::num_sums(vocab_size)),
        }
    }

    /// Never chooses a token from `num_tokens` on: vocabularies are padded, and the tokenizer knows
    /// nothing of the rest.
    pub fn limit(&mut self, num_tokens: usize) {
        self.num_tokens = num_tokens;
    }

    /// Whether a row's likeliest token may be chosen.
    pub fn knows(&self, stats: &LogitStats) -> bool {
        (stats.argmax as usize) < self.num_tokens
    }

    /// The token that follows `history`. `None` where no token that is not banned has a logit above
    /// −∞, NaN counting as −∞. A token at +∞ is certain, of several the first.
    ///
    /// `params` were accepted by [`SamplingParams::check`], which says in which order they act;
    /// `stats` are those of `logits`.
    pub fn sample(
        &mut self,
        params: &SamplingParams,
        history: &History<'_>,
        logits: &[f32],
        stats: &LogitStats,
    ) -> Option<Sample> {
        let known = &logits[..self.num_tokens.min(logits.len())];
        let token = self.choose(params, history, known, stats)?;
        let log_sum_exp = log_sum_exp(logits, stats);
        let logprob = logprob(logits[token as usize], log_sum_exp);
        let top_logprobs = match params.num_top_logprobs {
            0 => Vec::new(),
            num_top => self.top_logprobs(num_top, known, log_sum_exp),
        };
        Some(Sample { token, logprob, top_logprobs })
    }

    fn choose(
        &mut self,
        params: &SamplingParams,
        history: &History<'_>,
        logits: &[f32],
        stats: &LogitStats,
    ) -> Option<u32> {
        let is_known = self.knows(stats);
        let (logits, max, token) = match self.adjusted.fill(params, history, logits) {
            None if is_known => (logits, stats.max, stats.argmax),
            adjusted => {
                let logits = adjusted.unwrap_or(logits);
                let max = max(logits);
                let token = logits.iter().position(|logit| *logit == max)?;
                (logits, max, token as u32)
            }
        };
        if max == f32::NEG_INFINITY {
            return None;
        }
        if params.temperature == 0.0 || max == f32::INFINITY {
            return Some(token);
        }
        let softmax = Softmax::new(max, params.temperature);
        let uniform = uniform(params.seed, history.tokens.len() as u64);
        let drawn = match params.is_filtered(logits.len()) {
            false => softmax.draw(logits, uniform, &mut self.sums),
            true => {
                self.candidates.keep(params, softmax, logits, &mut self.sums);
                self.candidates.draw(softmax, uniform)
            }
        };
        Some(drawn.unwrap_or(token))
    }

    fn top_logprobs(
        &mut self,
        num_top: usize,
        logits: &[f32],
        log_sum_exp: f32,
    ) -> Vec<TokenLogprob> {
        let top = self.candidates.top_k(logits, num_top).iter();
        top.map(|candidate| TokenLogprob {
            token: candidate.token,
            logprob: logprob(candidate.logit, log_sum_exp),
        })
        .filter(|top| top.logprob > f32::NEG_INFINITY)
        .collect()
    }
}

/// The seed of choice `choice_idx` of a request: choice 0 has the request's own, the others seeds
/// that differ from each other.
pub fn choice_seed(seed: u64, choice_idx: usize) -> u64 {
    match choice_idx {
        0 => seed,
        idx => mix(seed.wrapping_add(GOLDEN.wrapping_mul(idx as u64))),
    }
}

/// The largest logit that is not NaN; −∞ where there is none.
fn max(logits: &[f32]) -> f32 {
    let larger = |max: f32, logit: f32| if logit > max { logit } else { max };
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (max, logit) in lanes.iter_mut().zip(chunk) {
            *max = larger(*max, *logit);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// `log softmax`; a token at +∞ is certain.
fn logprob(logit: f32, log_sum_exp: f32) -> f32 {
    // NOTE: a sum that was rounded down would make a certain token more than certain.
    if logit == f32::INFINITY { 0.0 } else { (logit - log_sum_exp).min(0.0) }
}

/// Log-sum-exp of the logits that are not NaN; +∞ where one is.
fn log_sum_exp(logits: &[f32], stats: &LogitStats) -> f32 {
    // NOTE: the plain loops of the reference backend give NaN where a logit is NaN or +∞.
    if stats.max == f32::INFINITY || !stats.log_sum_exp.is_nan() {
        return stats.log_sum_exp.max(stats.max);
    }
    let numbers = logits.iter().filter(|logit| !logit.is_nan());
    let sum: f64 = numbers.map(|logit| f64::from(logit - stats.max).exp()).sum();
    stats.max + sum.ln() as f32
}

/// A number in 0..1 that follows from the seed and the place in the sequence alone (two rounds of
/// the SplitMix64 finalizer).
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let counter = mix(seed.wrapping_add(GOLDEN)).wrapping_add(position);
    let bits = mix(counter.wrapping_mul(GOLDEN));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// SplitMix64's increment, 2⁶⁴ divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finalizer (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
