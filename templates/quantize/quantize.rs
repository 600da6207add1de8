//! Rows to int8, one scale per group of a row: scale = absmax / 127, q = round(x / scale). Or rows
//! to bfloat16.
//!
//! Bound: reads 4 bytes and writes 1 or 2 bytes an element, all in cache; fused into the op before
//! the linear wherever that op sees whole rows.

use super::abi::{QuantizeArgs, RowsOut, Share, bf16_stride, int8_stride};
use super::bf16::{BF16_GROUP, DotBf16, round_row};
use super::simd::Simd;

/// Quantizes the rows of `share` of `[rows, K]`;
/// [`BF16_GROUP`] writes bfloat16, another `GROUP` int8 with that group.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn run<S: DotBf16, const K: usize, const GROUP: usize>(
    args: &QuantizeArgs,
    share: Share,
) {
    let (mut row, end) = share.range(args.rows);
    while row < end {
        // SAFETY: row < rows, and rows belong to one thread each.
        unsafe { quantize_row::<S, K, GROUP>(args.x.add(row * K), row, &args.out) };
        row += 1;
    }
}

/// Writes row `row` of `out` from `x`, `[K]`, in the form that `GROUP` stands for.
///
/// # Safety
/// `x` holds `K` values, `out` at least `row + 1` rows; the instruction set of `S`.
#[inline(always)]
pub unsafe fn quantize_row<S: DotBf16, const K: usize, const GROUP: usize>(
    x: *const f32,
    row: usize,
    out: &RowsOut,
) {
    // NOTE: callers that can also write float rows name this function with group 0, but do not
    // call it then.
    const { assert!(GROUP <= BF16_GROUP || K.is_multiple_of(GROUP) && GROUP.is_multiple_of(8)) };
    // SAFETY: all offsets are below K, K / GROUP and the row stride.
    unsafe {
        if GROUP == BF16_GROUP {
            round_row::<S, K>(x, out.bf16.add(row * bf16_stride(K)));
            return;
        }
        let q = out.q.add(row * int8_stride(K));
        let scales = out.scales.add(row * (K / GROUP));
        let sums = out.sums.add(row * (K / GROUP));
        let mut group = 0;
        while group < K / GROUP {
            let x = x.add(group * GROUP);
            let q = q.add(group * GROUP);
            let absmax = group_absmax::<S, GROUP>(x);
            // NOTE: a group of zeros keeps scale 0 and q 0; a NaN or infinity spreads through the
            // scale.
            let inverse = if absmax > 0.0 { 127.0 / absmax } else { 0.0 };
            *scales.add(group) = absmax * (1.0 / 127.0);
            *sums.add(group) = quantize_group::<S, GROUP>(x, q, inverse);
            group += 1;
        }
    }
}

#[inline(always)]
unsafe fn group_absmax<S: Simd, const GROUP: usize>(x: *const f32) -> f32 {
    // SAFETY: reads x[0..GROUP].
    unsafe {
        let mut max = S::zero();
        let mut i = 0;
        while i + S::LANES <= GROUP {
            max = S::max(S::abs(S::load(x.add(i))), max);
            i += S::LANES;
        }
        if i < GROUP {
            max = S::max(S::abs(S::load_first(x.add(i), GROUP - i)), max);
        }
        S::reduce_max(max)
    }
}

/// Rounds a group and returns the sum of its bytes.
#[inline(always)]
unsafe fn quantize_group<S: Simd, const GROUP: usize>(
    x: *const f32,
    q: *mut i8,
    inverse: f32,
) -> i32 {
    // SAFETY: reads x[0..GROUP], writes q[0..GROUP].
    unsafe {
        let scale = S::splat(inverse);
        let (low, high) = (S::splat(-127.0), S::splat(127.0));
        let mut sum = S::zero_i32();
        let mut i = 0;
        while i + S::LANES <= GROUP {
            let value = S::min(S::max(S::mul(S::load(x.add(i)), scale), low), high);
            sum = S::add_i32(sum, S::store_i8(q.add(i), value));
            i += S::LANES;
        }
        let mut sum = S::reduce_add_i32(sum);
        // NOTE: at most 8 left (groups are multiples of 8), and storing whole vectors would spill
        // into the next group.
        while i < GROUP {
            let value = (*x.add(i) * inverse).clamp(-127.0, 127.0).round_ties_even();
            *q.add(i) = value as i8;
            sum += value as i32;
            i += 1;
        }
        sum
    }
}
