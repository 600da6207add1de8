//! Arguments of generated CPU kernels: raw pointers, because the threads of one call write disjoint
//! parts of the same output.
//!
//! Every kernel is `unsafe fn(&Args, Share)`. It computes the part of the output that `Share` names
//! and nothing else; calling it once for every `idx` in `0..count` computes all of it. Which part
//! is computed by whom never changes a result.

/// The part of one kernel call that one thread computes, and that thread's scratch memory.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub idx: usize,
    pub count: usize,
    /// 64-byte aligned, at least `Kernel::scratch_bytes` long, exclusively this thread's.
    pub scratch: *mut u8,
}

impl Share {
    /// This share of `0..total`, in contiguous ranges whose lengths differ by at most one.
    #[inline(always)]
    pub fn range(&self, total: usize) -> (usize, usize) {
        (total * self.idx / self.count, total * (self.idx + 1) / self.count)
    }
}

/// Rows a linear reads in float32, `[rows, k]`, or in int8; [`GemmBf16Args`] has those in bfloat16.
#[derive(Clone, Copy, Debug)]
pub struct RowsIn {
    /// `[rows, k]`, null in the int8 form.
    pub f32: *const f32,
    /// `[rows, int8_stride(k)]`, null in the float form.
    pub q: *const i8,
    /// `[rows, k / group]`: value = q · scale.
    pub scales: *const f32,
    /// `[rows, k / group]`: sum of q over the group.
    pub sums: *const i32,
}

/// Rows to be written in one of three forms (`RowFormat`), as [`RowsIn`] and [`GemmBf16Args`] say.
/// What belongs to the other forms is null.
#[derive(Clone, Copy, Debug)]
pub struct RowsOut {
    pub f32: *mut f32,
    /// `[rows, bf16_stride(k)]`
    pub bf16: *mut u16,
    pub q: *mut i8,
    pub scales: *mut f32,
    pub sums: *mut i32,
}

/// Bytes from one int8 row of `k` elements to the next; what lies beyond `k` is zero.
pub const fn int8_stride(k: usize) -> usize {
    k.next_multiple_of(64)
}

/// Elements from one bfloat16 row of `k` elements to the next; what lies beyond `k` is zero.
pub const fn bf16_stride(k: usize) -> usize {
    k.next_multiple_of(32)
}

#[derive(Clone, Copy, Debug)]
pub struct EmbedArgs {
    pub rows: usize,
    /// `[rows]`, each below the vocabulary size.
    pub tokens: *const u32,
    /// `[vocab, hidden]` in the kernel's element type.
    pub table: *const u8,
    /// `[rows, hidden]`
    pub out: *mut f32,
}

/// `residual[src] += delta[src]; out[i] = rms_norm(residual[src]) · weight` with `src = select[i]`,
/// or `src = i` without a selection.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormArgs {
    pub rows: usize,
    /// `[rows]` distinct row indices, or null.
    pub select: *const u32,
    /// `[.., hidden]`
    pub residual: *mut f32,
    /// `[.., hidden]`, or null.
    pub delta: *const f32,
    /// `[hidden]`
    pub weight: *const f32,
    pub eps: f32,
    pub out: RowsOut,
}

#[derive(Clone, Copy, Debug)]
pub struct GemmArgs {
    pub rows: usize,
    pub x: RowsIn,
    /// Packed panels, see `templates/gemm/gemm.rs`.
    pub weight: *const u8,
    /// int8 weights: `[n]` padded to whole panels; else null.
    pub scales: *const f32,
    /// `[n]`, or null.
    pub bias: *const f32,
    /// `[rows, n]`
    pub out: *mut f32,
}

#[derive(Clone, Copy, Debug)]
pub struct GemmBf16Args {
    pub rows: usize,
    /// `[rows, bf16_stride(k)]`
    pub x: *const u16,
    /// Packed panels, see `templates/gemm_bf16/gemm_bf16.rs`.
    pub weight: *const u8,
    /// `[n]`, or null.
    pub bias: *const f32,
    /// `[rows, n]`
    pub out: *mut f32,
}

#[derive(Clone, Copy, Debug)]
pub struct AwqGemmArgs {
    pub rows: usize,
    pub x: RowsIn,
    /// Packed nibble panels, see `templates/awq_gemm/awq_gemm.rs`.
    pub weight: *const u8,
    /// float16 bits, `[panel][group][tile in panel][lane]`.
    pub scales: *const u16,
    /// As `scales`, one byte each.
    pub zeros: *const u8,
    /// `[n]`, or null.
    pub bias: *const f32,
    /// `[rows, n]`
    pub out: *mut f32,
}

#[derive(Clone, Copy, Debug)]
pub struct RopeArgs {
    pub rows: usize,
    /// `[rows, (num_heads + 2 num_kv_heads) · head_dim]`: q is rotated in place, k and v are read.
    pub qkv: *mut f32,
    /// `[rows, rotary_dim]`: cosines of the `rotary_dim / 2` frequencies, then their sines.
    pub cos_sin: *const f32,
    /// `[rows]`: page id · page size + place in the page.
    pub slots: *const u32,
    /// The layer's pages, see `templates/common/pages.rs`.
    pub kv: *mut u8,
    /// `[head_dim]` weights of QK-norm, or null.
    pub q_norm: *const f32,
    pub k_norm: *const f32,
    pub eps: f32,
}

/// The rows of one sequence in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceSpan {
    pub first_row: u32,
    pub num_rows: u32,
    /// Tokens in the KV cache, these rows included; row `i` sees `context_len - num_rows + i + 1`.
    pub context_len: u32,
    /// Where the sequence's pages start in the page table.
    pub first_page: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct PagedAttentionArgs {
    pub spans: *const SequenceSpan,
    pub num_spans: usize,
    /// `[rows, (num_heads + 2 num_kv_heads) · head_dim]`, q rotated.
    pub qkv: *const f32,
    /// The layer's pages.
    pub kv: *const u8,
    /// Page ids of all sequences.
    pub page_table: *const u32,
    pub softmax_scale: f32,
    /// `[rows, num_heads · head_dim]`
    pub out: *mut f32,
}

#[derive(Clone, Copy, Debug)]
pub struct SiluAndMulArgs {
    pub rows: usize,
    /// `[rows, 2 · intermediate]`: gate, then up.
    pub gate_up: *const f32,
    pub out: RowsOut,
}

#[derive(Clone, Copy, Debug)]
pub struct QuantizeArgs {
    pub rows: usize,
    /// `[rows, k]`
    pub x: *const f32,
    pub out: RowsOut,
}

/// What sampling needs to know of a row of logits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogitStats {
    pub max: f32,
    /// The smallest index of the maximum.
    pub argmax: u32,
    pub log_sum_exp: f32,
}

#[derive(Clone, Copy, Debug)]
pub struct SampleArgs {
    pub rows: usize,
    /// `[rows, vocab]`
    pub logits: *const f32,
    /// `[rows]`
    pub out: *mut LogitStats,
}
