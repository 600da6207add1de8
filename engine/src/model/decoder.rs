//! The forward pass of a decoder-only model, about eight backend ops a layer.

use std::ops::Range;

use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{DType, LinearRole, ModelShape};

use crate::backend::{Backend, KernelUsage, RowsKind, Step};
use crate::batch::{Batch, BatchLimits};
use crate::config::Progress;
use crate::error::Error;
use crate::kernels::abi::{LogitStats, SequenceSpan};
use crate::model::linear::{DenseView, LinearSource};
use crate::model::weights::{LayerNorms, ModelWeights};

/// What a decoder is allocated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderLimits {
    pub batch: BatchLimits,
    /// Pages of the KV cache; `None` for as many as the backend has room for.
    pub num_pages: Option<usize>,
}

/// A model on a backend: its weights, its KV cache and the rows between its ops.
pub struct Decoder<B: Backend> {
    backend: B,
    shape: ModelShape,
    limits: BatchLimits,
    num_pages: usize,
    embedding: B::Embedding,
    layers: Vec<Layer<B>>,
    final_norm: B::Norm,
    head: B::Linear,
    kv_cache: B::KvCache,
    rows: RowBuffers<B>,
}

struct Layer<B: Backend> {
    attention_norm: B::Norm,
    qkv: B::Linear,
    qk_norm: Option<(B::Norm, B::Norm)>,
    o: B::Linear,
    mlp_norm: B::Norm,
    gate_up: B::Linear,
    down: B::Linear,
}

/// What a decoder is made of, already where the backend wants it.
pub trait Parts<B: Backend> {
    fn embedding(&mut self, backend: &mut B) -> Result<B::Embedding, Error>;

    fn final_norm(&mut self) -> Result<Vec<f32>, Error>;

    fn norms(&mut self, layer_idx: usize) -> Result<LayerNorms, Error>;

    /// The linear `role` of a layer; for the head `layer_idx` says nothing.
    fn linear(
        &mut self,
        backend: &mut B,
        role: LinearRole,
        layer_idx: usize,
    ) -> Result<B::Linear, Error>;
}

/// Parts that the backend makes from a model's tensors.
pub struct FromWeights<'a>(pub &'a dyn ModelWeights);

impl<B: Backend> Parts<B> for FromWeights<'_> {
    fn embedding(&mut self, backend: &mut B) -> Result<B::Embedding, Error> {
        backend.load_embedding(&self.0.embedding()?.view())
    }

    fn final_norm(&mut self) -> Result<Vec<f32>, Error> {
        self.0.final_norm()
    }

    fn norms(&mut self, layer_idx: usize) -> Result<LayerNorms, Error> {
        self.0.norms(layer_idx)
    }

    fn linear(
        &mut self,
        backend: &mut B,
        role: LinearRole,
        layer_idx: usize,
    ) -> Result<B::Linear, Error> {
        let tensors = self.0.linear(role, layer_idx)?;
        backend.load_linear(role, &tensors.source())
    }
}

/// A part of a loaded decoder, with the layer that it belongs to.
pub enum PartRef<'a, B: Backend> {
    Embedding(&'a B::Embedding),
    FinalNorm(&'a B::Norm),
    /// Before attention, before the MLP, and on q and k.
    Norms {
        layer_idx: usize,
        norms: [Option<&'a B::Norm>; 4],
    },
    /// For the head the layer is 0.
    Linear {
        layer_idx: usize,
        role: LinearRole,
        linear: &'a B::Linear,
    },
}

struct RowBuffers<B: Backend> {
    /// `[rows_max, hidden]`
    residual: B::Rows,
    /// `[rows_max, hidden]`: what the next norm adds to the residual.
    delta: B::Rows,
    /// `[rows_max, (num_heads + 2 num_kv_heads) · head_dim]`
    qkv: B::Rows,
    /// `[rows_max, 2 · intermediate]`
    gate_up: B::Rows,
    /// `[logit_rows_max, vocab]`
    logits: B::Rows,
    qkv_in: B::Input,
    o_in: B::Input,
    gate_up_in: B::Input,
    down_in: B::Input,
    head_in: B::Input,
}

impl<B: Backend> Decoder<B> {
    /// Loads the weights and allocates everything that steps need.
    pub fn load(
        backend: B,
        weights: &dyn ModelWeights,
        shape: &ModelShape,
        limits: DecoderLimits,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Decoder<B>, Error> {
        Decoder::load_parts(backend, &mut FromWeights(weights), shape, limits, progress)
    }

    /// As [`Decoder::load`], with the backend's own parts from wherever `parts` has them.
    pub fn load_parts(
        mut backend: B,
        parts: &mut dyn Parts<B>,
        shape: &ModelShape,
        limits: DecoderLimits,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Decoder<B>, Error> {
        let BatchLimits { rows_max, logit_rows_max, .. } = limits.batch;
        assert!(rows_max > 0 && logit_rows_max > 0 && limits.num_pages != Some(0));
        backend.reserve(&limits.batch)?;
        let rows = RowBuffers::new(&mut backend, shape, &limits.batch)?;
        let num_parts = shape.num_layers + 2;
        let mut report = |num_done| progress(Progress { num_done, num_parts });
        report(0);
        let embedding = parts.embedding(&mut backend)?;
        report(1);
        let mut layers = Vec::with_capacity(shape.num_layers);
        for layer_idx in 0..shape.num_layers {
            layers.push(Layer::load(&mut backend, parts, layer_idx)?);
            report(layer_idx + 2);
        }
        let final_norm = backend.load_norm(parts.final_norm()?)?;
        let head = parts.linear(&mut backend, LinearRole::Head, 0)?;
        let num_pages = backend.num_pages(limits.num_pages)?;
        let kv_cache = backend.new_kv_cache(num_pages)?;
        let mut decoder = Decoder {
            backend,
            shape: shape.clone(),
            limits: limits.batch,
            num_pages,
            embedding,
            layers,
            final_norm,
            head,
            kv_cache,
            rows,
        };
        decoder.record_steps();
        report(num_parts);
        Ok(decoder)
    }

    /// Runs a step of every size that the backend records, so that no request waits for that. The
    /// KV cache holds nothing yet that could be overwritten.
    fn record_steps(&mut self) {
        let num_slots = self.num_pages * self.shape.page_size;
        for num_rows in self.backend.recorded_rows() {
            if num_rows <= num_slots {
                let batch = first_tokens(num_rows, &self.shape);
                self.step(&batch);
            }
        }
    }

    /// A decoder on a backend that needs no weights: it is given empty ones.
    pub fn without_weights(
        mut backend: B,
        shape: &ModelShape,
        limits: DecoderLimits,
    ) -> Result<Decoder<B>, Error> {
        backend.reserve(&limits.batch)?;
        let empty = DenseView { n: 0, k: 0, dtype: DType::F32, bytes: &[] };
        let layer = |_| Layer::empty(&mut backend);
        let layers = (0..shape.num_layers).map(layer).collect::<Result<_, _>>()?;
        let num_pages = backend.num_pages(limits.num_pages)?;
        Ok(Decoder {
            rows: RowBuffers::new(&mut backend, shape, &limits.batch)?,
            kv_cache: backend.new_kv_cache(num_pages)?,
            num_pages,
            embedding: backend.load_embedding(&empty)?,
            layers,
            final_norm: backend.load_norm(Vec::new())?,
            head: load_empty(&mut backend, LinearRole::Head)?,
            backend,
            shape: shape.clone(),
            limits: limits.batch,
        })
    }

    /// Runs the layers over the batch's rows and returns the logits of `batch.logit_rows`,
    /// `[num_logit_rows, vocab]`.
    pub fn forward(&mut self, batch: &Batch) -> &[f32] {
        self.step(batch);
        self.logits(0..batch.logit_rows.len())
    }

    /// Copies pages as the batch asks, runs the layers, appends the rows to the KV cache and
    /// computes the logits of `batch.logit_rows`.
    pub fn step(&mut self, batch: &Batch) {
        self.check(batch);
        assert!(batch.logit_rows.len() <= self.limits.logit_rows_max, "too many logit rows");
        self.backend.copy_pages(&batch.copies, &mut self.kv_cache);
        if self.backend.begin_step(batch) == Step::Compute {
            self.layers(batch);
            self.head(&batch.logit_rows);
            self.backend.end_step();
        }
    }

    /// As [`Decoder::step`] without logits; calls of [`Decoder::head`] may follow.
    pub fn run_layers(&mut self, batch: &Batch) {
        self.check(batch);
        self.backend.copy_pages(&batch.copies, &mut self.kv_cache);
        self.backend.begin_rows(batch);
        self.layers(batch);
    }

    fn layers(&mut self, batch: &Batch) {
        let num_rows = batch.num_rows();
        let Decoder { backend, rows, kv_cache, .. } = self;
        backend.embed(&self.embedding, &batch.tokens, &mut rows.residual);
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            layer.prepare_inputs(backend, rows);
            let delta = (layer_idx > 0).then_some(&rows.delta);
            backend.rms_norm(
                num_rows,
                &mut rows.residual,
                delta,
                &layer.attention_norm,
                &mut rows.qkv_in,
            );
            backend.linear(num_rows, &layer.qkv, &rows.qkv_in, &mut rows.qkv);
            let qk_norm = layer.qk_norm.as_ref().map(|(q, k)| (q, k));
            backend.rope(batch, layer_idx, &mut rows.qkv, qk_norm, kv_cache);
            backend.paged_attention(batch, layer_idx, &rows.qkv, kv_cache, &mut rows.o_in);
            backend.linear(num_rows, &layer.o, &rows.o_in, &mut rows.delta);
            backend.rms_norm(
                num_rows,
                &mut rows.residual,
                Some(&rows.delta),
                &layer.mlp_norm,
                &mut rows.gate_up_in,
            );
            backend.linear(num_rows, &layer.gate_up, &rows.gate_up_in, &mut rows.gate_up);
            backend.silu_and_mul(num_rows, &rows.gate_up, &mut rows.down_in);
            backend.linear(num_rows, &layer.down, &rows.down_in, &mut rows.delta);
        }
    }

    /// Logits of the rows `select` of the last [`Decoder::run_layers`]. A row may be asked for once
    /// only, because the final norm adds to its residual.
    pub fn head(&mut self, select: &[u32]) {
        assert!(select.len() <= self.limits.logit_rows_max, "too many logit rows");
        if select.is_empty() {
            return;
        }
        let Decoder { backend, rows, .. } = self;
        let delta = (!self.layers.is_empty()).then_some(&rows.delta);
        backend.rms_norm_select(
            select,
            &mut rows.residual,
            delta,
            &self.final_norm,
            &mut rows.head_in,
        );
        backend.linear(select.len(), &self.head, &rows.head_in, &mut rows.logits);
    }

    /// Statistics of the first `stats.len()` rows of the last [`Decoder::head`].
    pub fn logit_stats(&mut self, stats: &mut [LogitStats]) {
        self.backend.sample(&self.rows.logits, stats);
    }

    /// Some rows of the last [`Decoder::head`], `[rows.len(), vocab]`.
    pub fn logits(&mut self, rows: Range<usize>) -> &[f32] {
        assert!(rows.end <= self.limits.logit_rows_max);
        self.backend.read(rows, &self.rows.logits)
    }

    pub fn limits(&self) -> &BatchLimits {
        &self.limits
    }

    /// Pages of the KV cache.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Names what the bits of keys and values depend on, the model aside.
    pub fn identity(&self) -> String {
        self.backend.identity()
    }

    /// Every part, in the order in which they are loaded.
    pub fn parts(&self) -> Vec<PartRef<'_, B>> {
        let mut parts = vec![PartRef::Embedding(&self.embedding)];
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let (q, k) = layer.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
            let norms = [Some(&layer.attention_norm), Some(&layer.mlp_norm), q, k];
            parts.push(PartRef::Norms { layer_idx, norms });
            let linears = [
                (LinearRole::Qkv, &layer.qkv),
                (LinearRole::O, &layer.o),
                (LinearRole::GateUp, &layer.gate_up),
                (LinearRole::Down, &layer.down),
            ];
            let linear = |(role, linear)| PartRef::Linear { layer_idx, role, linear };
            parts.extend(linears.map(linear));
        }
        parts.push(PartRef::FinalNorm(&self.final_norm));
        let (layer_idx, role) = (0, LinearRole::Head);
        parts.push(PartRef::Linear { layer_idx, role, linear: &self.head });
        parts
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// See [`Backend::provenances`].
    pub fn provenances(&self) -> Vec<Provenance> {
        self.backend.provenances()
    }

    /// See [`Backend::kernel_usage`].
    pub fn kernel_usage(&mut self) -> Result<Vec<KernelUsage>, Error> {
        self.backend.kernel_usage()
    }

    /// Bytes held by weights.
    pub fn weights_bytes(&self) -> usize {
        self.backend.weights_bytes()
    }

    /// Bytes of the KV cache.
    pub fn kv_cache_bytes(&self) -> usize {
        self.backend.page_bytes() * self.num_pages
    }

    /// Appends the bytes of a page of the KV cache over all layers to `out`.
    pub fn read_page(&mut self, page: u32, out: &mut Vec<u8>) {
        self.check_page(page);
        self.backend.read_page(page, &self.kv_cache, out);
    }

    /// Fills a page of the KV cache with what [`Decoder::read_page`] gave.
    pub fn write_page(&mut self, page: u32, bytes: &[u8]) {
        self.check_page(page);
        self.backend.write_page(page, bytes, &mut self.kv_cache);
    }

    /// Bytes of one page of the KV cache over all layers.
    pub fn page_bytes(&self) -> usize {
        self.backend.page_bytes()
    }

    fn check_page(&self, page: u32) {
        let num_pages = self.num_pages;
        assert!((page as usize) < num_pages, "page {page} of {num_pages}");
    }

    /// Panics on a batch that would make an op read or write outside its buffers.
    fn check(&self, batch: &Batch) {
        let num_rows = batch.num_rows();
        let shape = &self.shape;
        assert!(num_rows > 0 && num_rows <= self.limits.rows_max, "{num_rows} rows");
        assert!(batch.tokens.iter().all(|token| (*token as usize) < shape.vocab_size));
        assert_eq!(batch.positions.len(), num_rows);
        assert_eq!(batch.slots.len(), num_rows);
        assert_eq!(batch.cos_sin.len(), num_rows * shape.rotary_dim);
        let num_slots = self.num_pages * shape.page_size;
        assert!(batch.slots.iter().all(|slot| (*slot as usize) < num_slots));
        batch.page_table.iter().for_each(|page| self.check_page(*page));
        batch.copies.iter().for_each(|copy| {
            self.check_page(copy.from);
            self.check_page(copy.to);
        });
        let mut next_row = 0;
        for span in &batch.spans {
            assert_eq!(span.first_row, next_row, "spans cover the rows in order");
            assert!(span.num_rows > 0 && span.context_len >= span.num_rows);
            next_row += span.num_rows;
            let num_pages = (span.context_len as usize).div_ceil(shape.page_size);
            assert!(span.first_page as usize + num_pages <= batch.page_table.len());
        }
        assert_eq!(next_row as usize, num_rows);
        assert!(batch.logit_rows.is_sorted_by(|a, b| a < b));
        assert!(batch.logit_rows.last().is_none_or(|row| (*row as usize) < num_rows));
    }
}

/// A token 0 for each of `num_rows` sequences. They share pages, each with a slot of its own.
fn first_tokens(num_rows: usize, shape: &ModelShape) -> Batch {
    let mut batch = Batch::default();
    for row in 0..num_rows {
        let idx = row as u32;
        batch.tokens.push(0);
        batch.positions.push(0);
        batch.slots.push(idx);
        batch.cos_sin.extend(std::iter::repeat_n(1.0, shape.rotary_dim / 2));
        batch.cos_sin.extend(std::iter::repeat_n(0.0, shape.rotary_dim / 2));
        batch.page_table.push((row / shape.page_size) as u32);
        batch.logit_rows.push(idx);
        batch.spans.push(SequenceSpan {
            first_row: idx,
            num_rows: 1,
            context_len: 1,
            first_page: idx,
        });
    }
    batch
}

/// A decoder on a backend that its user does not know.
pub trait AnyDecoder: Send {
    fn limits(&self) -> &BatchLimits;
    fn num_pages(&self) -> usize;
    fn identity(&self) -> String;
    fn step(&mut self, batch: &Batch);
    fn run_layers(&mut self, batch: &Batch);
    fn head(&mut self, select: &[u32]);
    fn logit_stats(&mut self, stats: &mut [LogitStats]);
    fn logits(&mut self, rows: Range<usize>) -> &[f32];
    fn provenances(&self) -> Vec<Provenance>;
    fn kernel_usage(&mut self) -> Result<Vec<KernelUsage>, Error>;
    fn weights_bytes(&self) -> usize;
    fn kv_cache_bytes(&self) -> usize;
    fn page_bytes(&self) -> usize;
    fn read_page(&mut self, page: u32, out: &mut Vec<u8>);
    fn write_page(&mut self, page: u32, bytes: &[u8]);
}

impl<B: Backend> AnyDecoder for Decoder<B>
where
    Decoder<B>: Send,
{
    fn limits(&self) -> &BatchLimits {
        Decoder::limits(self)
    }

    fn num_pages(&self) -> usize {
        Decoder::num_pages(self)
    }

    fn identity(&self) -> String {
        Decoder::identity(self)
    }

    fn step(&mut self, batch: &Batch) {
        Decoder::step(self, batch)
    }

    fn run_layers(&mut self, batch: &Batch) {
        Decoder::run_layers(self, batch)
    }

    fn head(&mut self, select: &[u32]) {
        Decoder::head(self, select)
    }

    fn logit_stats(&mut self, stats: &mut [LogitStats]) {
        Decoder::logit_stats(self, stats)
    }

    fn logits(&mut self, rows: Range<usize>) -> &[f32] {
        Decoder::logits(self, rows)
    }

    fn provenances(&self) -> Vec<Provenance> {
        Decoder::provenances(self)
    }

    fn kernel_usage(&mut self) -> Result<Vec<KernelUsage>, Error> {
        Decoder::kernel_usage(self)
    }

    fn weights_bytes(&self) -> usize {
        Decoder::weights_bytes(self)
    }

    fn kv_cache_bytes(&self) -> usize {
        Decoder::kv_cache_bytes(self)
    }

    fn page_bytes(&self) -> usize {
        Decoder::page_bytes(self)
    }

    fn read_page(&mut self, page: u32, out: &mut Vec<u8>) {
        Decoder::read_page(self, page, out)
    }

    fn write_page(&mut self, page: u32, bytes: &[u8]) {
        Decoder::write_page(self, page, bytes)
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        backend: &mut B,
        parts: &mut dyn Parts<B>,
        layer_idx: usize,
    ) -> Result<Layer<B>, Error> {
        let norms = parts.norms(layer_idx)?;
        let mut linear = |backend: &mut B, role| parts.linear(backend, role, layer_idx);
        let qk_norm = match norms.qk {
            Some((q, k)) => Some((backend.load_norm(q)?, backend.load_norm(k)?)),
            None => None,
        };
        Ok(Layer {
            attention_norm: backend.load_norm(norms.attention)?,
            qkv: linear(backend, LinearRole::Qkv)?,
            qk_norm,
            o: linear(backend, LinearRole::O)?,
            mlp_norm: backend.load_norm(norms.mlp)?,
            gate_up: linear(backend, LinearRole::GateUp)?,
            down: linear(backend, LinearRole::Down)?,
        })
    }
}

impl<B: Backend> Layer<B> {
    /// The inputs will be written for this layer's linears.
    fn prepare_inputs(&self, backend: &B, rows: &mut RowBuffers<B>) {
        backend.prepare_input(&self.qkv, &mut rows.qkv_in);
        backend.prepare_input(&self.o, &mut rows.o_in);
        backend.prepare_input(&self.gate_up, &mut rows.gate_up_in);
        backend.prepare_input(&self.down, &mut rows.down_in);
    }

    fn empty(backend: &mut B) -> Result<Self, Error> {
        Ok(Layer {
            attention_norm: backend.load_norm(Vec::new())?,
            qkv: load_empty(backend, LinearRole::Qkv)?,
            qk_norm: None,
            o: load_empty(backend, LinearRole::O)?,
            mlp_norm: backend.load_norm(Vec::new())?,
            gate_up: load_empty(backend, LinearRole::GateUp)?,
            down: load_empty(backend, LinearRole::Down)?,
        })
    }
}

fn load_empty<B: Backend>(backend: &mut B, role: LinearRole) -> Result<B::Linear, Error> {
    backend.load_linear(role, &LinearSource { parts: Vec::new(), row_map: None, bias: None })
}

impl<B: Backend> RowBuffers<B> {
    fn new(
        backend: &mut B,
        shape: &ModelShape,
        limits: &BatchLimits,
    ) -> Result<RowBuffers<B>, Error> {
        let BatchLimits { rows_max, logit_rows_max, .. } = *limits;
        Ok(RowBuffers {
            residual: backend.new_rows(rows_max, shape.hidden_size, RowsKind::Residual)?,
            delta: backend.new_rows(rows_max, shape.hidden_size, RowsKind::Linear)?,
            qkv: backend.new_rows(rows_max, shape.qkv.n, RowsKind::Linear)?,
            gate_up: backend.new_rows(rows_max, shape.gate_up.n, RowsKind::Linear)?,
            logits: backend.new_rows(logit_rows_max, shape.vocab_size, RowsKind::Logits)?,
            qkv_in: backend.new_input(rows_max, LinearRole::Qkv)?,
            o_in: backend.new_input(rows_max, LinearRole::O)?,
            gate_up_in: backend.new_input(rows_max, LinearRole::GateUp)?,
            down_in: backend.new_input(rows_max, LinearRole::Down)?,
            head_in: backend.new_input(logit_rows_max, LinearRole::Head)?,
        })
    }
}
