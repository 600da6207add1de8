//! Layout of the KV cache: pages of one layer, as `rope` writes and `paged_attention` reads them.
//!
//! A page holds `PAGE` token slots of every KV head, head after head. The block of one head is
//!
//! ```text
//! K  [head_dim, PAGE]   one dimension of all tokens side by side: 16 tokens are one vector
//! V  [PAGE, head_dim]
//! int8, int4 only: K scale [PAGE], K minimum [PAGE], V scale [PAGE], V minimum [PAGE], all f16
//! ```
//!
//! int8 and int4 are unsigned levels, per token and head: value = level · scale + minimum.
//!
//! int4 lies in chunks of 16 elements of a row, eight bytes: byte `i` has element `i` in its low
//! and element `i + 8` in its high nibble, so that a chunk is one vector of 16 lanes or two of 8.
//! Rows are padded to whole chunks.
//!
//! int4 holds rotated heads, see [`hadamard`]: keys have a few dimensions far larger than the
//! others, which would take all of the 16 levels.

use super::simd::Simd;

/// Element type of the KV cache.
#[allow(clippy::missing_safety_doc)]
pub trait KvElement: Copy + 'static {
    const BITS: usize;
    /// Whether scales and minima follow the data of a head.
    const QUANTIZED: bool = is_quantized(Self::BITS);
    /// `S::LANES` elements of the row at `row`, from element `idx` on, as float32, without scale
    /// and minimum. For int4 `idx` is a multiple of `LANES`.
    unsafe fn load<S: Simd>(row: *const u8, idx: usize) -> S::F32;
}

/// Markers, one for each element type.
#[derive(Clone, Copy)]
pub struct KvF32;
#[derive(Clone, Copy)]
pub struct KvF16;
#[derive(Clone, Copy)]
pub struct KvI8;
#[derive(Clone, Copy)]
pub struct KvI4;

impl KvElement for KvF32 {
    const BITS: usize = 32;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, idx: usize) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load(row.cast::<f32>().add(idx)) }
    }
}

impl KvElement for KvF16 {
    const BITS: usize = 16;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, idx: usize) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load_f16(row.cast::<u16>().add(idx)) }
    }
}

impl KvElement for KvI8 {
    const BITS: usize = 8;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, idx: usize) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load_u8(row.add(idx)) }
    }
}

impl KvElement for KvI4 {
    const BITS: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, idx: usize) -> S::F32 {
        // SAFETY: as the caller promises.
        unsafe { S::load_u4(row.add(idx / CHUNK * (CHUNK / 2)), idx % CHUNK) }
    }
}

/// int4 elements that lie together.
pub const CHUNK: usize = 16;

/// Where int4 element `idx` of a row lies: its byte, and how far that is shifted.
#[inline(always)]
pub const fn nibble(idx: usize) -> (usize, u32) {
    let in_chunk = idx % CHUNK;
    (idx / CHUNK * (CHUNK / 2) + in_chunk % (CHUNK / 2), if in_chunk < CHUNK / 2 { 0 } else { 4 })
}

/// Whether elements of so many bits have scales and minima.
pub const fn is_quantized(bits: usize) -> bool {
    bits <= 8
}

/// Bytes of a row of `len` elements.
pub const fn row_bytes(bits: usize, len: usize) -> usize {
    if bits == 4 { len.next_multiple_of(CHUNK) / 2 } else { len * bits / 8 }
}

/// Offset of V in a head's block.
pub const fn v_offset(bits: usize, head_dim: usize, page: usize) -> usize {
    head_dim * row_bytes(bits, page)
}

/// Offset of the scales and minima in a head's block.
pub const fn params_offset(bits: usize, head_dim: usize, page: usize) -> usize {
    v_offset(bits, head_dim, page) + page * row_bytes(bits, head_dim)
}

/// Bytes of one head in a page.
pub const fn head_bytes(bits: usize, head_dim: usize, page: usize) -> usize {
    let params = if is_quantized(bits) { 4 * page * 2 } else { 0 };
    params_offset(bits, head_dim, page) + params
}

/// Bytes of one page of one layer.
pub const fn page_bytes(bits: usize, num_kv_heads: usize, head_dim: usize, page: usize) -> usize {
    num_kv_heads * head_bytes(bits, head_dim, page)
}

/// Multiplies a head by an orthogonal Hadamard matrix, block by block where `HEAD_DIM` is no power
/// of two. It is its own inverse, and applied to queries and keys it leaves their products alone,
/// so only the distribution of the values changes: the energy of a large dimension is spread over
/// all (QuaRot, arXiv 2404.00456).
///
/// # Safety
/// `x` holds `HEAD_DIM` values.
#[inline(always)]
pub unsafe fn hadamard<const HEAD_DIM: usize>(x: *mut f32) {
    let block = 1 << HEAD_DIM.trailing_zeros();
    let factor = 1.0 / (block as f32).sqrt();
    // SAFETY: blocks tile the head.
    unsafe {
        let x = &mut *x.cast::<[f32; HEAD_DIM]>();
        let mut half = 1;
        while half < block {
            let mut first = 0;
            while first < HEAD_DIM {
                let mut i = first;
                while i < first + half {
                    let (a, b) = (x[i], x[i + half]);
                    (x[i], x[i + half]) = (a + b, a - b);
                    i += 1;
                }
                first += 2 * half;
            }
            half *= 2;
        }
        let mut i = 0;
        while i < HEAD_DIM {
            x[i] *= factor;
            i += 1;
        }
    }
}
