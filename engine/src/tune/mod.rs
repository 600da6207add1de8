//! How long the kernels of a model take, each alone: those of CUDA here, those of a CPU, of which
//! several compete for each matmul, in [`cpu`].
//!
//! A case is launched many times in one recording and the recording replayed, as in serving, so
//! that the host costs next to nothing. Launches take turns over so many weights, or layers of the
//! KV cache, that they come from memory, not from a cache of the device. Times are those of one
//! launch.

mod cases;
pub mod cpu;
pub mod isolation;
pub mod ladder;
mod operands;
pub mod race;
mod record;
pub mod report;

use std::time::{Duration, Instant};

use bespoke_kernel_gen::cuda::KvType;
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::presets::PRESETS;
use bespoke_kernel_gen::spec::{KvDType, LinearRole, ModelShape};

use crate::backend::cuda::device::{Address, Device};
use crate::backend::cuda::{
    CudaBackend, CudaInput, CudaKvCache, CudaLinear, CudaOptions, CudaRows, KvMemory,
};
use crate::backend::{Backend, RowsKind};
use crate::batch::{Batch, BatchLimits};
use crate::error::Error;
use crate::model::weights::{ModelWeights, RandomWeights};
use cases::{batch, context_max, kernel, weight_bytes};

pub use cases::{Case, Cases, Cost};
pub use record::{Key, Record, RecordedVariant, key};

/// How much is measured.
#[derive(Clone, Debug)]
pub struct TuneOptions {
    /// Memory that the launches of a recording go through: more than caches hold.
    pub cold_bytes: usize,
    /// Launches of a recording at least.
    pub num_launches: usize,
    /// Replays that are measured, after one that is not.
    pub num_samples: usize,
    /// A case ends after its first sample beyond this.
    pub time_max: Duration,
    /// Layers of the KV cache.
    pub num_layers: usize,
}

impl Default for TuneOptions {
    fn default() -> TuneOptions {
        TuneOptions {
            cold_bytes: 256 << 20,
            num_launches: 64,
            num_samples: 25,
            time_max: Duration::from_millis(300),
            num_layers: 16,
        }
    }
}

/// Microseconds of one launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// Of ten samples, the second shortest.
    pub p10: f64,
    pub p50: f64,
    pub p90: f64,
    pub num_samples: usize,
}

impl Times {
    /// `None` without samples.
    fn of(mut samples: Vec<f64>) -> Option<Times> {
        samples.sort_by(f64::total_cmp);
        let last = samples.len().checked_sub(1)?;
        let at = |share: f64| samples[(share * last as f64).round() as usize];
        Some(Times { p10: at(0.1), p50: at(0.5), p90: at(0.9), num_samples: samples.len() })
    }
}

/// A case measured.
#[derive(Clone, Debug)]
pub struct Measured {
    pub case: Case,
    /// The kernel's name; a copy has none.
    pub symbol: Option<String>,
    pub times: Times,
    pub cost: Cost,
}

/// Measures the cases that `is_wanted` wants of a model's kernels, for one type of KV cache, until
/// `take` wants no more.
///
/// # Errors
/// The device has not the memory, or not the kernels.
pub fn measure<D: Device>(
    device: D,
    shape: &ModelShape,
    kv_dtype: KvDType,
    cases: &Cases,
    options: &TuneOptions,
    is_wanted: &mut dyn FnMut(&Case, Option<&str>) -> bool,
    take: &mut dyn FnMut(Measured) -> bool,
) -> Result<(), Error> {
    let kv = KvType::of(kv_dtype).ok_or_else(|| {
        Error::Request("a KV cache of float32 elements exists on the CPU only".into())
    })?;
    // NOTE: of linears in two forms the quantized one is measured.
    let shape =
        ModelShape { num_layers: options.num_layers, dense_linears: Vec::new(), ..shape.clone() };
    let mut all = Vec::new();
    for case in cases.all(&shape, kv) {
        let variant = kernel(&case, &shape, kv)?.and_then(|(spec, r)| device.find(&spec, r));
        let symbol = variant.map(|variant| variant.symbol());
        if is_wanted(&case, symbol.as_deref()) {
            all.push((case, symbol));
        }
    }
    if all.is_empty() {
        return Ok(());
    }
    // Backends read the epsilon of norms from a configuration, and nothing else.
    let config = ModelConfig::parse(PRESETS[0].1)?;
    let kv_memory = KvMemory::Share(0.5);
    let cuda_options = CudaOptions { kv_dtype, kv_memory, graphs: false };
    let backend = CudaBackend::new(device, &config, &shape, &cuda_options)?;
    let mut tuner = Tuner::new(backend, shape, &all, options)?;
    for (case, symbol) in all {
        let times = tuner.time(&case)?;
        let cost = case.cost(&tuner.shape, kv);
        if !take(Measured { case, symbol, times, cost }) {
            break;
        }
    }
    Ok(())
}

/// A backend with rows for the largest case.
struct Tuner<'a, D: Device> {
    backend: CudaBackend<D>,
    shape: ModelShape,
    options: &'a TuneOptions,
    weights: RandomWeights,
    /// Of the role that was measured last.
    linears: Option<(LinearRole, Vec<CudaLinear>)>,
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

const ROLES: [LinearRole; 5] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down, LinearRole::Head];

impl<'a, D: Device> Tuner<'a, D> {
    fn new(
        mut backend: CudaBackend<D>,
        shape: ModelShape,
        all: &[(Case, Option<String>)],
        options: &'a TuneOptions,
    ) -> Result<Tuner<'a, D>, Error> {
        let max = |of: &dyn Fn(&Case) -> usize| all.iter().map(|(case, _)| of(case)).max();
        let max = |of: &dyn Fn(&Case) -> usize| max(of).unwrap_or(0).max(1);
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
        let mut tuner = Tuner {
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
            options,
            weights,
        };
        tuner.fill(num_pages, rows_max);
        Ok(tuner)
    }

    /// Gives rows and KV cache numbers of about one: a GPU takes less power over zeros, and is
    /// faster than it will be.
    fn fill(&mut self, num_pages: usize, rows_max: usize) {
        let Tuner { backend, inputs, residual, qkv, gate_up, logits, .. } = self;
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

    fn time(&mut self, case: &Case) -> Result<Times, Error> {
        match *case {
            Case::Linear { role, rows } => return self.linear(role, rows),
            Case::Decode { .. } | Case::Prefill { .. } => return Ok(self.attention(case)),
            Case::Embed { .. } => return self.embed(case),
            Case::Copy { rows } => return Ok(self.copy(rows)),
            _ => {}
        }
        let batch = self.begin(case);
        let (norm, qk_norm) = (self.norm, self.qk_norm);
        let num_layers = self.options.num_layers;
        Ok(self.record(&mut |tuner, idx| {
            let Tuner { backend, inputs, residual, qkv, gate_up, logits, kv_cache, .. } = tuner;
            match *case {
                Case::RmsNorm { rows } => {
                    let input = &mut inputs[LinearRole::Qkv as usize];
                    backend.rms_norm(rows, residual, None, &norm, input);
                }
                Case::Rope { .. } => {
                    let qk_norm = qk_norm.as_ref().map(|[q, k]| (q, k));
                    backend.rope(&batch, idx % num_layers, qkv, qk_norm, kv_cache);
                }
                Case::SiluAndMul { rows } => {
                    let input = &mut inputs[LinearRole::Down as usize];
                    backend.silu_and_mul(rows, gate_up, input);
                }
                Case::Sample { rows } => backend.launch_sample(logits, rows),
                _ => unreachable!("other cases are timed above"),
            }
        }))
    }

    /// Uploads the case's batch.
    fn begin(&mut self, case: &Case) -> Batch {
        let batch = batch(&self.shape, case);
        self.backend.begin_rows(&batch);
        batch
    }

    fn embed(&mut self, case: &Case) -> Result<Times, Error> {
        let embedding = match self.embedding {
            Some(embedding) => embedding,
            None => self.backend.load_embedding(&self.weights.embedding()?.view())?,
        };
        self.embedding = Some(embedding);
        let batch = self.begin(case);
        Ok(self.record(&mut |tuner, _| {
            tuner.backend.embed(&embedding, &batch.tokens, &mut tuner.residual);
        }))
    }

    /// The weights of a linear, as often as launches are to go through them.
    fn load(&mut self, role: LinearRole) -> Result<(), Error> {
        if self.linears.as_ref().is_some_and(|(loaded, _)| *loaded == role) {
            return Ok(());
        }
        let num_copies = self.options.cold_bytes.div_ceil(weight_bytes(&self.shape, role).max(1));
        let num_copies = num_copies.clamp(1, self.options.num_launches.max(1));
        let tensors = self.weights.linear(role, 0)?;
        let source = tensors.source();
        let linears = (0..num_copies).map(|_| self.backend.load_linear(role, &source));
        self.linears = Some((role, linears.collect::<Result<_, Error>>()?));
        Ok(())
    }

    fn linear(&mut self, role: LinearRole, rows: usize) -> Result<Times, Error> {
        self.load(role)?;
        self.begin(&Case::Linear { role, rows });
        Ok(self.record(&mut |tuner, idx| {
            let Tuner { backend, linears, inputs, delta, qkv, gate_up, logits, .. } = tuner;
            let out = match role {
                LinearRole::Qkv => qkv,
                LinearRole::O | LinearRole::Down => delta,
                LinearRole::GateUp => gate_up,
                LinearRole::Head => logits,
            };
            let (_, linears) = linears.as_ref().expect("loaded above");
            let linear = &linears[idx % linears.len()];
            backend.linear(rows, linear, &inputs[role as usize], out);
        }))
    }

    fn attention(&mut self, case: &Case) -> Times {
        let batch = self.begin(case);
        let num_layers = self.options.num_layers;
        self.record(&mut |tuner, idx| {
            let Tuner { backend, inputs, qkv, kv_cache, .. } = tuner;
            let out = &mut inputs[LinearRole::O as usize];
            backend.paged_attention(&batch, idx % num_layers, qkv, kv_cache, out);
        })
    }

    fn copy(&mut self, rows: usize) -> Times {
        const NUM_TIMES: usize = 8;
        self.samples(NUM_TIMES, &mut |tuner| {
            tuner.backend.copy_rows(&tuner.logits, rows, NUM_TIMES);
        })
    }

    /// Records launches of an op, which is told the number of each, and times them.
    fn record(&mut self, op: &mut dyn FnMut(&mut Self, usize)) -> Times {
        let num_launches = self.options.num_launches.max(1);
        self.backend.begin_recording();
        for idx in 0..num_launches {
            op(self, idx);
        }
        let recording = self.backend.end_recording();
        self.samples(num_launches, &mut |tuner| tuner.backend.run(&recording))
    }

    /// Times of one of the `num_launches` of `run`.
    fn samples(&mut self, num_launches: usize, run: &mut dyn FnMut(&mut Self)) -> Times {
        run(self);
        let begin = Instant::now();
        let mut samples = Vec::new();
        for _ in 0..self.options.num_samples.max(1) {
            let start = Instant::now();
            run(self);
            samples.push(start.elapsed().as_secs_f64() * 1e6 / num_launches as f64);
            if begin.elapsed() > self.options.time_max {
                break;
            }
        }
        Times::of(samples).expect("one sample at least")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_measured_values() {
        assert_eq!(Times::of(Vec::new()), None);
        let times = Times::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((times.p10, times.p50, times.p90, times.num_samples), (1.0, 2.0, 3.0, 3));
    }
}
