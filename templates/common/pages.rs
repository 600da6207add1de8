//! Layout of the KV cache: pages of one layer, as `rope` writes and `paged_attention` reads them.
//!
//! A page holds `PAGE` token slots of every KV head:
//!
//! ```text
//! K  [kv_heads, head_dim, PAGE]   one dimension of all tokens side by side: 16 are one vector
//! V  [kv_heads, PAGE, head_dim]
//! int8, int4 only, f16: [kv_heads, 4, PAGE], K's scales and minima, then V's
//! ```
//!
//! in the order in which decoding reads it, because memory is fastest where it is read forward.
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

/// Where the parts of a page lie.
#[derive(Clone, Copy, Debug)]
pub struct PageLayout {
    /// Bytes of one head's K.
    pub k_bytes: usize,
    /// Bytes of one head's V.
    pub v_bytes: usize,
    /// Bytes of one head's scales and minima.
    pub params_bytes: usize,
    num_kv_heads: usize,
}

impl PageLayout {
    /// The layout of pages of `page` slots with elements of `bits` bits.
    pub const fn new(bits: usize, num_kv_heads: usize, head_dim: usize, page: usize) -> Self {
        PageLayout {
            k_bytes: head_dim * row_bytes(bits, page),
            v_bytes: page * row_bytes(bits, head_dim),
            params_bytes: if is_quantized(bits) { 4 * page * 2 } else { 0 },
            num_kv_heads,
        }
    }

    /// Offset of a head's K.
    pub const fn k(&self, kv_head: usize) -> usize {
        kv_head * self.k_bytes
    }

    /// Offset of a head's V.
    pub const fn v(&self, kv_head: usize) -> usize {
        self.num_kv_heads * self.k_bytes + kv_head * self.v_bytes
    }

    /// Offset of a head's scales and minima.
    pub const fn params(&self, kv_head: usize) -> usize {
        self.num_kv_heads * (self.k_bytes + self.v_bytes) + kv_head * self.params_bytes
    }

    /// Bytes of one page of one layer.
    pub const fn page_bytes(&self) -> usize {
        self.params(self.num_kv_heads)
    }
}

/// Bytes of one page of one layer.
pub const fn page_bytes(bits: usize, num_kv_heads: usize, head_dim: usize, page: usize) -> usize {
    PageLayout::new(bits, num_kv_heads, head_dim, page).page_bytes()
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
