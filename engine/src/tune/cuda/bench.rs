//! Ops of a model on a device, each with operands of its own, launched by any of its kernels.
//!
//! Launches are recorded and the recording is replayed, as in serving, so that the host costs next
//! to nothing. They take turns over so many weights, or layers of the KV cache, that they come from
//! memory, not from a cache of the device.

use std::time::Instant;

use bespoke_kernel_gen::cuda::{KvType, Variant};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::presets::PRESETS;
use bespoke_kernel_gen::spec::{KvDType, LinearRole, ModelShape};

use super::super::cases::{Case, batch, context_max, weight_bytes};
use crate::backend::cuda::device::{Address, Device};
use crate::backend::cuda::{
    CudaBackend, CudaInput, CudaKvCache, CudaLinear, CudaOptions, CudaRows, KvMemory,
};
use crate::backend::{Backend, RowsKind};
use crate::batch::{Batch, BatchLimits};
use crate::error::Error;
use crate::model::weights::{LinearTensors, ModelWeights, RandomWeights};

/// How much is launched.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Memory that the launches of a recording go through: more than caches hold.
    pub cold_bytes: usize,
    /// Launches of a recording at most.
    pub num_launches_max: usize,
    /// A recording takes at least so long, as far as that number allows.
    pub sample_seconds: f64,
    /// Layers of the KV cache.
    pub num_layers: usize,
}

impl Default for BenchOptions {
    fn default() -> BenchOptions {
        BenchOptions {
            cold_bytes: 256 << 20,
            num_launches_max: 64,
            sample_seconds: 1e-3,
            num_layers: 16,
        }
    }
}

/// A backend with rows for the largest case.
pub(super) struct Bench<D: Device> {
    backend: CudaBackend<D>,
    pub(super) shape: ModelShape,
    options: BenchOptions,
    weights: RandomWeights,
    /// Of the role that was prepared last, and copies of it on the device.
    linears: Option<(LinearRole, LinearTensors, Vec<CudaLinear>)>,
    /// By role.
    inputs: [CudaInput; 5],
    residual: CudaRows,
    delta: CudaRows,
    qkv: CudaRows,
    gate_up: CudaRows,
    logits: CudaRows,
    kv_cache: CudaKvCache,
    embedding: Option<Address>,
    norm: Address,
    qk_norm: Option<[Address; 2]>,
}

/// Launches of one case by one kernel.
pub(super) struct Recording<G> {
    graph: G,
    num_launches: usize,
}

const ROLES: [LinearRole; 5] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down, LinearRole::Head];

/// What is run here of a model: of linears in two forms the quantized one.
pub(super) fn shape_of(shape: &ModelShape, num_layers: usize) -> ModelShape {
    ModelShape { num_layers, dense_linears: Vec::new(), ..shape.clone() }
}

impl<D: Device> Bench<D> {
    /// A bench for `cases`, by what serves on the device and by `candidates`.
    ///
    /// # Errors
    /// The device has not the memory, or not the kernels.
    pub(super) fn new(
        device: D,
        shape: &ModelShape,
        kv_dtype: KvDType,
        cases: &[Case],
        candidates: &[Variant],
        options: &BenchOptions,
    ) -> Result<Bench<D>, Error> {
        let shape = shape_of(shape, options.num_layers);
        // Backends read the epsilon of norms from a configuration, and nothing else.
        let config = ModelConfig::parse(PRESETS[0].1)?;
        let kv_memory = KvMemory::Share(0.5);
        let cuda_options = CudaOptions { kv_dtype, kv_memory, graphs: false };
        let mut backend = CudaBackend::new(device, &config, &shape, &cuda_options)?;
        backend.load_candidates(candidates)?;
        let max = |of: &dyn Fn(&Case) -> usize| cases.iter().map(of).max().unwrap_or(0).max(1);
        let rows_max = max(&Case::num_rows);
        let logit_rows_max = max(&Case::num_logit_rows);
        backend.reserve(&BatchLimits {
            rows_max,
            sequences_max: max(&Case::num_sequences),
            context_max: max(&context_max),
            logit_rows_max,
        })?;
        let num_pages = max(&|case| case.num_pages(shape.page_size));
        let weights = RandomWeights::new(&shape, 2);
        let norms = weights.norms(0)?;
        let qk_norm = match norms.qk {
            Some((q, k)) => Some([backend.load_norm(q)?, backend.load_norm(k)?]),
            None => None,
        };
        let mut inputs = Vec::new();
        for role in ROLES {
            let rows = if role == LinearRole::Head { logit_rows_max } else { rows_max };
            inputs.push(backend.new_input(rows, role)?);
        }
        let linear = RowsKind::Linear;
        let mut bench = Bench {
            residual: backend.new_rows(rows_max, shape.hidden_size, RowsKind::Residual)?,
            delta: backend.new_rows(rows_max, shape.hidden_size, linear)?,
            qkv: backend.new_rows(rows_max, shape.qkv.n, linear)?,
            gate_up: backend.new_rows(rows_max, shape.gate_up.n, linear)?,
            logits: backend.new_rows(logit_rows_max, shape.vocab_size, RowsKind::Logits)?,
            kv_cache: backend.new_kv_cache(num_pages)?,
            norm: backend.load_norm(norms.attention)?,
            inputs: inputs.try_into().unwrap_or_else(|_| unreachable!("five roles")),
            linears: None,
            qk_norm,
            embedding: None,
            backend,
            shape,
            options: options.clone(),
            weights,
        };
        bench.fill(num_pages, rows_max);
        Ok(bench)
    }

    /// Gives rows and KV cache numbers of about one: a GPU takes less power over zeros, and is
    /// faster than it will be.
    fn fill(&mut self, num_pages: usize, rows_max: usize) {
        let Bench { backend, inputs, residual, qkv, gate_up, logits, .. } = self;
        inputs.iter().for_each(|input| backend.fill_input(input));
        [residual, qkv, gate_up, logits].into_iter().for_each(|rows| backend.fill_rows(rows));
        let page_size = self.shape.page_size;
        let num_slots = num_pages * page_size;
        for first in (0..num_slots).step_by(rows_max) {
            let len = rows_max.min(num_slots - first);
            let mut batch = batch(&self.shape, &Case::Prefill { len });
            batch.slots.iter_mut().zip(first..).for_each(|(slot, new)| *slot = new as u32);
            self.backend.begin_rows(&batch);
            let qk_norm = self.qk_norm.as_ref().map(|[q, k]| (q, k));
            for layer_idx in 0..self.options.num_layers {
                let (qkv, kv_cache) = (&mut self.qkv, &mut self.kv_cache);
                self.backend.rope(&batch, layer_idx, qkv, qk_norm, kv_cache);
            }
            // NOTE: the batch lies in memory that the next one overwrites.
            self.backend.synchronize();
        }
    }

    /// Makes the operands of `case` ready; recordings of others are of no use from now on.
    ///
    /// # Errors
    /// There is no memory for its weights.
    pub(super) fn prepare(&mut self, case: &Case) -> Result<Batch, Error> {
        if let Case::Linear { role, .. } = case {
            self.load(*role)?;
        }
        if matches!(case, Case::Embed { .. }) && self.embedding.is_none() {
            let table = self.weights.embedding()?;
            self.embedding = Some(self.backend.load_embedding(&table.view())?);
        }
        let batch = batch(&self.shape, case);
        self.backend.begin_rows(&batch);
        Ok(batch)
    }

    /// The weights of a linear, as often as launches are to go through them.
    fn load(&mut self, role: LinearRole) -> Result<(), Error> {
        if self.linears.as_ref().is_some_and(|(loaded, ..)| *loaded == role) {
            return Ok(());
        }
        let num_copies = self.options.cold_bytes.div_ceil(weight_bytes(&self.shape, role).max(1));
        let num_copies = num_copies.clamp(1, self.options.num_launches_max.max(1));
        let tensors = self.weights.linear(role, 0)?;
        let source = tensors.source();
        let linears = (0..num_copies).map(|_| self.backend.load_linear(role, &source));
        let linears = linears.collect::<Result<_, Error>>()?;
        self.linears = Some((role, tensors, linears));
        Ok(())
    }

    /// The weights of the linear that was prepared last.
    pub(super) fn tensors(&self) -> Option<&LinearTensors> {
        self.linears.as_ref().map(|(_, tensors, _)| tensors)
    }

    /// Rows that the linear `role` reads.
    pub(super) fn read_input(&mut self, role: LinearRole, num_rows: usize) -> Vec<f32> {
        use crate::backend::Inspect as _;
        self.backend.read_input(num_rows, &self.inputs[role as usize])
    }

    /// What the linear `role` writes.
    pub(super) fn outputs(&self, role: LinearRole) -> CudaRows {
        match role {
            LinearRole::Qkv => self.qkv,
            LinearRole::O | LinearRole::Down => self.delta,
            LinearRole::GateUp => self.gate_up,
            LinearRole::Head => self.logits,
        }
    }

    pub(super) fn backend(&mut self) -> &mut CudaBackend<D> {
        &mut self.backend
    }

    /// Launches the prepared case once, as the `idx`th of several.
    pub(super) fn launch(&mut self, case: &Case, batch: &Batch, idx: usize) {
        let num_layers = self.options.num_layers;
        let Bench { backend, inputs, residual, qkv, gate_up, logits, kv_cache, .. } = self;
        match *case {
            Case::Linear { role, rows } => {
                let (_, _, linears) = self.linears.as_ref().expect("prepared before");
                let out = match role {
                    LinearRole::Qkv => qkv,
                    LinearRole::O | LinearRole::Down => &mut self.delta,
                    LinearRole::GateUp => gate_up,
                    LinearRole::Head => logits,
                };
                let linear = &linears[idx % linears.len()];
                backend.linear(rows, linear, &inputs[role as usize], out);
            }
            Case::Decode { .. } | Case::Prefill { .. } => {
                let out = &mut inputs[LinearRole::O as usize];
                backend.paged_attention(batch, idx % num_layers, qkv, kv_cache, out);
            }
            Case::Embed { .. } => {
                let table = self.embedding.expect("prepared before");
                backend.embed(&table, &batch.tokens, residual);
            }
            Case::RmsNorm { rows } => {
                let input = &mut inputs[LinearRole::Qkv as usize];
                backend.rms_norm(rows, residual, None, &self.norm, input);
            }
            Case::Rope { .. } => {
                let qk_norm = self.qk_norm.as_ref().map(|[q, k]| (q, k));
                backend.rope(batch, idx % num_layers, qkv, qk_norm, kv_cache);
            }
            Case::SiluAndMul { rows } => {
                let input = &mut inputs[LinearRole::Down as usize];
                backend.silu_and_mul(rows, gate_up, input);
            }
            Case::Sample { rows } => backend.launch_sample(logits, rows),
            Case::Copy { .. } => unreachable!("a copy has no kernel"),
        }
    }

    /// Records as many launches of the prepared case by `kernel` (`None`: what serves) as a sample
    /// takes, which a first one shows.
    pub(super) fn record(
        &mut self,
        case: &Case,
        batch: &Batch,
        kernel: Option<Variant>,
    ) -> Recording<D::Graph> {
        self.backend.try_out(kernel);
        // NOTE: a first launch may load code.
        let mut seconds = 0.0;
        for idx in 0..2 {
            let start = Instant::now();
            self.launch(case, batch, idx);
            self.backend.synchronize();
            seconds = start.elapsed().as_secs_f64();
        }
        let max = self.options.num_launches_max.max(1);
        // NOTE: fewer weights than these may stay in a cache; longer launches read others besides.
        let num_copies = self.linears.as_ref().map_or(1, |(.., linears)| linears.len()).min(8);
        let wanted = (self.options.sample_seconds / seconds.max(1e-9)).ceil() as usize;
        let num_launches = wanted.clamp(num_copies.min(max), max);
        self.backend.begin_recording();
        for idx in 0..num_launches {
            self.launch(case, batch, idx);
        }
        let graph = self.backend.end_recording();
        self.backend.try_out(None);
        Recording { graph, num_launches }
    }

    /// Seconds of one launch of a recording.
    pub(super) fn run(&mut self, recording: &Recording<D::Graph>) -> f64 {
        let start = Instant::now();
        self.backend.run(&recording.graph);
        start.elapsed().as_secs_f64() / recording.num_launches as f64
    }

    /// Bytes that a second moves at best: what a copy does, and what reading logits does.
    ///
    /// # Errors
    /// As [`Bench::prepare`].
    pub(super) fn bandwidth(&mut self, cases: &[Case], kv: KvType) -> Result<f64, Error> {
        const NUM_TIMES: usize = 8;
        let mut best: f64 = 0.0;
        for case in cases {
            let cost = case.cost(&self.shape, kv);
            let recording = match case {
                Case::Copy { .. } => None,
                Case::Sample { .. } => {
                    let batch = self.prepare(case)?;
                    Some(self.record(case, &batch, None))
                }
                _ => continue,
            };
            for _ in 0..NUM_TIMES {
                let seconds = match (&recording, case) {
                    (Some(recording), _) => self.run(recording),
                    (None, Case::Copy { rows }) => self.copy(*rows, NUM_TIMES),
                    _ => continue,
                };
                best = best.max(cost.bytes as f64 / seconds.max(1e-9));
            }
        }
        Ok(best)
    }

    fn copy(&mut self, rows: usize, num_times: usize) -> f64 {
        let start = Instant::now();
        self.backend.copy_rows(&self.logits, rows, num_times);
        start.elapsed().as_secs_f64() / num_times as f64
    }
}
