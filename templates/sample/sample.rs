//! Maximum, its smallest index and log-sum-exp of rows of logits; NaN counts as −∞.
//!
//! Bound: reads a row twice from cache, about 18 instructions a vector for the exponentials.

use super::abi::{LogitStats, SampleArgs, Share};
use super::simd::Simd;

/// Vectors that go through one loop iteration.
const UNROLL: usize = 4;

/// Computes the rows of `share`.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn run<S: Simd, const VOCAB: usize>(args: &SampleArgs, share: Share) {
    let (mut row, end) = share.range(args.rows);
    while row < end {
        // SAFETY: row < rows, and rows belong to one thread each.
        unsafe { *args.out.add(row) = stats::<S, VOCAB>(args.logits.add(row * VOCAB)) };
        row += 1;
    }
}

#[inline(always)]
unsafe fn stats<S: Simd, const VOCAB: usize>(x: *const f32) -> LogitStats {
    // SAFETY: reads x[0..VOCAB].
    unsafe {
        let max = maximum::<S, VOCAB>(x);
        let argmax = find::<S, VOCAB>(x, max);
        // NOTE: with an infinite maximum the differences would be NaN.
        let log_sum_exp =
            if max.is_finite() { max + sum_exp::<S, VOCAB>(x, max).ln() } else { max };
        LogitStats { max, argmax, log_sum_exp }
    }
}

#[inline(always)]
unsafe fn maximum<S: Simd, const N: usize>(x: *const f32) -> f32 {
    // SAFETY: reads x[0..N].
    unsafe {
        let mut max = [S::splat(f32::NEG_INFINITY); UNROLL];
        let mut i = 0;
        while i + UNROLL * S::LANES <= N {
            let mut j = 0;
            while j < UNROLL {
                // NOTE: where the first operand is NaN, `max` gives the second.
                max[j] = S::max(S::load(x.add(i + j * S::LANES)), max[j]);
                j += 1;
            }
            i += UNROLL * S::LANES;
        }
        let mut best = S::reduce_max(S::max(S::max(max[0], max[1]), S::max(max[2], max[3])));
        while i < N {
            let value = *x.add(i);
            best = if value > best { value } else { best };
            i += 1;
        }
        best
    }
}

/// The first index of `max`, 0 where there is none.
#[inline(always)]
unsafe fn find<S: Simd, const N: usize>(x: *const f32, max: f32) -> u32 {
    // SAFETY: reads x[0..N].
    unsafe {
        let mut i = 0;
        while i + UNROLL * S::LANES <= N {
            let mut block = S::splat(f32::NEG_INFINITY);
            let mut j = 0;
            while j < UNROLL {
                block = S::max(S::load(x.add(i + j * S::LANES)), block);
                j += 1;
            }
            if S::reduce_max(block) == max {
                break;
            }
            i += UNROLL * S::LANES;
        }
        while i < N {
            if *x.add(i) == max {
                return i as u32;
            }
            i += 1;
        }
        0
    }
}

/// `Σ e^(x − max)`
#[inline(always)]
unsafe fn sum_exp<S: Simd, const N: usize>(x: *const f32, max: f32) -> f32 {
    // SAFETY: reads x[0..N].
    unsafe {
        let shift = S::splat(max);
        let mut sums = [S::zero(); UNROLL];
        let mut i = 0;
        while i + UNROLL * S::LANES <= N {
            let mut j = 0;
            while j < UNROLL {
                let value = S::load(x.add(i + j * S::LANES));
                sums[j] = S::add(sums[j], S::exp(S::sub(value, shift)));
                j += 1;
            }
            i += UNROLL * S::LANES;
        }
        let sum = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
        let mut total = S::reduce_add(sum);
        while i < N {
            let value = *x.add(i);
            total += if value.is_nan() { 0.0 } else { (value - max).exp() };
            i += 1;
        }
        total
    }
}
