//! How an engine is set up.

use bespoke_kernel_gen::cuda::CudaKernelTable;
use bespoke_kernel_gen::model::{CONTEXT_MAX, ModelConfig, RopeScaling};
use bespoke_kernel_gen::spec::{ActivationType, KvDType};
use bespoke_kernel_gen::target::Target;

use crate::backend::cuda::KvMemory;
use crate::kernels::KernelTable;
use crate::kernels::choice::DeviceChoice;

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The fastest backend that this build has kernels for.
    #[default]
    Auto,
    /// Plain loops in float32, any shape.
    Reference,
    /// Kernels generated for the model's shapes, on the CPU.
    Cpu,
    /// Kernels generated for the model's shapes, on an NVIDIA GPU.
    Cuda,
    /// Hashes in place of the model's mathematics, with its vocabulary and context: to measure and
    /// test what is around a model.
    Null,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// The model folder's safetensors.
    #[default]
    Checkpoint,
    /// Random ones in the shapes of the folder's `config.json`: what the model says means nothing.
    Dummy,
}

/// Options of [`Engine::load`](crate::engine::Engine::load).
#[derive(Clone, Copy)]
pub struct EngineOptions {
    pub backend: BackendChoice,
    pub load_format: LoadFormat,
    /// Element type of the KV cache. The reference backend keeps float32 whatever this says.
    pub kv_dtype: KvDType,
    /// What weights are multiplied with. int8 is for quantized weights, and others ignore it;
    /// bfloat16 is for models whose weights are all bfloat16, and refused with others and on a GPU.
    pub activation: ActivationType,
    /// Instruction set of the kernels; `None`: the best that this machine and this build have.
    pub target: Option<Target>,
    /// Whose measurements decide about the kernels of the CPU.
    pub device: DeviceChoice,
    /// Threads of one op; `None`: all cores.
    pub num_threads: Option<usize>,
    /// The kernels of this build.
    pub kernels: KernelTable,
    /// Its kernels for GPUs.
    pub cuda_kernels: CudaKernelTable,
    /// Token rows of one step: decode rows and prefill chunks together.
    pub max_batch_tokens: usize,
    /// Rows of one prompt in one step; `None`: as many as the step has.
    pub max_chunk_tokens: Option<usize>,
    /// Sequences that run at once.
    pub max_sequences: usize,
    /// Tokens of one sequence, prompt and output together; `None`: as many as the model was
    /// trained for, as far as a KV cache of [`KV_CACHE_BYTES_DEFAULT`] holds them.
    pub max_context: Option<usize>,
    /// Pages of the KV cache; `None`: enough for `max_sequences` of `max_context` tokens, as far as
    /// [`KV_CACHE_BYTES_DEFAULT`] holds them, but always for one.
    pub num_pages: Option<usize>,
    /// Memory of the KV cache on a GPU, where `num_pages` does not say.
    pub kv_memory: KvMemory,
    /// Whether a GPU records steps of decoding and replays them.
    pub cuda_graphs: bool,
    /// Whether weights are taken packed from the source's cache, and kept there, where it has one.
    pub packed_cache: bool,
    /// Whether requests find the keys and values of earlier ones with the same beginning.
    pub prefix_cache: bool,
    /// Key of the prefix index's hashes; `None`: a random one.
    pub hash_key: Option<[u8; 32]>,
    /// Sessions that are kept at once.
    pub max_sessions: usize,
}

/// Largest KV cache that is allocated when no size is asked for.
pub const KV_CACHE_BYTES_DEFAULT: usize = 2 << 30;

/// Tokens that one sequence of a model can have: its positions, or, under dynamic scaling, which
/// has no last position, as many as of any model.
pub fn context_max(config: &ModelConfig) -> usize {
    match config.rope_scaling {
        RopeScaling::Dynamic { .. } => CONTEXT_MAX,
        _ => config.max_position,
    }
}

impl EngineOptions {
    /// The defaults over the kernels of this build.
    pub fn new(kernels: KernelTable) -> EngineOptions {
        EngineOptions {
            backend: BackendChoice::Auto,
            load_format: LoadFormat::Checkpoint,
            kv_dtype: KvDType::F16,
            activation: ActivationType::Int8,
            target: None,
            device: DeviceChoice::This,
            num_threads: None,
            kernels,
            cuda_kernels: CudaKernelTable::default(),
            max_batch_tokens: 512,
            max_chunk_tokens: None,
            max_sequences: 64,
            max_context: None,
            num_pages: None,
            kv_memory: KvMemory::Share(0.8),
            cuda_graphs: true,
            packed_cache: true,
            prefix_cache: true,
            hash_key: None,
            max_sessions: 256,
        }
    }
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Parts loaded so far.
    pub num_done: usize,
    /// Parts of the model: embedding, layers and head.
    pub num_parts: usize,
}
