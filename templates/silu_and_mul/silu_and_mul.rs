//! `out = gate / (1 + e^−gate) · up`, row by row.
//!
//! Bound: reads `8 · intermediate` bytes a row from cache, asked for a row ahead: of many rows,
//! most have left the second level since they were written. About 20 instructions a vector, most
//! of them the exponential.

use std::mem::MaybeUninit;

use super::abi::{Share, SiluAndMulArgs};
use super::bf16::DotBf16;
use super::quantize::quantize_row;
use super::simd::Simd;

/// Computes the rows of `share`; `GROUP` 0 writes float32,
/// [`BF16_GROUP`](super::bf16::BF16_GROUP) bfloat16, else int8 with that group.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn run<S: DotBf16, const INTERMEDIATE: usize, const GROUP: usize>(
    args: &SiluAndMulArgs,
    share: Share,
) {
    let mut buffer = MaybeUninit::<[f32; INTERMEDIATE]>::uninit();
    let (mut row, end) = share.range(args.rows);
    while row < end {
        // SAFETY: row < rows, and rows belong to one thread each.
        unsafe {
            let gate = args.gate_up.add(row * 2 * INTERMEDIATE);
            if GROUP == 0 {
                silu_row::<S, INTERMEDIATE>(gate, args.out.f32.add(row * INTERMEDIATE));
            } else {
                silu_row::<S, INTERMEDIATE>(gate, buffer.as_mut_ptr().cast());
                quantize_row::<S, INTERMEDIATE, GROUP>(buffer.as_ptr().cast(), row, &args.out);
            }
        }
        row += 1;
    }
}

/// `gate` is `[2 · N]`, gate then up; `out` is `[N]`.
#[inline(always)]
unsafe fn silu_row<S: Simd, const N: usize>(gate: *const f32, out: *mut f32) {
    // SAFETY: as above.
    unsafe {
        let up = gate.add(N);
        let mut i = 0;
        while i + S::LANES <= N {
            S::prefetch(gate.wrapping_add(2 * N + i).cast());
            S::prefetch(up.wrapping_add(2 * N + i).cast());
            S::store(out.add(i), silu::<S>(S::load(gate.add(i)), S::load(up.add(i))));
            i += S::LANES;
        }
        if i < N {
            let rest = N - i;
            let (gate, up) = (S::load_first(gate.add(i), rest), S::load_first(up.add(i), rest));
            S::store_first(out.add(i), silu::<S>(gate, up), rest);
        }
    }
}

#[inline(always)]
unsafe fn silu<S: Simd>(gate: S::F32, up: S::F32) -> S::F32 {
    // SAFETY: the caller has the instruction set.
    unsafe {
        // NOTE: e^88 is the largest that `exp` takes; below −88 the result is 0 to 37 digits.
        let negative = S::min(S::sub(S::zero(), gate), S::splat(88.0));
        let denominator = S::add(S::splat(1.0), S::exp(negative));
        S::mul(S::div(gate, denominator), up)
    }
}
