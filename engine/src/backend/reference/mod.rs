//! The reference backend: plain loops in float32, any shape, no `unsafe`.
//!
//! It is the oracle of the generated kernels and runs every supported model, slowly. All weights
//! are held in float32, so it takes two to eight times a checkpoint's size. Unlike other backends'
//! its ops start threads and allocate small scratch vectors.

mod attention;
mod math;

use std::ops::Range;

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{ActivationType, LinearRole, ModelShape};

use crate::backend::{Backend, Inspect, Precision, RowsKind};
use crate::batch::{Batch, PageCopy};
use crate::error::Error;
use crate::kernels::abi::LogitStats;
use crate::model::linear::{DenseView, LinearSource};

/// Runs a model with plain loops.
#[derive(Debug)]
pub struct ReferenceBackend {
    shape: ModelShape,
    eps: f32,
    num_threads: usize,
    /// Rows that linears read are rounded to bfloat16; else they stay float32.
    rounds_to_bf16: bool,
    weights_bytes: usize,
    /// Outputs of a linear with several rows, `[n, num_rows]`.
    transposed: Vec<f32>,
}

/// A linear in float32.
#[derive(Debug)]
pub struct Linear {
    n: usize,
    k: usize,
    /// `[n, k]`
    weight: Vec<f32>,
    /// `[n]`
    bias: Option<Vec<f32>>,
}

/// float32 `[rows_max, width]`.
#[derive(Debug)]
pub struct Rows {
    width: usize,
    values: Vec<f32>,
}

/// Keys and values of all layers in float32.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerKv>,
}

/// Keys and values of one layer, `[num_pages · page_size, num_kv_heads · head_dim]` each.
#[derive(Debug)]
pub(crate) struct LayerKv {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl ReferenceBackend {
    /// A backend for one model, on all cores.
    pub fn new(config: &ModelConfig, shape: &ModelShape) -> ReferenceBackend {
        let num_threads = std::thread::available_parallelism().map_or(1, |num| num.get());
        ReferenceBackend::with_threads(config, shape, num_threads)
    }

    pub fn with_threads(
        config: &ModelConfig,
        shape: &ModelShape,
        num_threads: usize,
    ) -> ReferenceBackend {
        ReferenceBackend {
            shape: shape.clone(),
            eps: config.rms_norm_eps,
            num_threads: num_threads.max(1),
            rounds_to_bf16: false,
            weights_bytes: 0,
            transposed: Vec::new(),
        }
    }

    /// With rows as linears of these activations read them. int8 rows stay float32: they differ
    /// from linear to linear by their groups.
    pub fn with_activations(self, activation: ActivationType) -> ReferenceBackend {
        ReferenceBackend { rounds_to_bf16: activation == ActivationType::Bf16, ..self }
    }

    /// The first `num_rows` rows as a linear reads them.
    fn round_input(&self, num_rows: usize, input: &mut Rows) {
        if self.rounds_to_bf16 {
            for value in &mut input.values[..num_rows * input.width] {
                *value = half::bf16::from_f32(*value).to_f32();
            }
        }
    }

    /// Where a page lies among the keys or the values of a layer.
    fn page_values(&self, page: u32) -> Range<usize> {
        let len = self.shape.page_size * self.shape.num_kv_heads * self.shape.head_dim;
        page as usize * len..(page as usize + 1) * len
    }

    fn norm_row(
        &self,
        residual: &mut [f32],
        delta: Option<&[f32]>,
        weight: &[f32],
        out: &mut [f32],
    ) {
        if let Some(delta) = delta {
            residual.iter_mut().zip(delta).for_each(|(value, delta)| *value += delta);
        }
        math::rms_norm(residual, weight, self.eps, out);
    }
}

impl Backend for ReferenceBackend {
    type Linear = Linear;
    type Embedding = Linear;
    type Norm = Vec<f32>;
    type Rows = Rows;
    type Input = Rows;
    type KvCache = KvCache;

    fn load_linear(
        &mut self,
        _role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<Linear, Error> {
        let (n, k) = (source.n(), source.k());
        let mut weight = zeros(n * k)?;
        for (row, out) in weight.chunks_exact_mut(k).enumerate() {
            source.row(row, out);
        }
        self.weights_bytes += 4 * (weight.len() + source.bias.as_ref().map_or(0, Vec::len));
        Ok(Linear { n, k, weight, bias: source.bias.clone() })
    }

    fn load_embedding(&mut self, source: &DenseView<'_>) -> Result<Linear, Error> {
        let mut weight = zeros(source.n * source.k)?;
        for (row, out) in weight.chunks_exact_mut(source.k).enumerate() {
            source.row(row, out);
        }
        self.weights_bytes += 4 * weight.len();
        Ok(Linear { n: source.n, k: source.k, weight, bias: None })
    }

    fn load_norm(&mut self, weight: Vec<f32>) -> Result<Vec<f32>, Error> {
        self.weights_bytes += 4 * weight.len();
        Ok(weight)
    }

    fn new_rows(&mut self, rows_max: usize, width: usize, _: RowsKind) -> Result<Rows, Error> {
        Ok(Rows { width, values: zeros(rows_max * width)? })
    }

    fn new_input(&mut self, rows_max: usize, role: LinearRole) -> Result<Rows, Error> {
        let linear = self.shape.linear(role);
        let num_outputs = rows_max * linear.n;
        if self.transposed.len() < num_outputs {
            self.transposed = zeros(num_outputs)?;
        }
        self.new_rows(rows_max, linear.k, RowsKind::Linear)
    }

    fn new_kv_cache(&mut self, num_pages: usize) -> Result<KvCache, Error> {
        let shape = &self.shape;
        let len = num_pages * shape.page_size * shape.num_kv_heads * shape.head_dim;
        let layer = |_| Ok(LayerKv { keys: zeros(len)?, values: zeros(len)? });
        Ok(KvCache { layers: (0..shape.num_layers).map(layer).collect::<Result<_, Error>>()? })
    }

    fn page_bytes(&self) -> usize {
        let shape = &self.shape;
        2 * 4 * shape.num_layers * shape.page_size * shape.num_kv_heads * shape.head_dim
    }

    fn identity(&self) -> String {
        "reference".to_owned()
    }

    fn weights_bytes(&self) -> usize {
        self.weights_bytes
    }

    fn copy_pages(&mut self, copies: &[PageCopy], kv_cache: &mut KvCache) {
        for copy in copies {
            let to = self.page_values(copy.to).start;
            for values in kv_cache.layers.iter_mut().flat_map(LayerKv::both_mut) {
                values.copy_within(self.page_values(copy.from), to);
            }
        }
    }

    fn read_page(&mut self, page: u32, kv_cache: &KvCache, out: &mut Vec<u8>) {
        for values in kv_cache.layers.iter().flat_map(|layer| [&layer.keys, &layer.values]) {
            let page = &values[self.page_values(page)];
            out.extend(page.iter().flat_map(|value| value.to_le_bytes()));
        }
    }

    fn write_page(&mut self, page: u32, bytes: &[u8], kv_cache: &mut KvCache) {
        assert_eq!(bytes.len(), self.page_bytes(), "the bytes of one page");
        let mut bytes = bytes.as_chunks::<4>().0.iter();
        for values in kv_cache.layers.iter_mut().flat_map(LayerKv::both_mut) {
            let page = &mut values[self.page_values(page)];
            page.iter_mut().zip(&mut bytes).for_each(|(to, from)| *to = f32::from_le_bytes(*from));
        }
    }

    fn embed(&mut self, table: &Linear, tokens: &[u32], out: &mut Rows) {
        for (token, out) in tokens.iter().zip(out.values.chunks_exact_mut(out.width)) {
            let start = *token as usize * table.k;
            out.copy_from_slice(&table.weight[start..start + table.k]);
        }
    }

    fn rms_norm(
        &mut self,
        num_rows: usize,
        residual: &mut Rows,
        delta: Option<&Rows>,
        weight: &Vec<f32>,
        out: &mut Rows,
    ) {
        for row in 0..num_rows {
            let delta = delta.map(|delta| delta.row(row));
            self.norm_row(residual.row_mut(row), delta, weight, out.row_mut(row));
        }
        self.round_input(num_rows, out);
    }

    fn rms_norm_select(
        &mut self,
        select: &[u32],
        residual: &mut Rows,
        delta: Option<&Rows>,
        weight: &Vec<f32>,
        out: &mut Rows,
    ) {
        for (out_row, row) in select.iter().enumerate() {
            let row = *row as usize;
            let delta = delta.map(|delta| delta.row(row));
            self.norm_row(residual.row_mut(row), delta, weight, out.row_mut(out_row));
        }
        self.round_input(select.len(), out);
    }

    fn linear(&mut self, num_rows: usize, weight: &Linear, x: &Rows, out: &mut Rows) {
        let Linear { n, k, .. } = *weight;
        assert!(x.width == k && out.width == n);
        let x = &x.values[..num_rows * k];
        let out = &mut out.values[..num_rows * n];
        let matrix = math::Matrix { weight: &weight.weight, bias: weight.bias.as_deref(), n, k };
        if num_rows == 1 {
            matrix.multiply(x, out, self.num_threads);
            return;
        }
        let transposed = &mut self.transposed[..num_rows * n];
        matrix.multiply(x, transposed, self.num_threads);
        for (row, out) in out.chunks_exact_mut(n).enumerate() {
            for (value, column) in out.iter_mut().zip(transposed.chunks_exact(num_rows)) {
                *value = column[row];
            }
        }
    }

    fn rope(
        &mut self,
        batch: &Batch,
        layer_idx: usize,
        qkv: &mut Rows,
        qk_norm: Option<(&Vec<f32>, &Vec<f32>)>,
        kv_cache: &mut KvCache,
    ) {
        let layer = &mut kv_cache.layers[layer_idx];
        let qk_norm = qk_norm.map(|(q, k)| (q.as_slice(), k.as_slice()));
        for row in 0..batch.num_rows() {
            let cos_sin = &batch.cos_sin[row * self.shape.rotary_dim..][..self.shape.rotary_dim];
            let slot = batch.slots[row] as usize;
            let qkv = qkv.row_mut(row);
            attention::rope_row(&self.shape, self.eps, qkv, cos_sin, qk_norm);
            attention::append_row(&self.shape, qkv, slot, layer);
        }
    }

    fn paged_attention(
        &mut self,
        batch: &Batch,
        layer_idx: usize,
        qkv: &Rows,
        kv_cache: &KvCache,
        out: &mut Rows,
    ) {
        let call = attention::Attention {
            shape: &self.shape,
            batch,
            qkv: &qkv.values,
            kv: &kv_cache.layers[layer_idx],
        };
        let num_rows = batch.num_rows();
        call.run(&mut out.values[..num_rows * out.width], self.num_threads);
        self.round_input(num_rows, out);
    }

    fn silu_and_mul(&mut self, num_rows: usize, gate_up: &Rows, out: &mut Rows) {
        for row in 0..num_rows {
            let (gate, up) = gate_up.row(row).split_at(gate_up.width / 2);
            for ((out, gate), up) in out.row_mut(row).iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + (-gate).exp()) * up;
            }
        }
        self.round_input(num_rows, out);
    }

    fn sample(&mut self, logits: &Rows, stats: &mut [LogitStats]) {
        for (row, stats) in stats.iter_mut().enumerate() {
            *stats = math::logit_stats(logits.row(row));
        }
    }

    fn read<'a>(&'a mut self, rows: Range<usize>, logits: &'a Rows) -> &'a [f32] {
        &logits.values[rows.start * logits.width..rows.end * logits.width]
    }
}

impl Inspect for ReferenceBackend {
    fn read_rows(&mut self, num_rows: usize, rows: &Rows) -> Vec<f32> {
        rows.values[..num_rows * rows.width].to_vec()
    }

    fn write_rows(&mut self, values: &[f32], rows: &mut Rows) {
        rows.values[..values.len()].copy_from_slice(values);
    }

    fn read_input(&mut self, num_rows: usize, input: &Rows) -> Vec<f32> {
        self.read_rows(num_rows, input)
    }

    fn rows_precision(&self) -> Precision {
        Precision::Float { bits: 24 }
    }

    fn input_precision(&self, _: &Rows) -> Precision {
        Precision::Float { bits: if self.rounds_to_bf16 { 8 } else { 24 } }
    }
}

impl LayerKv {
    fn both_mut(&mut self) -> [&mut Vec<f32>; 2] {
        [&mut self.keys, &mut self.values]
    }
}

impl Rows {
    /// `[rows_max, width]`
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// As [`Rows::values`], to be replaced by another backend's.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.width..(row + 1) * self.width]
    }
}

/// `len` zeros; an error where there is no memory for them. The system hands out zero pages when
/// they are first touched, so unused ones cost nothing.
fn zeros(len: usize) -> Result<Vec<f32>, Error> {
    Vec::<f32>::new()
        .try_reserve_exact(len)
        .map_err(|_| Error::Resources(format!("no memory for {len} float32 values")))?;
    Ok(vec![0.0; len])
}
