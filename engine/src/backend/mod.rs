//! The ops of a decoder and where they run.

pub mod cpu;
pub mod cuda;
pub mod null;
pub mod reference;

use std::ops::Range;

use crate::batch::{Batch, BatchLimits, PageCopy};
use crate::error::Error;
use crate::kernels::abi::LogitStats;
use crate::model::linear::{DenseView, LinearSource};
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::LinearRole;

/// Rows between ops, by who writes them: a device may keep each in another type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsKind {
    /// What embedding starts and norms add to.
    Residual,
    /// Outputs of a layer's linears.
    Linear,
    /// Outputs of the head.
    Logits,
}

/// What the caller of [`Backend::begin_step`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Calls the step's ops, then [`Backend::end_step`].
    Compute,
    /// Nothing: the device has run a recording of these very ops.
    Replayed,
}

/// What a kernel has done in a sample of the steps so far, and what the machine could do.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct KernelUsage {
    pub symbol: &'static str,
    pub op: &'static str,
    #[serde(rename = "calls")]
    pub num_calls: u64,
    /// Of all the calls.
    pub seconds: f64,
    /// The least that the machine's limits allow for the same work.
    pub limit_seconds: f64,
    /// Which limit that is.
    pub bound: &'static str,
    /// Bytes that had to move, from memory or the caches.
    pub bytes: u64,
    /// Operations, 2 per multiply-add.
    pub ops: u64,
}

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
    /// `[rows_max, width]`.
    type Rows;
    /// Rows in the form that a linear reads.
    type Input;
    type KvCache;

    /// Makes room for what ops read of a batch. Called once, before any other method.
    fn reserve(&mut self, _limits: &BatchLimits) -> Result<(), Error> {
        Ok(())
    }

    /// Where layers have the linear `role` in two forms, `source` tells which this one has.
    fn load_linear(
        &mut self,
        role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<Self::Linear, Error>;
    fn load_embedding(&mut self, source: &DenseView<'_>) -> Result<Self::Embedding, Error>;
    fn load_norm(&mut self, weight: Vec<f32>) -> Result<Self::Norm, Error>;
    fn new_rows(
        &mut self,
        rows_max: usize,
        width: usize,
        kind: RowsKind,
    ) -> Result<Self::Rows, Error>;
    /// Rows as the linear `role` reads them.
    fn new_input(&mut self, rows_max: usize, role: LinearRole) -> Result<Self::Input, Error>;
    fn new_kv_cache(&mut self, num_pages: usize) -> Result<Self::KvCache, Error>;
    /// Pages of the KV cache: as many as are wanted, or as there is room for once everything else
    /// is allocated.
    fn num_pages(&self, wanted: Option<usize>) -> Result<usize, Error> {
        wanted.ok_or_else(|| Error::Request("the backend wants a number of pages".into()))
    }

    /// Whether [`Backend::num_pages`] knows how many there is room for.
    fn has_own_memory(&self) -> bool {
        false
    }

    /// Bytes of the KV cache one page takes, over all layers.
    fn page_bytes(&self) -> usize;
    /// Names what the bits of keys and values depend on, the model and the KV cache's type aside.
    fn identity(&self) -> String;
    /// Bytes held by weights.
    fn weights_bytes(&self) -> usize;

    /// Copies whole pages over all layers, one after the other: a copy may overwrite the source of
    /// an earlier one, and may read what an earlier one wrote.
    fn copy_pages(&mut self, copies: &[PageCopy], kv_cache: &mut Self::KvCache);

    /// Appends the bytes of a page over all layers, [`Backend::page_bytes`] of them, to `out`. Only
    /// [`Backend::write_page`] of the same backend and model knows what they mean.
    fn read_page(&mut self, page: u32, kv_cache: &Self::KvCache, out: &mut Vec<u8>);

    /// Fills a page with what [`Backend::read_page`] gave.
    fn write_page(&mut self, page: u32, bytes: &[u8], kv_cache: &mut Self::KvCache);

    /// Starts a step over the rows of `batch` and the logits of all its `logit_rows`: a fixed
    /// sequence of ops, [`Backend::embed`] to the head's [`Backend::linear`], that depends on
    /// nothing but the batch. A device may record it and run the recording the next time.
    fn begin_step(&mut self, _batch: &Batch) -> Step {
        Step::Compute
    }

    fn end_step(&mut self) {}

    /// Where the choices of the model's kernels come from, one for each interval of row counts that
    /// a kernel serves; none where there is nothing to choose.
    fn provenances(&self) -> Vec<Provenance> {
        Vec::new()
    }

    /// The kernels that steps have used; none where the backend does not time them. The first call
    /// may take some tenths of a second, to measure the machine's limits.
    fn kernel_usage(&mut self) -> Result<Vec<KernelUsage>, Error> {
        Ok(Vec::new())
    }

    /// Row counts of decoding steps that the device will record the first time it sees them.
    fn recorded_rows(&self) -> Vec<usize> {
        Vec::new()
    }

    /// As [`Backend::begin_step`] for rows whose logits are computed in pieces afterwards, or not
    /// at all.
    fn begin_rows(&mut self, _batch: &Batch) {}

    /// Says that the next op which writes `input` writes it for `weight`. Layers that have a linear
    /// in different forms may read rows of different forms, through one buffer.
    fn prepare_input(&self, _weight: &Self::Linear, _input: &mut Self::Input) {}

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

    /// Some rows of logits on the host.
    fn read<'a>(&'a mut self, rows: Range<usize>, logits: &'a Self::Rows) -> &'a [f32];
}

/// How exactly a backend writes the numbers of an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Rounded to so many significant bits.
    Float { bits: i32 },
    /// Rounded to whole levels, 127 of them to the largest of each `group` numbers.
    Levels { group: usize },
}

/// A backend whose rows can be looked at and set: to verify its kernels, and to run layers one by
/// one.
pub trait Inspect: Backend {
    /// The first `num_rows` rows that an op wrote.
    fn read_rows(&mut self, num_rows: usize, rows: &Self::Rows) -> Vec<f32>;

    /// Fills the first rows with `values`, as [`RowsKind::Residual`] holds them.
    fn write_rows(&mut self, values: &[f32], rows: &mut Self::Rows);

    /// The first `num_rows` rows as a linear reads them.
    fn read_input(&mut self, num_rows: usize, input: &Self::Input) -> Vec<f32>;

    /// Of rows that linears and `rope` write.
    fn rows_precision(&self) -> Precision;

    fn input_precision(&self, input: &Self::Input) -> Precision;
}
