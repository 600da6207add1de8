//! Vector types that kernels are written over: one template body serves every instruction set.
//!
//! A kernel body is an `#[inline(always)]` function generic over [`Simd`]; the generated shell
//! around it carries the `#[target_feature]`, so that all of these methods become single
//! instructions there. Bodies use plain loops and no closures: a closure would be a function
//! without those features.

/// A float32 vector register, its integer twin, and what kernels do with them.
///
/// # Safety
/// Every method needs the instruction set of its implementor; pointer methods need `LANES` valid
/// elements unless they say otherwise. No alignment is needed.
#[allow(clippy::missing_safety_doc)]
pub trait Simd: Copy + 'static {
    /// float32 lanes; also the columns of a packed weight tile.
    const LANES: usize;
    /// What [`Simd::dot_i8`] adds per activation: its weights are bytes `w + 128`, and the result
    /// is `Σ w·a + DOT_I8_BIAS · Σ a`.
    const DOT_I8_BIAS: i32;
    /// Vectors beside each other in the largest register block.
    const BLOCK_TILES: usize;
    type F32: Copy;
    type I32: Copy;

    unsafe fn zero() -> Self::F32;
    unsafe fn splat(x: f32) -> Self::F32;
    unsafe fn load(p: *const f32) -> Self::F32;
    unsafe fn store(p: *mut f32, x: Self::F32);
    /// The first `n < LANES` elements, zero beyond.
    unsafe fn load_first(p: *const f32, n: usize) -> Self::F32;
    /// Only the first `n < LANES` elements.
    unsafe fn store_first(p: *mut f32, x: Self::F32, n: usize);
    unsafe fn load_f16(p: *const u16) -> Self::F32;
    unsafe fn load_bf16(p: *const u16) -> Self::F32;
    unsafe fn load_u8(p: *const u8) -> Self::F32;
    /// `LANES` of the 16 nibbles in eight bytes, from nibble `first` on, which is 0 or 8: the low
    /// nibbles come first, then the high ones.
    unsafe fn load_u4(p: *const u8, first: usize) -> Self::F32;
    unsafe fn store_f16(p: *mut u16, x: Self::F32);

    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn sub(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn div(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn max(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn min(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn abs(a: Self::F32) -> Self::F32;
    /// `a · b + c`
    unsafe fn fma(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F32) -> Self::F32;
    /// `a · 2^n` for integral `n` up to 127 and `a` of about 1; where the result lies below 2^−126,
    /// it or 0.
    unsafe fn mul_pow2(a: Self::F32, n: Self::F32) -> Self::F32;
    /// Lanes added pairwise, halves first.
    unsafe fn reduce_add(a: Self::F32) -> f32;
    unsafe fn reduce_max(a: Self::F32) -> f32;

    unsafe fn zero_i32() -> Self::I32;
    unsafe fn splat_i32(x: i32) -> Self::I32;
    /// `LANES` 32-bit words, or as many groups of four bytes.
    unsafe fn load_i32(p: *const u8) -> Self::I32;
    unsafe fn store_i32(p: *mut u8, x: Self::I32);
    /// `LANES` bytes, each widened.
    unsafe fn load_u8_i32(p: *const u8) -> Self::I32;
    unsafe fn add_i32(a: Self::I32, b: Self::I32) -> Self::I32;
    unsafe fn sub_i32(a: Self::I32, b: Self::I32) -> Self::I32;
    unsafe fn mul_i32(a: Self::I32, b: Self::I32) -> Self::I32;
    unsafe fn to_f32(a: Self::I32) -> Self::F32;
    /// The low nibble of every byte.
    unsafe fn low_nibbles(a: Self::I32) -> Self::I32;
    /// The high nibble of every byte.
    unsafe fn high_nibbles(a: Self::I32) -> Self::I32;
    /// Byte `BYTE` of every lane.
    unsafe fn byte<const BYTE: u32>(a: Self::I32) -> Self::I32;
    /// Per lane: `acc + Σ u·s` over its four bytes, `u` unsigned and at most 31, `s` signed.
    unsafe fn dot_u4(acc: Self::I32, u: Self::I32, s: Self::I32) -> Self::I32;
    /// Per lane: `acc + Σ w·a (+ DOT_I8_BIAS · Σ a)` over its four bytes, `w + 128` unsigned bytes,
    /// `a` signed and above −128.
    unsafe fn dot_i8(acc: Self::I32, w: Self::I32, a: Self::I32) -> Self::I32;
    /// Nearest integers (ties to even) as signed bytes; inputs lie in −127..=127.
    unsafe fn store_i8(p: *mut i8, x: Self::F32) -> Self::I32;
    unsafe fn reduce_add_i32(a: Self::I32) -> i32;
    /// Asks for the cache line at `p`, which may be anywhere.
    unsafe fn prefetch(p: *const u8);

    /// `e^x`, relative error below 2e-7: a polynomial after range reduction as in Cephes, of the
    /// least largest error among those of degree 5 that give 1 for 0. Inputs stay below 88; of
    /// −87 and less the result may be 0, of −105 and less it is.
    #[inline(always)]
    unsafe fn exp(x: Self::F32) -> Self::F32 {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let x = Self::max(x, Self::splat(-105.0));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            // NOTE: ln 2 in two parts, so that n · ln 2 is subtracted without rounding.
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(8.290_315e-3);
            p = Self::fma(p, r, Self::splat(4.189_793e-2));
            p = Self::fma(p, r, Self::splat(1.666_763_6e-1));
            p = Self::fma(p, r, Self::splat(4.999_915e-1));
            p = Self::fma(p, r, Self::splat(9.999_997e-1));
            p = Self::fma(p, r, Self::splat(1.0));
            Self::mul_pow2(p, n)
        }
    }

    /// `2^x`, as exact as [`Simd::exp`]. Inputs are finite and stay below 127; of −126 and less the
    /// result may be 0, of −151 and less it is.
    #[inline(always)]
    unsafe fn exp2(x: Self::F32) -> Self::F32 {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let n = Self::round(x);
            let r = Self::sub(x, n);
            let mut p = Self::splat(1.326_472_7e-3);
            p = Self::fma(p, r, Self::splat(9.671_513e-3));
            p = Self::fma(p, r, Self::splat(5.550_733_6e-2));
            p = Self::fma(p, r, Self::splat(2.402_224_2e-1));
            p = Self::fma(p, r, Self::splat(6.931_47e-1));
            p = Self::fma(p, r, Self::splat(1.0));
            Self::mul_pow2(p, n)
        }
    }
}

/// Storage type of dense weights and of the embedding table.
#[allow(clippy::missing_safety_doc)]
pub trait Element: Copy + 'static {
    /// Bytes of one element.
    const SIZE: usize;
    /// `S::LANES` elements at `p` as float32.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32;
    /// One element at `p` as float32.
    unsafe fn get(p: *const u8) -> f32;
}

#[derive(Clone, Copy)]
pub struct F32;
#[derive(Clone, Copy)]
pub struct F16;
#[derive(Clone, Copy)]
pub struct BF16;

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8) -> f32 {
        // SAFETY: as the caller promises.
        unsafe { p.cast::<f32>().read_unaligned() }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load_f16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8) -> f32 {
        // SAFETY: as the caller promises.
        unsafe { half::f16::from_bits(p.cast::<u16>().read_unaligned()).to_f32() }
    }
}

impl Element for BF16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8) -> f32 {
        // SAFETY: as the caller promises.
        unsafe { half::bf16::from_bits(p.cast::<u16>().read_unaligned()).to_f32() }
    }
}
