//! Layout of the KV cache: pages of one layer, as `rope` writes and `paged_attention` reads them.
//!
//! A page holds `PAGE` token slots of every KV head, head after head. The block of one head is
//!
//! ```text
//! K  [head_dim, PAGE]   one dimension of all tokens side by side: 16 tokens are one vector
//! V  [PAGE, head_dim]
//! int8 only: K scale [PAGE], K zero [PAGE], V scale [PAGE], V zero [PAGE], all f32
//! ```
//!
//! int8 is unsigned per token and head: value = (q − zero) · scale, zero being a float.

use super::simd::Simd;

/// Element type of the KV cache.
#[allow(clippy::missing_safety_doc)]
pub trait KvElement: Copy + 'static {
    const SIZE: usize;
    /// Whether scales and zeros follow the data of a head.
    const QUANTIZED: bool;
    /// `S::LANES` elements at `p` as float32, without scale and zero.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32;
}

/// Markers, one for each element type.
#[derive(Clone, Copy)]
pub struct KvF32;
#[derive(Clone, Copy)]
pub struct KvF16;
#[derive(Clone, Copy)]
pub struct KvI8;

impl KvElement for KvF32 {
    const SIZE: usize = 4;
    const QUANTIZED: bool = false;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load(p.cast()) }
    }
}

impl KvElement for KvF16 {
    const SIZE: usize = 2;
    const QUANTIZED: bool = false;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load_f16(p.cast()) }
    }
}

impl KvElement for KvI8 {
    const SIZE: usize = 1;
    const QUANTIZED: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load_u8(p.cast()) }
    }
}

/// Bytes of one head in a page.
pub const fn head_bytes(
    element_size: usize,
    quantized: bool,
    head_dim: usize,
    page: usize,
) -> usize {
    let params = if quantized { 4 * page * 4 } else { 0 };
    2 * page * head_dim * element_size + params
}

/// Bytes of one page of one layer.
pub const fn page_bytes(
    element_size: usize,
    quantized: bool,
    num_kv_heads: usize,
    head_dim: usize,
    page: usize,
) -> usize {
    num_kv_heads * head_bytes(element_size, quantized, head_dim, page)
}

/// Offset of V in a head's block.
pub const fn v_offset(element_size: usize, head_dim: usize, page: usize) -> usize {
    page * head_dim * element_size
}

/// Offset of the scales and zeros in a head's block.
pub const fn params_offset(element_size: usize, head_dim: usize, page: usize) -> usize {
    2 * page * head_dim * element_size
}
