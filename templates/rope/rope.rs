//! QK-norm where the model has it, rotary embedding, and the append of K and V to their pages.
//!
//! Rotation as in Hugging Face models: element `i` of the first half of the rotary dimensions pairs
//! with element `i` of the second half; dimensions beyond them pass through.
//!
//! Bound: reads a row of q, k, v and writes q and the pages once. K is stored transposed, so a
//! token touches `head_dim` cache lines; consecutive tokens of a page touch the same ones, hence
//! threads take consecutive rows of a head.

use half::f16;

use super::abi::{RopeArgs, Share};
use super::pages::{CHUNK, KvElement, PageLayout, hadamard, nibble, row_bytes};
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

/// Rotates and appends the rows, split into runs of (KV head, row).
///
/// # Safety
/// `args` as documented on its fields, slots distinct and ascending within a page; the instruction
/// set of `S`.
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
    let group = HEADS / KV_HEADS;
    let mut head = Head::<f32, HEAD_DIM>::new();
    // SAFETY: a unit's query heads and its slot are written by one thread, and so are the bytes
    // that slots of a chunk share.
    unsafe {
        let mut unit = first_unit::<KV>(args, units * share.idx / share.count);
        let end = first_unit::<KV>(args, units * (share.idx + 1) / share.count);
        while unit < end {
            let (kv_head, row) = (unit / args.rows, unit % args.rows);
            let cos_sin = args.cos_sin.add(row * ROTARY_DIM);
            let qkv = args.qkv.add(row * (HEADS + 2 * KV_HEADS) * HEAD_DIM);
            let mut group_head = 0;
            while group_head < group {
                let q = qkv.add((kv_head * group + group_head) * HEAD_DIM);
                if QK_NORM {
                    normalize::<S, HEAD_DIM>(q, args.q_norm, args.eps);
                }
                rotate::<S, ROTARY_DIM>(q, cos_sin);
                if KV::BITS == 4 {
                    hadamard::<HEAD_DIM>(q);
                }
                group_head += 1;
            }
            let slot = *args.slots.add(row) as usize;
            let layout = PageLayout::new(KV::BITS, KV_HEADS, HEAD_DIM, PAGE);
            let page = args.kv.add(slot / PAGE * layout.page_bytes());
            let params: *mut u16 = page.add(layout.params(kv_head)).cast();
            let k = qkv.add((HEADS + kv_head) * HEAD_DIM);
            std::ptr::copy_nonoverlapping(k, head.as_mut_ptr(), HEAD_DIM);
            if QK_NORM {
                normalize::<S, HEAD_DIM>(head.as_mut_ptr(), args.k_norm, args.eps);
            }
            rotate::<S, ROTARY_DIM>(head.as_mut_ptr(), cos_sin);
            let data = page.add(layout.k(kv_head));
            append::<S, KV, HEAD_DIM, PAGE, true>(&mut head, data, params, slot % PAGE);
            let v = qkv.add((HEADS + KV_HEADS + kv_head) * HEAD_DIM);
            std::ptr::copy_nonoverlapping(v, head.as_mut_ptr(), HEAD_DIM);
            let (data, params) = (page.add(layout.v(kv_head)), params.add(2 * PAGE));
            append::<S, KV, HEAD_DIM, PAGE, false>(&mut head, data, params, slot % PAGE);
            unit += 1;
        }
    }
}

/// The first unit from `unit` on that a thread may start with: any, but for int4 none whose slot
/// shares bytes of K with the row before.
#[inline(always)]
unsafe fn first_unit<KV: KvElement>(args: &RopeArgs, mut unit: usize) -> usize {
    if KV::BITS < 8 {
        // SAFETY: rows of the step.
        unsafe {
            while !unit.is_multiple_of(args.rows) {
                let slot = args.slots.add(unit % args.rows);
                if *slot as usize / CHUNK != *slot.sub(1) as usize / CHUNK {
                    break;
                }
                unit += 1;
            }
        }
    }
    unit
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

/// Stores a head as the K or the V of a token, with scale and minimum where the type has them.
#[inline(always)]
unsafe fn append<
    S: Simd,
    KV: KvElement,
    const HEAD_DIM: usize,
    const PAGE: usize,
    const IS_K: bool,
>(
    head: &mut Head<f32, HEAD_DIM>,
    data: *mut u8,
    params: *mut u16,
    place: usize,
) {
    // SAFETY: `place` is below PAGE, K and V of a head hold PAGE · HEAD_DIM elements each, and the
    // scales and minima of either PAGE.
    unsafe {
        let stride = if IS_K { PAGE } else { 1 };
        let first = if IS_K { place } else { place * HEAD_DIM };
        if KV::QUANTIZED {
            if KV::BITS == 4 {
                hadamard::<HEAD_DIM>(head.as_mut_ptr());
            }
            let levels_max = ((1 << KV::BITS) - 1) as f32;
            let (scale, min) = quantize::<S, HEAD_DIM>(head.as_mut_ptr(), levels_max);
            *params.add(place) = scale.to_bits();
            *params.add(PAGE + place) = min.to_bits();
        }
        if KV::BITS == 32 {
            scatter(head.as_mut_ptr(), data.cast::<f32>().add(first), HEAD_DIM, stride);
        } else if KV::BITS == 16 {
            let mut bits = Head::<u16, HEAD_DIM>::new();
            let mut i = 0;
            while i < HEAD_DIM {
                S::store_f16(bits.as_mut_ptr().add(i), S::load(head.as_mut_ptr().add(i)));
                i += S::LANES;
            }
            scatter(bits.as_mut_ptr(), data.cast::<u16>().add(first), HEAD_DIM, stride);
        } else {
            let mut i = 0;
            while i < HEAD_DIM {
                let level = head.x[i] as u8;
                if KV::BITS == 8 {
                    *data.add(first + i * stride) = level;
                } else {
                    let (row, idx) = if IS_K { (i, place) } else { (place, i) };
                    let row_len = if IS_K { PAGE } else { HEAD_DIM };
                    let (byte, shift) = nibble(idx);
                    let at = data.add(row * row_bytes(KV::BITS, row_len) + byte);
                    *at = *at & !(0x0f << shift) | level << shift;
                }
                i += 1;
            }
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

/// Replaces a head by its levels 0..=`levels_max` and returns scale and minimum: value = level ·
/// scale + minimum. Levels are counted in the scale as it is stored.
#[inline(always)]
unsafe fn quantize<S: Simd, const HEAD_DIM: usize>(x: *mut f32, levels_max: f32) -> (f16, f16) {
    // SAFETY: x holds HEAD_DIM values and room for a vector beyond.
    unsafe {
        let (low, high) = range::<S, HEAD_DIM>(x);
        let largest = f16::MAX.to_f32();
        let min = f16::from_f32(low.clamp(-largest, largest));
        let wanted = ((high - min.to_f32()) / levels_max).clamp(0.0, largest);
        let mut scale = f16::from_f32(wanted);
        if scale.to_f32() < wanted {
            // NOTE: rounded up, or the highest level would not reach the maximum.
            scale = f16::from_bits(scale.to_bits() + 1);
        }
        // NOTE: a constant head is level 0 above its minimum.
        let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
        let mut i = 0;
        while i < HEAD_DIM {
            let above = S::sub(S::load(x.add(i)), S::splat(min.to_f32()));
            let level = S::round(S::mul(above, S::splat(inverse)));
            S::store(x.add(i), S::min(S::max(level, S::zero()), S::splat(levels_max)));
            i += S::LANES;
        }
        (scale, min)
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
