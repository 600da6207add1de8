//! Generated kernels on an NVIDIA GPU.
//!
//! The backend is generic over [`Device`]: the driver's, or one that emulates a GPU in tests. Rows
//! between ops are 16 bits wide (the model's type; float16 for float32 models), residuals and
//! logits float32.
//!
//! Everything that a step depends on (tokens, slots, angles, pages, work items) is uploaded to
//! fixed places before its ops are launched, so that the ops of decoding steps are recorded once
//! for each of a few batch sizes ([`step::buckets`]), at load, and replayed afterwards.

mod buffers;
pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
mod kernels;
mod ops;
pub mod pack;
pub mod params;
pub mod step;

use std::collections::BTreeMap;

use bespoke_kernel_gen::cuda::{KvType, Variant};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{KvDType, ModelShape};

pub use buffers::{CudaInput, CudaKvCache, CudaLinear, CudaRows};
use device::{Address, Device};
use kernels::Kernels;
use step::StepInputs;

use crate::error::Error;

/// Memory of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvMemory {
    /// Of what is free once weights and activations are there, above 0 and at most 1.
    Share(f64),
    Bytes(usize),
}

/// How the CUDA backend runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CudaOptions {
    pub kv_dtype: KvDType,
    pub kv_memory: KvMemory,
    /// Whether decoding steps are recorded and replayed.
    pub graphs: bool,
}

/// The generated kernels of one model on one device.
pub struct CudaBackend<D: Device> {
    device: D,
    kernels: Kernels<D::Kernel>,
    shape: ModelShape,
    eps: f32,
    kv_type: KvType,
    kv_memory: KvMemory,
    has_graphs: bool,
    /// By the number of rows.
    graphs: BTreeMap<usize, D::Graph>,
    /// Rows of the step that is being recorded.
    recorded_rows: Option<usize>,
    inputs: Option<StepInputs<D::Host>>,
    work: Work<D::Host>,
    weights_bytes: usize,
    num_graph_steps: u64,
}

/// Memory that ops share.
struct Work<H> {
    workspace: Address,
    workspace_bytes: usize,
    counters: Address,
    num_counters: usize,
    /// `[logit_rows_max]` row indices.
    select: Address,
    /// `[logit_rows_max]`
    stats: Address,
    host: Option<H>,
    logits: Vec<f32>,
}

impl<D: Device> CudaBackend<D> {
    /// Looks up every kernel the model needs; [`Error::MissingKernels`] names those that `device`
    /// has not.
    pub fn new(
        mut device: D,
        config: &ModelConfig,
        shape: &ModelShape,
        options: &CudaOptions,
    ) -> Result<CudaBackend<D>, Error> {
        let Some(kv_type) = KvType::of(options.kv_dtype) else {
            return Err(Error::Request(
                "a KV cache of float32 elements exists on the CPU only; choose f16, int8 or int4"
                    .into(),
            ));
        };
        check_kv_memory(options.kv_memory)?;
        let kernels = Kernels::load(&mut device, shape, kv_type)?;
        let work = Work {
            workspace: Address::NULL,
            workspace_bytes: 0,
            counters: Address::NULL,
            num_counters: 0,
            select: Address::NULL,
            stats: Address::NULL,
            host: None,
            logits: Vec::new(),
        };
        Ok(CudaBackend {
            device,
            kernels,
            shape: shape.clone(),
            eps: config.rms_norm_eps,
            kv_type,
            kv_memory: options.kv_memory,
            has_graphs: options.graphs,
            graphs: BTreeMap::new(),
            recorded_rows: None,
            inputs: None,
            work,
            weights_bytes: 0,
            num_graph_steps: 0,
        })
    }

    pub fn device(&self) -> &D {
        &self.device
    }

    /// Loads kernels that may be tried; before [`Backend::reserve`], which makes room for them.
    ///
    /// # Errors
    /// The device has not the memory, or not the kernels.
    pub fn load_candidates(&mut self, variants: &[Variant]) -> Result<(), Error> {
        self.kernels.load_candidates(&mut self.device, variants)
    }

    /// Lets a loaded candidate serve its spec, whatever the rows (of attention: decoding, or
    /// prompts), until the next call; `None`: what serves otherwise. Its workspace is made for the
    /// rows of its regime.
    pub fn try_out(&mut self, candidate: Option<Variant>) {
        self.kernels.try_out(candidate);
    }

    /// Ops are recorded instead of run, until [`CudaBackend::end_recording`]. They must not be ones
    /// that copy from the host: `begin_rows` comes before, and `rms_norm_select` is none of them.
    pub fn begin_recording(&mut self) {
        self.device.begin_capture();
    }

    pub fn end_recording(&mut self) -> D::Graph {
        self.device.end_capture()
    }

    /// Runs a recording, and waits for its end.
    pub fn run(&mut self, recording: &D::Graph) {
        self.device.replay(recording);
        self.device.synchronize();
    }

    pub fn synchronize(&mut self) {
        self.device.synchronize();
    }

    /// Copies rows of logits to others `num_times`, and waits for the end: what a copy of memory
    /// costs. Rows `0..num_rows` go to those behind them.
    pub fn copy_rows(&mut self, rows: &CudaRows, num_rows: usize, num_times: usize) {
        assert!(rows.is_f32 && 2 * num_rows <= rows.rows_max);
        let len = num_rows * rows.width * size_of::<f32>();
        for _ in 0..num_times {
            self.device.copy(rows.data, rows.data.offset(len), len);
        }
        self.device.synchronize();
    }

    /// Steps that were replayed from a recording.
    pub fn num_graph_steps(&self) -> u64 {
        self.num_graph_steps
    }

    /// Rows that an op is launched for where the batch has `num_rows`.
    fn launched(&self, num_rows: usize) -> usize {
        self.recorded_rows.unwrap_or(num_rows)
    }
}

fn check_kv_memory(kv_memory: KvMemory) -> Result<(), Error> {
    match kv_memory {
        KvMemory::Share(share) if !(share > 0.0 && share <= 1.0) => Err(Error::Request(format!(
            "kv_memory is {share}, it must be a share above 0 and at most 1, or a number of bytes"
        ))),
        _ => Ok(()),
    }
}
