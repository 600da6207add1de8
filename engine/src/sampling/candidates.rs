//! The tokens that top-k, top-p and min-p leave.

use std::cmp::Ordering;

use super::SamplingParams;
use super::softmax::Softmax;

/// Candidates that are sorted first when top-p looks for its share.
const TOP_P_FIRST: usize = 64;

/// Scratch memory for one row.
#[derive(Clone, Debug)]
pub(super) struct Candidates {
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) logit: f32,
    pub(super) token: u32,
}

impl Candidates {
    pub(super) fn new(vocab_size: usize) -> Candidates {
        Candidates { candidates: Vec::with_capacity(vocab_size) }
    }

    /// The `k` tokens with the largest logits, likeliest first; fewer where fewer are above −∞.
    pub(super) fn top_k(&mut self, logits: &[f32], k: usize) -> &[Candidate] {
        let candidates = &mut self.candidates;
        candidates.clear();
        // What a further logit must exceed; an equal one of a higher id does not.
        let mut min = f32::NEG_INFINITY;
        for (token, logit) in logits.iter().enumerate() {
            if *logit > min {
                candidates.push(Candidate { logit: *logit, token: token as u32 });
                // Dropping only when there are twice as many makes a token cost O(1).
                if candidates.len() == 2 * k {
                    candidates.select_nth_unstable_by(k - 1, likelier_first);
                    candidates.truncate(k);
                    min = candidates[k - 1].logit;
                }
            }
        }
        if candidates.len() > k {
            candidates.select_nth_unstable_by(k - 1, likelier_first);
            candidates.truncate(k);
        }
        candidates.sort_unstable_by(likelier_first);
        candidates
    }

    /// Keeps what `params` leave of `logits`, which is less than all; `sums` is scratch memory.
    pub(super) fn keep(
        &mut self,
        params: &SamplingParams,
        softmax: Softmax,
        logits: &[f32],
        sums: &mut Vec<f64>,
    ) {
        let (top_p, min_p) = (f64::from(params.top_p), f64::from(params.min_p));
        let total = if params.has_top_k(logits.len()) {
            self.top_k(logits, params.top_k);
            self.sum(softmax)
        } else {
            let total = if top_p < 1.0 { softmax.sum(logits, sums) } else { 0.0 };
            // Lighter tokens than this are lighter than 1 − top-p of the sum, all together.
            let lightest = (1.0 - top_p) * total / logits.len() as f64;
            self.at_least(logits, softmax.logit(lightest.max(min_p)));
            total
        };
        if top_p < 1.0 {
            let num_kept = num_in_share(&mut self.candidates, top_p * total, softmax);
            self.candidates.truncate(num_kept);
        }
        if min_p > 0.0 {
            let min = softmax.logit(min_p);
            self.candidates.retain(|candidate| f64::from(candidate.logit) >= min);
        }
    }

    /// The candidate at the share `uniform` of the summed weights; `None` where rounding leaves
    /// none.
    pub(super) fn draw(&self, softmax: Softmax, uniform: f64) -> Option<u32> {
        let mut left = uniform * self.sum(softmax);
        let drawn = self.candidates.iter().find(|candidate| {
            left -= f64::from(softmax.weight(candidate.logit));
            left < 0.0
        });
        drawn.map(|candidate| candidate.token)
    }

    fn at_least(&mut self, logits: &[f32], min: f64) {
        self.candidates.clear();
        for (token, logit) in logits.iter().enumerate() {
            if f64::from(*logit) >= min {
                self.candidates.push(Candidate { logit: *logit, token: token as u32 });
            }
        }
    }

    fn sum(&self, softmax: Softmax) -> f64 {
        self.candidates.iter().map(|candidate| f64::from(softmax.weight(candidate.logit))).sum()
    }
}

/// Larger logits first, ties by token id. No candidate is NaN.
fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    let by_logit = b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal);
    by_logit.then(a.token.cmp(&b.token))
}

/// Sorts just enough candidates to sum up `wanted` and says how many that takes.
fn num_in_share(candidates: &mut [Candidate], wanted: f64, softmax: Softmax) -> usize {
    let mut num_sorted = TOP_P_FIRST.min(candidates.len());
    loop {
        if num_sorted < candidates.len() {
            candidates.select_nth_unstable_by(num_sorted - 1, likelier_first);
        }
        candidates[..num_sorted].sort_unstable_by(likelier_first);
        let mut sum = 0.0;
        for (idx, candidate) in candidates[..num_sorted].iter().enumerate() {
            sum += f64::from(softmax.weight(candidate.logit));
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
