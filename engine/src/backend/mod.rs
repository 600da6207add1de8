//! The ops of a decoder and where they run.

pub mod cpu;
pub mod null;
pub mod reference;

use crate::batch::{Batch, PageCopy};
use crate::error::Error;
use crate::kernels::abi::LogitStats;
use crate::model::linear::{DenseView, LinearSource};
use bespoke_kernel_gen::spec::LinearRole;

/// Weights, activations and KV cache of one device, and the ops over them.
///
/// Everything is allocated by the `load_*` and `new_*` methods; the ops allocate nothing. Row
/// counts are passed with each op: buffers hold `rows_max` rows and ops use the first `num_rows` of
/// them.
pub trait Backend {
    /// A linear's weights in the layout its kernel wants.
    type Linear;
    type Embedding;
    /// A norm's weight vector.
    type Norm;
    /// float32 `[rows_max, width]`.
    type Rows;
    /// Rows in the form that a linear reads.
    type Input;
    type KvCache;

    fn load_linear(
        &mut self,
        role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<Self::Linear, Error>;
    fn load_embedding(&mut self, source: &DenseView<'_>) -> Result<Self::Embedding, Error>;
    fn load_norm(&mut self, weight: Vec<f32>) -> Result<Self::Norm, Error>;
    fn new_rows(&mut self, rows_max: usize, width: usize) -> Result<Self::Rows, Error>;
    /// Rows as the linear `role` reads them.
    fn new_input(&mut self, rows_max: usize, role: LinearRole) -> Result<Self::Input, Error>;
    fn new_kv_cache(&mut self, num_pages: usize) -> Result<Self::KvCache, Error>;
    /// Bytes of the KV cache one page takes, over all layers.
    fn page_bytes(&self) -> usize;
    /// Bytes held by weights.
    fn weights_bytes(&self) -> usize;

    /// Copies whole pages over all layers, one after the other: a copy may overwrite the source of
    /// an earlier one, and may read what an earlier one wrote.
    fn copy_pages(&mut self, copies: &[PageCopy], kv_cache: &mut Self::KvCache);

    /// Appends the bytes of a page over all layers, [`Backend::page_bytes`] of them, to `out`. Only
    /// [`Backend::write_page`] of the same backend and model knows what they mean.
    fn read_page(&self, page: u32, kv_cache: &Self::KvCache, out: &mut Vec<u8>);

    /// Fills a page with what [`Backend::read_page`] gave.
    fn write_page(&mut self, page: u32, bytes: &[u8], kv_cache: &mut Self::KvCache);

    /// `out[i] = table[tokens[i]]`
    fn embed(&mut self, table: &Self::Embedding, tokens: &[u32], out: &mut Self::Rows);

    /// `residual += delta; out = rms_norm(residual) · weight`, over the first `num_rows` rows.
    fn rms_norm(
        &mut self,
        num_rows: usize,
        residual: &mut Self::Rows,
        delta: Option<&Self::Rows>,
        weight: &Self::Norm,
        out: &mut Self::Input,
    );

    /// As [`Backend::rms_norm`] over the rows `select`, which become rows 0.. of `out`.
    fn rms_norm_select(
        &mut self,
        select: &[u32],
        residual: &mut Self::Rows,
        delta: Option<&Self::Rows>,
        weight: &Self::Norm,
        out: &mut Self::Input,
    );

    /// `out = x · weightᵀ + bias`
    fn linear(
        &mut self,
        num_rows: usize,
        weight: &Self::Linear,
        x: &Self::Input,
        out: &mut Self::Rows,
    );

    /// QK-norm (where `qk_norm` holds the q and k weights), rotation of q in place, and the append
    /// of rotated k and of v to the pages of `layer_idx`.
    fn rope(
        &mut self,
        batch: &Batch,
        layer_idx: usize,
        qkv: &mut Self::Rows,
        qk_norm: Option<(&Self::Norm, &Self::Norm)>,
        kv_cache: &mut Self::KvCache,
    );

    /// Causal attention of the batch's rows over their sequences' pages.
    fn paged_attention(
        &mut self,
        batch: &Batch,
        layer_idx: usize,
        qkv: &Self::Rows,
        kv_cache: &Self::KvCache,
        out: &mut Self::Input,
    );

    /// `out = silu(gate) · up` with `gate_up = [gate, up]`
    fn silu_and_mul(&mut self, num_rows: usize, gate_up: &Self::Rows, out: &mut Self::Input);

    /// Statistics of the first `stats.len()` rows of logits.
    fn sample(&mut self, logits: &Self::Rows, stats: &mut [LogitStats]);

    /// The first `num_rows` rows on the host.
    fn read<'a>(&'a mut self, num_rows: usize, rows: &'a Self::Rows) -> &'a [f32];
}
