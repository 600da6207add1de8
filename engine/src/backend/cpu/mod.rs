//! Generated kernels on this machine's cores.

mod ahead;
mod buffers;
mod kernels;
pub mod limits;
pub mod memory;
mod meter;
#[cfg(target_os = "linux")]
mod numa;
mod ops;
pub mod pack;
pub mod packed;
pub mod slices;
pub mod team;
pub mod trial;
pub mod work;

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{ActivationType, DType, KvDType, LinearRole, ModelShape};
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::device::{CpuDevice, this_cpu};

use ahead::Order;
use buffers::Packed;
pub use buffers::{CpuInput, CpuKvCache, CpuLinear, CpuRows};
use kernels::Kernels;
use limits::Limits;
use memory::Memory;
use meter::Meter;
use pack::Panels;
use team::Team;

use crate::backend::KernelUsage;
use crate::error::Error;
use crate::kernels::KernelTable;
use crate::kernels::choice::{Choice, DeviceChoice};
use crate::model::linear::{DenseView, LinearSource};

/// How the CPU backend runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    pub kv_dtype: KvDType,
    /// Rows that linears read.
    pub activation: ActivationType,
    /// `None`: as many as the process may use.
    pub num_threads: Option<usize>,
    /// `None`: the best instruction set of this machine that the table has kernels for.
    pub target: Option<Target>,
    /// Whose measurements decide about the kernels.
    pub device: DeviceChoice,
}

/// The generated kernels of one model, the threads that run them, and their scratch memory.
pub struct CpuBackend {
    team: Team,
    kernels: Kernels,
    shape: ModelShape,
    eps: f32,
    kv_dtype: KvDType,
    /// One per thread.
    scratch: Vec<Memory>,
    weights_bytes: usize,
    meter: Meter,
    order: Order,
    /// Measured when they are first asked for.
    limits: Option<Limits>,
}

/// Memory that is read to measure its rate: more than the caches of the machines we know hold.
const STREAM_BYTES: usize = 192 << 20;

/// Whether this machine has the instructions of `target`.
pub fn is_available(target: Target) -> bool {
    target.is_available()
}

/// The best target that this machine has and `table` holds kernels for.
pub fn best_target(table: &KernelTable) -> Option<Target> {
    let holds = |target: &Target| table.kernels.iter().any(|kernel| kernel.target == *target);
    Target::ALL.into_iter().rev().filter(|target| is_available(*target)).find(holds)
}

/// As many threads as the process may use.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The caller and as many threads more as there shall be.
fn start_team(num_threads: usize) -> Result<Team, Error> {
    if !(1..=1024).contains(&num_threads) {
        return Err(Error::Request(format!("{num_threads} threads; choose 1 to 1024")));
    }
    Team::new(num_threads)
        .map_err(|error| Error::Resources(format!("cannot start {num_threads} threads: {error}")))
}

/// Key of the device class whose servings count on `target`.
pub fn device_key(choice: DeviceChoice, target: Target, num_threads: usize) -> Option<String> {
    match choice {
        DeviceChoice::This => Some(CpuDevice { target, ..this_cpu(num_threads) }.key()),
        DeviceChoice::Class(key) => Some(key.to_owned()),
        DeviceChoice::Any => None,
    }
}

impl CpuBackend {
    /// Looks up every kernel the model needs; [`Error::MissingKernels`] names those that are not in
    /// `table`.
    pub fn new(
        table: &KernelTable,
        config: &ModelConfig,
        shape: &ModelShape,
        options: &CpuOptions,
    ) -> Result<CpuBackend, Error> {
        let target = match options.target {
            Some(target) if is_available(target) => target,
            Some(target) => {
                return Err(Error::Unsupported(format!(
                    "this machine lacks the instructions of target {}; choose another",
                    target.name()
                )));
            }
            None => best_target(table).unwrap_or(Target::Portable),
        };
        let num_threads = options.num_threads.unwrap_or_else(available_threads);
        let team = start_team(num_threads)?;
        let device = device_key(options.device, target, num_threads);
        let choice = Choice { table, target, device: device.as_deref() };
        let kernels = Kernels::find(choice, shape, options)?;
        let scratch = (0..num_threads)
            .map(|_| Memory::new(kernels.scratch_bytes, "kernel scratch"))
            .collect::<Result<_, _>>()?;
        let meter = Meter::new(&kernels.used);
        Ok(CpuBackend {
            team,
            kernels,
            shape: shape.clone(),
            eps: config.rms_norm_eps,
            kv_dtype: options.kv_dtype,
            scratch,
            weights_bytes: 0,
            meter,
            order: Order::new(shape.num_layers * 4 + 1),
            limits: None,
        })
    }

    pub fn target(&self) -> Target {
        self.kernels.target
    }

    /// The kernels that steps have used, against what this machine can do.
    fn usage(&mut self) -> Result<Vec<KernelUsage>, Error> {
        let limits = match self.limits {
            Some(limits) => limits,
            None => *self.limits.insert(Limits::measure(&mut self.team, STREAM_BYTES)?),
        };
        let usage = |count: &meter::Count| {
            let (nanoseconds, bound) = count.work.bound(&limits);
            KernelUsage {
                symbol: count.kernel.symbol,
                op: count.kernel.spec.op(),
                num_calls: count.num_calls,
                seconds: count.nanoseconds as f64 * 1e-9,
                limit_seconds: nanoseconds * 1e-9,
                bound: bound.name(),
                bytes: count.work.bytes() as u64,
                ops: count.work.ops() as u64,
            }
        };
        Ok(self.meter.counts().map(usage).collect())
    }

    fn pack(
        &mut self,
        role: LinearRole,
        kernels_idx: usize,
        source: &LinearSource<'_>,
    ) -> Result<Packed, Error> {
        let linear = self.kernels.linears[kernels_idx];
        let shape = self.shape.linear(role);
        let panels = Panels {
            n: shape.n,
            k: shape.k,
            lanes: self.kernels.target.lanes(),
            cols: linear.cols,
        };
        let num_threads = self.team.len();
        match linear.weights {
            kernels::Weights::Dense(DType::I8) => {
                let (weight, scales) = pack::int8(source, panels, num_threads)?;
                Ok(Packed::Int8 { weight, scales })
            }
            kernels::Weights::Dense(dtype) => {
                Ok(Packed::Dense { weight: pack::dense(source, dtype, panels, num_threads)? })
            }
            kernels::Weights::Bf16Pairs => {
                Ok(Packed::Bf16Pairs { weight: pack::bf16_pairs(source, panels, num_threads)? })
            }
            kernels::Weights::Awq { group } => {
                Ok(Packed::Awq(pack::awq(source, role, group, panels, num_threads)?))
            }
        }
    }

    fn load_linear(
        &mut self,
        role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<CpuLinear, Error> {
        let shape = self.shape.linear(role);
        assert_eq!((source.n(), source.k()), (shape.n, shape.k), "{role:?} has other sizes");
        let kernels_idx = self.kernels.linear_idx(role, source.is_quantized());
        let packed = self.pack(role, kernels_idx, source)?;
        let bias = match &source.bias {
            None => None,
            Some(bias) => Some(float_memory(bias, "a bias")?),
        };
        let linear = CpuLinear { role, kernels_idx, packed, bias };
        self.weights_bytes += linear.bytes();
        Ok(linear)
    }

    fn load_embedding(&mut self, source: &DenseView<'_>) -> Result<Memory, Error> {
        let table = pack::embedding(source, self.shape.dtype)?;
        self.weights_bytes += table.len();
        Ok(table)
    }

    fn load_norm(&mut self, weight: &[f32]) -> Result<Memory, Error> {
        let memory = float_memory(weight, "a norm")?;
        self.weights_bytes += memory.len();
        Ok(memory)
    }
}

fn float_memory(values: &[f32], what: &str) -> Result<Memory, Error> {
    let mut memory = Memory::floats(values.len(), what)?;
    memory.as_f32_mut().copy_from_slice(values);
    Ok(memory)
}
