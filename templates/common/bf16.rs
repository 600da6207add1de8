//! Vectors that multiply pairs of bfloat16 and add in float32, and round to bfloat16.
//!
//! AVX-512 has an instruction for both. Elsewhere a pair is widened to float32 and multiplied by
//! two multiply-adds. Results of different targets differ in their last bits: the instruction takes
//! denormal numbers for zero, and adds its two products in an order of its own.

use super::simd::Simd;
#[cfg(target_arch = "aarch64")]
use super::simd_neon::Neon;
use super::simd_portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::simd_x86::{Avx512, V3};
#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// What a group of rows is that stands for bfloat16: no row is quantized in groups of 1.
pub const BF16_GROUP: usize = 1;

/// Pairs of bfloat16 in 32-bit lanes, the element of lower index in the low half.
///
/// # Safety
/// As [`Simd`].
#[allow(clippy::missing_safety_doc)]
pub trait DotBf16: Simd {
    /// Per lane: `acc + Σ w·x` over its pair.
    unsafe fn dot_bf16(acc: Self::F32, w: Self::I32, x: Self::I32) -> Self::F32;
    /// `LANES` values rounded to the nearest, ties to even; NaN stays NaN.
    unsafe fn store_bf16(p: *mut u16, x: Self::F32);
}

impl DotBf16 for Portable {
    #[inline(always)]
    unsafe fn dot_bf16(
        acc: <Portable as Simd>::F32,
        w: <Portable as Simd>::I32,
        x: <Portable as Simd>::I32,
    ) -> <Portable as Simd>::F32 {
        const HIGH: u32 = 0xffff_0000;
        let mut sum = acc;
        let mut i = 0;
        while i < Portable::LANES {
            let (w, x) = (w[i] as u32, x[i] as u32);
            sum[i] += f32::from_bits(w << 16) * f32::from_bits(x << 16);
            sum[i] += f32::from_bits(w & HIGH) * f32::from_bits(x & HIGH);
            i += 1;
        }
        sum
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: <Portable as Simd>::F32) {
        let mut i = 0;
        while i < Portable::LANES {
            // SAFETY: `LANES` elements are there.
            unsafe { *p.add(i) = half::bf16::from_f32(x[i]).to_bits() };
            i += 1;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "intrinsics the trait's contract covers")]
impl DotBf16 for V3 {
    #[inline(always)]
    unsafe fn dot_bf16(acc: __m256, w: __m256i, x: __m256i) -> __m256 {
        unsafe {
            let sum = _mm256_fmadd_ps(low(w), low(x), acc);
            _mm256_fmadd_ps(high(w), high(x), sum)
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(x);
            let upper = _mm256_srli_epi32::<16>(bits);
            let is_odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
            // NOTE: a sum would carry some NaN into infinity or zero.
            let nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let words = _mm256_blendv_epi8(rounded, nan, is_nan);
            let (first, last) =
                (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(p.cast(), _mm_packus_epi32(first, last));
        }
    }
}

/// The elements of lower index as float32.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn low(pairs: __m256i) -> __m256 {
    // SAFETY: the callers have AVX2.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)) }
}

/// The elements of higher index as float32.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn high(pairs: __m256i) -> __m256 {
    // SAFETY: the callers have AVX2.
    unsafe {
        _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "intrinsics the trait's contract covers")]
impl DotBf16 for Avx512 {
    #[inline(always)]
    unsafe fn dot_bf16(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        unsafe {
            // NOTE: both types are 512 bits of any content.
            let (w, x) = (
                std::mem::transmute::<__m512i, __m512bh>(w),
                std::mem::transmute::<__m512i, __m512bh>(x),
            );
            _mm512_dpbf16_ps(acc, w, x)
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: __m512) {
        unsafe { p.cast::<__m256bh>().write_unaligned(_mm512_cvtneps_pbh(x)) }
    }
}

#[cfg(target_arch = "aarch64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "intrinsics the trait's contract covers")]
impl DotBf16 for Neon {
    #[inline(always)]
    unsafe fn dot_bf16(acc: float32x4x2_t, w: int32x4x2_t, x: int32x4x2_t) -> float32x4x2_t {
        unsafe { float32x4x2_t(dot_half(acc.0, w.0, x.0), dot_half(acc.1, w.1, x.1)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: float32x4x2_t) {
        unsafe { vst1q_u16(p, vcombine_u16(round_half(x.0), round_half(x.1))) }
    }
}

/// `acc + Σ w·x` over the pairs of four lanes.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
unsafe fn dot_half(acc: float32x4_t, w: int32x4_t, x: int32x4_t) -> float32x4_t {
    // SAFETY: the callers have NEON.
    unsafe {
        let high = vdupq_n_s32(0xffff_0000_u32 as i32);
        let (w_low, x_low) = (vshlq_n_s32::<16>(w), vshlq_n_s32::<16>(x));
        let sum = vfmaq_f32(acc, vreinterpretq_f32_s32(w_low), vreinterpretq_f32_s32(x_low));
        let (w, x) = (vandq_s32(w, high), vandq_s32(x, high));
        vfmaq_f32(sum, vreinterpretq_f32_s32(w), vreinterpretq_f32_s32(x))
    }
}

/// Four values as bfloat16.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
unsafe fn round_half(x: float32x4_t) -> uint16x4_t {
    // SAFETY: the callers have NEON.
    unsafe {
        let bits = vreinterpretq_u32_f32(x);
        let upper = vshrq_n_u32::<16>(bits);
        let half = vaddq_u32(vandq_u32(upper, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
        let rounded = vshrq_n_u32::<16>(vaddq_u32(bits, half));
        // NOTE: as in `V3`.
        let nan = vorrq_u32(upper, vdupq_n_u32(0x40));
        vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, nan))
    }
}

/// Rounds a row `x`, `[K]`, to `out`.
///
/// # Safety
/// Both hold `K` elements; the instruction set of `S`.
#[inline(always)]
pub unsafe fn round_row<S: DotBf16, const K: usize>(x: *const f32, out: *mut u16) {
    // SAFETY: reads and writes [0..K].
    unsafe {
        let mut i = 0;
        while i + S::LANES <= K {
            S::store_bf16(out.add(i), S::load(x.add(i)));
            i += S::LANES;
        }
        while i < K {
            *out.add(i) = half::bf16::from_f32(*x.add(i)).to_bits();
            i += 1;
        }
    }
}
