//! Probabilities of a row of logits at a temperature, as shares of the likeliest token's.
//!
//! Bound: about 20 instructions a vector for the exponentials, over the whole vocabulary unless
//! top-k comes first.

/// Tokens whose weights are summed up together.
const BLOCK: usize = 256;
/// Sums that are added up side by side.
const LANES: usize = 8;

/// Turns logits into weights: 1 for the largest logit, 0 for −∞ and NaN.
#[derive(Clone, Copy, Debug)]
pub(super) struct Softmax {
    max: f32,
    scale: f32,
}

impl Softmax {
    /// Of logits whose largest is `max`, finite, at a temperature above 0.
    pub(super) fn new(max: f32, temperature: f32) -> Softmax {
        // NOTE: the inverse of a very small temperature would be infinite, and 0 · ∞ is NaN.
        Softmax { max, scale: (1.0 / temperature).min(1e30) }
    }

    /// Sums of blocks that a row of `num_logits` has.
    pub(super) fn num_sums(num_logits: usize) -> usize {
        num_logits.div_ceil(BLOCK)
    }

    /// The probability of a logit as a share of the largest one's.
    pub(super) fn weight(&self, logit: f32) -> f32 {
        exp((logit - self.max) * self.scale)
    }

    /// The logit whose weight is `weight`, which is at most 1.
    pub(super) fn logit(&self, weight: f64) -> f64 {
        f64::from(self.max) + weight.ln() / f64::from(self.scale)
    }

    /// The sum of all weights; `sums` receives those of blocks.
    pub(super) fn sum(&self, logits: &[f32], sums: &mut Vec<f64>) -> f64 {
        sums.clear();
        sums.extend(logits.chunks(BLOCK).map(|block| self.sum_block(block)));
        sums.iter().sum()
    }

    /// The token at the share `uniform` of the summed weights, in the order of ids; `None` where
    /// rounding leaves none. `sums` is scratch memory.
    pub(super) fn draw(&self, logits: &[f32], uniform: f64, sums: &mut Vec<f64>) -> Option<u32> {
        let mut left = uniform * self.sum(logits, sums);
        for (block_idx, (block, sum)) in logits.chunks(BLOCK).zip(sums.iter()).enumerate() {
            if left >= *sum {
                left -= sum;
                continue;
            }
            for (idx, logit) in block.iter().enumerate() {
                left -= f64::from(self.weight(*logit));
                if left < 0.0 {
                    return Some((block_idx * BLOCK + idx) as u32);
                }
            }
        }
        None
    }

    fn sum_block(&self, block: &[f32]) -> f64 {
        // NOTE: two loops, each of which the compiler turns into vector code; one it does not.
        let mut weights = [0.0; BLOCK];
        for (weight, logit) in weights.iter_mut().zip(block) {
            *weight = self.weight(*logit);
        }
        let mut sums = [0.0; LANES];
        for weights in weights.as_chunks::<LANES>().0 {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += f64::from(*weight);
            }
        }
        sums.iter().sum()
    }
}

/// `e^x` for x ≤ 0, relative error below 3e-7 (degree-6 polynomial after range reduction, as in
/// Cephes); 0 below −87 and for NaN. Other than the system's it is vector code, and the same
/// everywhere.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const MIN: f32 = -87.0;
    // 1.5 · 2²³: adding it rounds to a whole number, which the low bits then hold.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > MIN { x } else { MIN };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // NOTE: ln 2 in two parts, so that n · ln 2 is subtracted without rounding.
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.388_888_9e-3;
    for term in [8.333_334e-3, 4.166_666_8e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0] {
        p = p * r + term;
    }
    let pow2 = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()));
    if x > MIN { p * pow2 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_close() {
        for step in 0..870_000 {
            let x = step as f32 * -1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 3e-7, "{x}: {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        for x in [-87.0, -1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
    }
}
