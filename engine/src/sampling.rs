//! From a row of logits to a token.
//!
//! The choice is a function of the logits, the parameters and the place in the sequence alone: the
//! random number comes from a counter, not from a state, so that neither neighbours in a batch nor
//! the order of steps can change it.

use std::cmp::Ordering;

use crate::error::Error;
use crate::kernels::abi::LogitStats;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens up to this share of the probability.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest token's probability.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens already seen.
    pub repetition_penalty: f32,
    pub seed: u64,
}

/// A token and its log-probability under the model's own distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub token: u32,
    pub logprob: f32,
}

/// Chooses tokens; holds scratch memory for one row.
#[derive(Clone, Debug)]
pub struct Sampler {
    candidates: Vec<Candidate>,
    /// `[vocab]`
    seen: Vec<bool>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    token: u32,
}

/// Candidates that are sorted first when top-p looks for its share.
const TOP_P_FIRST: usize = 64;

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Whether the token is the first maximum of the logits as they are.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    pub fn check(&self) -> Result<(), Error> {
        let refuse = |name: &str, value: f32, expected: &str| {
            Err(Error::Request(format!("{name} is {value}, it must be {expected}")))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refuse("temperature", self.temperature, "a number of at least 0");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "above 0 and at most 1");
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return refuse("min_p", self.min_p, "between 0 and 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse("repetition_penalty", self.repetition_penalty, "a number above 0");
        }
        Ok(())
    }
}

impl Sampler {
    pub fn new(vocab_size: usize) -> Sampler {
        Sampler { candidates: Vec::with_capacity(vocab_size), seen: vec![false; vocab_size] }
    }

    /// The token that follows `tokens`. `None` where no logit is above −∞, NaN counting as −∞.
    ///
    /// The order is that of Hugging Face transformers: repetition penalty, temperature, top-k,
    /// top-p, min-p.
    pub fn sample(
        &mut self,
        params: &SamplingParams,
        tokens: &[u32],
        logits: &[f32],
        stats: &LogitStats,
    ) -> Option<Sample> {
        if params.is_greedy() && stats.log_sum_exp.is_finite() {
            let logprob = stats.max - stats.log_sum_exp;
            return Some(Sample { token: stats.argmax, logprob });
        }
        self.fill_candidates(params.repetition_penalty, tokens, logits);
        let best = *self.candidates.iter().min_by(|a, b| likelier_first(a, b))?;
        let token = match best.logit == f32::INFINITY || params.temperature == 0.0 {
            true => best.token,
            false => {
                // NOTE: a temperature too small for float32 would make every difference infinite.
                let scale = (1.0 / f64::from(params.temperature)).min(1e30);
                self.keep(params, best.logit, scale);
                self.draw(best.logit, scale, uniform(params.seed, tokens.len() as u64))
            }
        };
        Some(Sample { token, logprob: logprob(logits, token, stats) })
    }

    /// Tokens with a logit above −∞, the penalty applied.
    fn fill_candidates(&mut self, penalty: f32, tokens: &[u32], logits: &[f32]) {
        let penalized = if penalty == 1.0 { &[] } else { tokens };
        penalized.iter().for_each(|token| self.seen[*token as usize] = true);
        self.candidates.clear();
        for (token, logit) in logits.iter().enumerate() {
            let logit = match self.seen[token] {
                true if *logit > 0.0 => logit / penalty,
                true => logit * penalty,
                false => *logit,
            };
            if logit > f32::NEG_INFINITY {
                self.candidates.push(Candidate { logit, token: token as u32 });
            }
        }
        penalized.iter().for_each(|token| self.seen[*token as usize] = false);
    }

    /// Drops what top-k, top-p and min-p exclude; sorts the rest, likeliest first.
    fn keep(&mut self, params: &SamplingParams, max: f32, scale: f64) {
        let candidates = &mut self.candidates;
        if params.top_k > 0 && params.top_k < candidates.len() {
            candidates.select_nth_unstable_by(params.top_k - 1, likelier_first);
            candidates.truncate(params.top_k);
        }
        if params.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|c| c.weight(max, scale)).sum();
            let wanted = f64::from(params.top_p) * total;
            let num_kept = num_in_share(candidates, wanted, max, scale);
            candidates.truncate(num_kept);
        } else {
            candidates.sort_unstable_by(likelier_first);
        }
        if params.min_p > 0.0 {
            let min = f64::from(params.min_p);
            let num_kept = candidates.partition_point(|c| c.weight(max, scale) >= min);
            candidates.truncate(num_kept.max(1));
        }
    }

    /// The candidate at the share `uniform` of the summed weights.
    fn draw(&self, max: f32, scale: f64, uniform: f64) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| c.weight(max, scale)).sum();
        let mut left = uniform * total;
        for candidate in &self.candidates {
            left -= candidate.weight(max, scale);
            if left < 0.0 {
                return candidate.token;
            }
        }
        self.candidates[self.candidates.len() - 1].token
    }
}

impl Candidate {
    /// The probability as a share of the likeliest token's.
    fn weight(&self, max: f32, scale: f64) -> f64 {
        ((f64::from(self.logit) - f64::from(max)) * scale).exp()
    }
}

/// Larger logits first, ties by token id.
fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// Sorts just enough candidates to sum up `wanted` and says how many that takes.
fn num_in_share(candidates: &mut [Candidate], wanted: f64, max: f32, scale: f64) -> usize {
    let mut num_sorted = TOP_P_FIRST.min(candidates.len());
    loop {
        if num_sorted < candidates.len() {
            candidates.select_nth_unstable_by(num_sorted - 1, likelier_first);
        }
        candidates[..num_sorted].sort_unstable_by(likelier_first);
        let mut sum = 0.0;
        for (idx, candidate) in candidates[..num_sorted].iter().enumerate() {
            sum += candidate.weight(max, scale);
            if sum >= wanted {
                return idx + 1;
            }
        }
        if num_sorted == candidates.len() {
            return num_sorted;
        }
        num_sorted = (num_sorted * 8).min(candidates.len());
    }
}

/// `log softmax(logits)[token]`; a token at +∞ is certain.
fn logprob(logits: &[f32], token: u32, stats: &LogitStats) -> f32 {
    let logit = logits[token as usize];
    let log_sum_exp = match stats.log_sum_exp.is_finite() {
        true => stats.log_sum_exp,
        false => finite_log_sum_exp(logits),
    };
    if logit == f32::INFINITY { 0.0 } else { logit - log_sum_exp }
}

/// Log-sum-exp of the logits that are not NaN.
fn finite_log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let finite = logits.iter().filter(|logit| !logit.is_nan());
    let sum: f64 = finite.map(|logit| f64::from(logit - max).exp()).sum();
    max + sum.ln() as f32
}

/// The seed of choice `choice_idx` of a request: choice 0 has the request's own.
pub fn choice_seed(seed: u64, choice_idx: usize) -> u64 {
    seed.wrapping_add((choice_idx as u64).wrapping_mul(0xd1b5_4a32_d192_ed03))
}

/// A number in 0..1 that follows from the seed and the place in the sequence alone (two rounds of
/// the SplitMix64 finalizer).
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let counter = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(position);
    let bits = mix(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
