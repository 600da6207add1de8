//! `residual += delta; out = residual / rms(residual) · weight`, row by row.
//!
//! Bound: reads residual and delta, writes residual and the output once; a row stays in the first
//! cache level between its two passes.

use std::mem::MaybeUninit;

use super::abi::{RmsNormArgs, Share};
use super::bf16::DotBf16;
use super::quantize::quantize_row;
use super::simd::Simd;

/// Normalizes the rows of `share`; `GROUP` 0 writes float32,
/// [`BF16_GROUP`](super::bf16::BF16_GROUP) bfloat16, else int8 with that group.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn run<S: DotBf16, const HIDDEN: usize, const GROUP: usize>(
    args: &RmsNormArgs,
    share: Share,
) {
    let mut buffer = MaybeUninit::<[f32; HIDDEN]>::uninit();
    let (mut i, end) = share.range(args.rows);
    while i < end {
        // SAFETY: i < rows, and rows belong to one thread each.
        unsafe {
            let src = if args.select.is_null() { i } else { *args.select.add(i) as usize };
            let x = args.residual.add(src * HIDDEN);
            let squares = if args.delta.is_null() {
                sum_of_squares::<S, HIDDEN>(x)
            } else {
                add_delta::<S, HIDDEN>(x, args.delta.add(src * HIDDEN))
            };
            let factor = 1.0 / (squares / HIDDEN as f32 + args.eps).sqrt();
            if GROUP == 0 {
                scale::<S, HIDDEN>(x, factor, args.weight, args.out.f32.add(i * HIDDEN));
            } else {
                scale::<S, HIDDEN>(x, factor, args.weight, buffer.as_mut_ptr().cast());
                quantize_row::<S, HIDDEN, GROUP>(buffer.as_ptr().cast(), i, &args.out);
            }
        }
        i += 1;
    }
}

/// Sum of the squares of `x`, `[N]`.
///
/// # Safety
/// `x` holds `N` values; the instruction set of `S`.
#[inline(always)]
pub unsafe fn sum_of_squares<S: Simd, const N: usize>(x: *const f32) -> f32 {
    // SAFETY: reads x[0..N].
    unsafe {
        // NOTE: four sums hide the latency of the multiply-add.
        let mut sums = [S::zero(); 4];
        let mut i = 0;
        while i + 4 * S::LANES <= N {
            let mut j = 0;
            while j < 4 {
                let value = S::load(x.add(i + j * S::LANES));
                sums[j] = S::fma(value, value, sums[j]);
                j += 1;
            }
            i += 4 * S::LANES;
        }
        while i + S::LANES <= N {
            let value = S::load(x.add(i));
            sums[0] = S::fma(value, value, sums[0]);
            i += S::LANES;
        }
        if i < N {
            let value = S::load_first(x.add(i), N - i);
            sums[1] = S::fma(value, value, sums[1]);
        }
        S::reduce_add(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
    }
}

/// `x += delta`, then the sum of squares of `x`.
#[inline(always)]
unsafe fn add_delta<S: Simd, const N: usize>(x: *mut f32, delta: *const f32) -> f32 {
    // SAFETY: reads and writes [0..N].
    unsafe {
        let mut i = 0;
        while i + S::LANES <= N {
            S::store(x.add(i), S::add(S::load(x.add(i)), S::load(delta.add(i))));
            i += S::LANES;
        }
        if i < N {
            let rest = N - i;
            let sum = S::add(S::load_first(x.add(i), rest), S::load_first(delta.add(i), rest));
            S::store_first(x.add(i), sum, rest);
        }
        sum_of_squares::<S, N>(x)
    }
}

/// `out = x · factor · weight`; `out` may be `x`.
///
/// # Safety
/// All three hold `N` values; the instruction set of `S`.
#[inline(always)]
pub unsafe fn scale<S: Simd, const N: usize>(
    x: *const f32,
    factor: f32,
    weight: *const f32,
    out: *mut f32,
) {
    // SAFETY: reads and writes [0..N].
    unsafe {
        let factor = S::splat(factor);
        let mut i = 0;
        while i + S::LANES <= N {
            let value = S::mul(S::load(x.add(i)), factor);
            S::store(out.add(i), S::mul(value, S::load(weight.add(i))));
            i += S::LANES;
        }
        if i < N {
            let rest = N - i;
            let value = S::mul(S::load_first(x.add(i), rest), factor);
            let value = S::mul(value, S::load_first(weight.add(i), rest));
            S::store_first(out.add(i), value, rest);
        }
    }
}
