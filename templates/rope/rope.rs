//! QK-norm where the model has it, rotary embedding, and the append of K and V to their pages.
//!
//! Rotation as in Hugging Face models: element `i` of the first half of the rotary dimensions pairs
//! with element `i` of the second half; dimensions beyond them pass through.
//!
//! Bound: reads a row of q, k, v and writes q and the pages once. K is stored transposed, so a token
//! touches `head_dim` cache lines; consecutive tokens of a page touch the same ones, hence threads
//! take consecutive rows.

use super::abi::{RopeArgs, Share};
use super::pages::{KvElement, head_bytes, page_bytes, params_offset, v_offset};
use super::rms_norm;
use super::simd::Simd;

/// A head, and room for the last vector to reach beyond it.
#[repr(C)]
struct Head<T, const HEAD_DIM: usize> {
    x: [T; HEAD_DIM],
    rest: [T; 16],
}

impl<T: Copy + Default, const HEAD_DIM: usize> Head<T, HEAD_DIM> {
    #[inline(always)]
    fn new() -> Self {
        Head { x: [T::default(); HEAD_DIM], rest: [T::default(); 16] }
    }

    #[inline(always)]
    fn as_mut_ptr(&mut self) -> *mut T {
        (&raw mut *self).cast()
    }
}

/// Rotates and appends the rows, split into runs of (row, KV head).
///
/// # Safety
/// `args` as documented on its fields, slots distinct; the instruction set of `S`.
#[inline(always)]
pub unsafe fn run<
    S: Simd,
    KV: KvElement,
    const HEADS: usize,
    const KV_HEADS: usize,
    const HEAD_DIM: usize,
    const ROTARY_DIM: usize,
    const PAGE: usize,
    const QK_NORM: bool,
>(
    args: &RopeArgs,
    share: Share,
) {
    const { assert!(HEADS.is_multiple_of(KV_HEADS) && HEAD_DIM.is_multiple_of(8)) };
    const { assert!(ROTARY_DIM <= HEAD_DIM && ROTARY_DIM.is_multiple_of(2)) };
    let units = args.rows * KV_HEADS;
    let mut unit = units * share.idx / share.count;
    let end = units * (share.idx + 1) / share.count;
    let mut head = Head::<f32, HEAD_DIM>::new();
    while unit < end {
        let (row, kv_head) = (unit / KV_HEADS, unit % KV_HEADS);
        // SAFETY: a unit's query heads and its slot are written by one thread.
        unsafe {
            let cos_sin = args.cos_sin.add(row * ROTARY_DIM);
            let qkv = args.qkv.add(row * (HEADS + 2 * KV_HEADS) * HEAD_DIM);
            let mut group_head = 0;
            while group_head < HEADS / KV_HEADS {
                let q = qkv.add((kv_head * (HEADS / KV_HEADS) + group_head) * HEAD_DIM);
                if QK_NORM {
                    normalize::<S, HEAD_DIM>(q, args.q_norm, args.eps);
                }
                rotate::<S, ROTARY_DIM>(q, cos_sin);
                group_head += 1;
            }
            let k = qkv.add((HEADS + kv_head) * HEAD_DIM);
            std::ptr::copy_nonoverlapping(k, head.as_mut_ptr(), HEAD_DIM);
            if QK_NORM {
                normalize::<S, HEAD_DIM>(head.as_mut_ptr(), args.k_norm, args.eps);
            }
            rotate::<S, ROTARY_DIM>(head.as_mut_ptr(), cos_sin);
            let slot = *args.slots.add(row) as usize;
            let page_bytes = page_bytes(KV::SIZE, KV::QUANTIZED, KV_HEADS, HEAD_DIM, PAGE);
            let page = args.kv.add(slot / PAGE * page_bytes);
            let block = page.add(kv_head * head_bytes(KV::SIZE, KV::QUANTIZED, HEAD_DIM, PAGE));
            let params: *mut f32 = block.add(params_offset(KV::SIZE, HEAD_DIM, PAGE)).cast();
            let place = slot % PAGE;
            let k_at = block.add(place * KV::SIZE);
            append::<S, KV, HEAD_DIM, PAGE>(&mut head, k_at, PAGE, params.add(place));
            let v = qkv.add((HEADS + KV_HEADS + kv_head) * HEAD_DIM);
            std::ptr::copy_nonoverlapping(v, head.as_mut_ptr(), HEAD_DIM);
            let v_at = block.add(v_offset(KV::SIZE, HEAD_DIM, PAGE) + place * HEAD_DIM * KV::SIZE);
            append::<S, KV, HEAD_DIM, PAGE>(&mut head, v_at, 1, params.add(2 * PAGE + place));
        }
        unit += 1;
    }
}

#[inline(always)]
unsafe fn normalize<S: Simd, const HEAD_DIM: usize>(x: *mut f32, weight: *const f32, eps: f32) {
    // SAFETY: both hold HEAD_DIM values.
    unsafe {
        let squares = rms_norm::sum_of_squares::<S, HEAD_DIM>(x);
        let factor = 1.0 / (squares / HEAD_DIM as f32 + eps).sqrt();
        rms_norm::scale::<S, HEAD_DIM>(x, factor, weight, x);
    }
}

/// Rotates the first `ROTARY_DIM` elements of a head.
#[inline(always)]
unsafe fn rotate<S: Simd, const ROTARY_DIM: usize>(x: *mut f32, cos_sin: *const f32) {
    let half = ROTARY_DIM / 2;
    // SAFETY: x and cos_sin hold ROTARY_DIM values.
    unsafe {
        let (y, sin) = (x.add(half), cos_sin.add(half));
        let mut i = 0;
        while i + S::LANES <= half {
            let (c, s) = (S::load(cos_sin.add(i)), S::load(sin.add(i)));
            let (a, b) = turn::<S>(S::load(x.add(i)), S::load(y.add(i)), c, s);
            S::store(x.add(i), a);
            S::store(y.add(i), b);
            i += S::LANES;
        }
        if i < half {
            let n = half - i;
            let (c, s) = (S::load_first(cos_sin.add(i), n), S::load_first(sin.add(i), n));
            let (a, b) = (S::load_first(x.add(i), n), S::load_first(y.add(i), n));
            let (a, b) = turn::<S>(a, b, c, s);
            S::store_first(x.add(i), a, n);
            S::store_first(y.add(i), b, n);
        }
    }
}

#[inline(always)]
unsafe fn turn<S: Simd>(x: S::F32, y: S::F32, cos: S::F32, sin: S::F32) -> (S::F32, S::F32) {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let minus_sin = S::sub(S::zero(), sin);
        (S::fma(x, cos, S::mul(y, minus_sin)), S::fma(y, cos, S::mul(x, sin)))
    }
}

/// Stores a head at `at`, its elements `stride` apart; int8 puts the scale at `params[0]` and the
/// zero at `params[PAGE]`.
#[inline(always)]
unsafe fn append<S: Simd, KV: KvElement, const HEAD_DIM: usize, const PAGE: usize>(
    head: &mut Head<f32, HEAD_DIM>,
    at: *mut u8,
    stride: usize,
    params: *mut f32,
) {
    // SAFETY: the slot has HEAD_DIM places `stride` elements apart.
    unsafe {
        if KV::QUANTIZED {
            let (scale, zero) = quantize::<S, HEAD_DIM>(head.as_mut_ptr());
            *params = scale;
            *params.add(PAGE) = zero;
            let mut i = 0;
            while i < HEAD_DIM {
                *at.add(i * stride) = head.x[i] as u8;
                i += 1;
            }
        } else if KV::SIZE == 2 {
            let mut bits = Head::<u16, HEAD_DIM>::new();
            let mut i = 0;
            while i < HEAD_DIM {
                S::store_f16(bits.as_mut_ptr().add(i), S::load(head.as_mut_ptr().add(i)));
                i += S::LANES;
            }
            scatter(bits.as_mut_ptr(), at.cast(), HEAD_DIM, stride);
        } else {
            scatter(head.as_mut_ptr(), at.cast::<f32>(), HEAD_DIM, stride);
        }
    }
}

#[inline(always)]
unsafe fn scatter<T: Copy>(x: *const T, at: *mut T, len: usize, stride: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        if stride == 1 {
            std::ptr::copy_nonoverlapping(x, at, len);
            return;
        }
        let mut i = 0;
        while i < len {
            *at.add(i * stride) = *x.add(i);
            i += 1;
        }
    }
}

/// Replaces a head by its levels 0..=255 and returns scale and zero: value = (level − zero) · scale.
#[inline(always)]
unsafe fn quantize<S: Simd, const HEAD_DIM: usize>(x: *mut f32) -> (f32, f32) {
    // SAFETY: x holds HEAD_DIM values and room for a vector beyond.
    unsafe {
        let (min, max) = range::<S, HEAD_DIM>(x);
        let mut scale = (max - min) * (1.0 / 255.0);
        let mut inverse = 1.0 / scale;
        if scale < f32::MIN_POSITIVE {
            // NOTE: a constant head is level 0 with the constant as its zero.
            scale = if min.abs() < f32::MIN_POSITIVE { 1.0 } else { min.abs() };
            inverse = 0.0;
        }
        let mut i = 0;
        while i < HEAD_DIM {
            let level = S::mul(S::sub(S::load(x.add(i)), S::splat(min)), S::splat(inverse));
            let level = S::min(S::max(S::round(level), S::zero()), S::splat(255.0));
            S::store(x.add(i), level);
            i += S::LANES;
        }
        (scale, -min / scale)
    }
}

/// Minimum and maximum of a head.
#[inline(always)]
unsafe fn range<S: Simd, const HEAD_DIM: usize>(x: *const f32) -> (f32, f32) {
    // SAFETY: reads x[0..HEAD_DIM].
    unsafe {
        // NOTE: minima are maxima of the negated values.
        let mut lows = S::sub(S::zero(), S::splat(*x));
        let mut highs = S::splat(*x);
        let mut i = 0;
        while i + S::LANES <= HEAD_DIM {
            let value = S::load(x.add(i));
            lows = S::max(S::sub(S::zero(), value), lows);
            highs = S::max(value, highs);
            i += S::LANES;
        }
        let (mut min, mut max) = (-S::reduce_max(lows), S::reduce_max(highs));
        while i < HEAD_DIM {
            min = min.min(*x.add(i));
            max = max.max(*x.add(i));
            i += 1;
        }
        (min, max)
    }
}
