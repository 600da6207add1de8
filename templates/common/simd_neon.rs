//! [`Simd`] for aarch64: NEON with the dot product extension.

use super::simd::Simd;
use std::arch::aarch64::*;
use std::arch::asm;

/// NEON and dot product; a vector is a pair of registers.
///
/// One register would hold four lanes. Eight are as many as AVX2 has, so that packed weights,
/// register blocks and the chunks of int4 pages are the same; the 32 registers hold 16 such
/// vectors, again as there. A broadcast scalar is one register: its halves are equal.
#[derive(Clone, Copy)]
pub struct Neon;

/// Applies an intrinsic to both halves.
macro_rules! halves {
    ($pair:ident, $f:path, $($x:expr),+) => {
        $pair($f($($x.0),+), $f($($x.1),+))
    };
}

#[allow(clippy::undocumented_unsafe_blocks, reason = "intrinsics the trait's contract covers")]
impl Simd for Neon {
    const LANES: usize = 8;
    const DOT_I8_BIAS: i32 = 0;
    const BLOCK_TILES: usize = 2;
    type F32 = float32x4x2_t;
    type I32 = int32x4x2_t;

    #[inline(always)]
    unsafe fn zero() -> float32x4x2_t {
        unsafe { Self::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4x2_t {
        unsafe { float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4x2_t {
        unsafe { float32x4x2_t(vld1q_f32(p), vld1q_f32(p.add(4))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: float32x4x2_t) {
        unsafe {
            vst1q_f32(p, x.0);
            vst1q_f32(p.add(4), x.1);
        }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> float32x4x2_t {
        unsafe {
            let mut lanes = [0.0; 8];
            let mut i = 0;
            while i < n {
                lanes[i] = p.add(i).read_unaligned();
                i += 1;
            }
            Self::load(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, x: float32x4x2_t, n: usize) {
        unsafe {
            let mut lanes = [0.0; 8];
            Self::store(lanes.as_mut_ptr(), x);
            let mut i = 0;
            while i < n {
                p.add(i).write_unaligned(lanes[i]);
                i += 1;
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> float32x4x2_t {
        unsafe {
            let halves = vld1q_u16(p);
            let (low, high): (float32x4_t, float32x4_t);
            // NOTE: the intrinsics want `f16`, which Rust has not yet. Rounding and exceptions are
            // the conversion's own, so that flags are not said to be kept.
            asm!(
                "fcvtl {low:v}.4s, {halves:v}.4h",
                "fcvtl2 {high:v}.4s, {halves:v}.8h",
                low = out(vreg) low,
                high = lateout(vreg) high,
                halves = in(vreg) halves,
                options(pure, nomem, nostack),
            );
            float32x4x2_t(low, high)
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> float32x4x2_t {
        unsafe {
            let halves = vld1q_u16(p);
            let low = vshll_n_u16::<16>(vget_low_u16(halves));
            let high = vshll_high_n_u16::<16>(halves);
            float32x4x2_t(vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> float32x4x2_t {
        unsafe { Self::to_f32(widen(vld1_u8(p))) }
    }
    #[inline(always)]
    unsafe fn load_u4(p: *const u8, first: usize) -> float32x4x2_t {
        unsafe {
            let bytes = vld1_u8(p);
            let nibbles = match first {
                0 => vand_u8(bytes, vdup_n_u8(0x0f)),
                _ => vshr_n_u8::<4>(bytes),
            };
            Self::to_f32(widen(nibbles))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: float32x4x2_t) {
        unsafe {
            let halves: uint16x8_t;
            // NOTE: see `load_f16`. Programs of the system run with rounding to nearest even.
            asm!(
                "fcvtn {halves:v}.4h, {low:v}.4s",
                "fcvtn2 {halves:v}.8h, {high:v}.4s",
                halves = out(vreg) halves,
                low = in(vreg) x.0,
                high = in(vreg) x.1,
                options(pure, nomem, nostack),
            );
            vst1q_u16(p, halves);
        }
    }

    #[inline(always)]
    unsafe fn add(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vaddq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vsubq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vmulq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vdivq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, larger, a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, smaller, a, b) }
    }
    #[inline(always)]
    unsafe fn abs(a: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vabsq_f32, a) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4x2_t, b: float32x4x2_t, c: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vfmaq_f32, c, a, b) }
    }
    #[inline(always)]
    unsafe fn round(a: float32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vrndnq_f32, a) }
    }
    #[inline(always)]
    unsafe fn mul_pow2(a: float32x4x2_t, n: float32x4x2_t) -> float32x4x2_t {
        unsafe {
            let n = nearest(Self::max(n, Self::splat(-127.0)));
            let biased = Self::add_i32(n, Self::splat_i32(127));
            let bits = halves!(int32x4x2_t, vshlq_n_s32::<23>, biased);
            Self::mul(a, halves!(float32x4x2_t, vreinterpretq_f32_s32, bits))
        }
    }
    #[inline(always)]
    unsafe fn reduce_add(a: float32x4x2_t) -> f32 {
        unsafe {
            let x = vaddq_f32(a.0, a.1);
            vpadds_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)))
        }
    }
    #[inline(always)]
    unsafe fn reduce_max(a: float32x4x2_t) -> f32 {
        unsafe {
            let x = larger(a.0, a.1);
            let x = larger(x, vextq_f32::<2>(x, x));
            vgetq_lane_f32::<0>(larger(x, vextq_f32::<1>(x, x)))
        }
    }

    #[inline(always)]
    unsafe fn zero_i32() -> int32x4x2_t {
        unsafe { Self::splat_i32(0) }
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> int32x4x2_t {
        unsafe { int32x4x2_t(vdupq_n_s32(x), vdupq_n_s32(x)) }
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u8) -> int32x4x2_t {
        // NOTE: as bytes, which need no alignment.
        unsafe {
            let (low, high) = (vld1q_u8(p), vld1q_u8(p.add(16)));
            int32x4x2_t(vreinterpretq_s32_u8(low), vreinterpretq_s32_u8(high))
        }
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u8, x: int32x4x2_t) {
        unsafe {
            vst1q_u8(p, vreinterpretq_u8_s32(x.0));
            vst1q_u8(p.add(16), vreinterpretq_u8_s32(x.1));
        }
    }
    #[inline(always)]
    unsafe fn load_u8_i32(p: *const u8) -> int32x4x2_t {
        unsafe { widen(vld1_u8(p)) }
    }
    #[inline(always)]
    unsafe fn add_i32(a: int32x4x2_t, b: int32x4x2_t) -> int32x4x2_t {
        unsafe { halves!(int32x4x2_t, vaddq_s32, a, b) }
    }
    #[inline(always)]
    unsafe fn sub_i32(a: int32x4x2_t, b: int32x4x2_t) -> int32x4x2_t {
        unsafe { halves!(int32x4x2_t, vsubq_s32, a, b) }
    }
    #[inline(always)]
    unsafe fn mul_i32(a: int32x4x2_t, b: int32x4x2_t) -> int32x4x2_t {
        unsafe { halves!(int32x4x2_t, vmulq_s32, a, b) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: int32x4x2_t) -> float32x4x2_t {
        unsafe { halves!(float32x4x2_t, vcvtq_f32_s32, a) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: int32x4x2_t) -> int32x4x2_t {
        unsafe {
            let mask = vdupq_n_s32(0x0f0f_0f0f);
            int32x4x2_t(vandq_s32(a.0, mask), vandq_s32(a.1, mask))
        }
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: int32x4x2_t) -> int32x4x2_t {
        unsafe { halves!(int32x4x2_t, high_nibbles, a) }
    }
    #[inline(always)]
    unsafe fn byte<const BYTE: u32>(a: int32x4x2_t) -> int32x4x2_t {
        unsafe { halves!(int32x4x2_t, byte::<BYTE>, a) }
    }
    #[inline(always)]
    unsafe fn dot_u4(acc: int32x4x2_t, u: int32x4x2_t, s: int32x4x2_t) -> int32x4x2_t {
        // NOTE: up to 31, an unsigned byte is a signed one as well.
        unsafe { halves!(int32x4x2_t, dot, acc, u, s) }
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: int32x4x2_t, w: int32x4x2_t, a: int32x4x2_t) -> int32x4x2_t {
        unsafe {
            // The highest bit of `w + 128` turned over is `w` as a signed byte.
            let high_bits = vdupq_n_s32(0x8080_8080u32 as i32);
            let w = int32x4x2_t(veorq_s32(w.0, high_bits), veorq_s32(w.1, high_bits));
            halves!(int32x4x2_t, dot, acc, w, a)
        }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: float32x4x2_t) -> int32x4x2_t {
        unsafe {
            let q = nearest(x);
            let words = vcombine_s16(vqmovn_s32(q.0), vqmovn_s32(q.1));
            vst1_s8(p, vqmovn_s16(words));
            q
        }
    }
    #[inline(always)]
    unsafe fn reduce_add_i32(a: int32x4x2_t) -> i32 {
        unsafe { vaddvq_s32(vaddq_s32(a.0, a.1)) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe {
            asm!(
                "prfm pldl1keep, [{p}]",
                p = in(reg) p,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
}

/// `a > b ? a : b`, as the other instruction sets have it where one is no number.
#[inline(always)]
unsafe fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: every aarch64 has NEON.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

/// `a < b ? a : b`
#[inline(always)]
unsafe fn smaller(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: as above.
    unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
}

/// Nearest integers, ties to even.
#[inline(always)]
unsafe fn nearest(x: float32x4x2_t) -> int32x4x2_t {
    // SAFETY: as above.
    unsafe { halves!(int32x4x2_t, vcvtnq_s32_f32, x) }
}

#[inline(always)]
unsafe fn widen(bytes: uint8x8_t) -> int32x4x2_t {
    // SAFETY: as above.
    unsafe {
        let words = vmovl_u8(bytes);
        let (low, high) = (vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words));
        int32x4x2_t(vreinterpretq_s32_u32(low), vreinterpretq_s32_u32(high))
    }
}

#[inline(always)]
unsafe fn high_nibbles(a: int32x4_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe { vreinterpretq_s32_u8(vshrq_n_u8::<4>(vreinterpretq_u8_s32(a))) }
}

#[inline(always)]
unsafe fn byte<const BYTE: u32>(a: int32x4_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        let a = vreinterpretq_u32_s32(a);
        let shifted = match BYTE {
            0 => a,
            1 => vshrq_n_u32::<8>(a),
            2 => vshrq_n_u32::<16>(a),
            _ => vshrq_n_u32::<24>(a),
        };
        vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32(0xff)))
    }
}

/// Per lane: `acc + Σ a·b` over four signed bytes.
///
/// # Safety
/// The machine has dot products, and so has the function that this is inlined into.
#[inline(always)]
unsafe fn dot(acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    let mut sums = acc;
    // SAFETY: as the caller promises. `vdotq_s32` would be this, but it is not stable.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
