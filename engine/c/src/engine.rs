//! Engines: opened, described, closed.

use std::ffi::c_char;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ::engine::Error;
use ::engine::config::{BackendChoice, EngineOptions};
use ::engine::engine::Engine;
use ::engine::handle::{EngineHandle, HandleLimits};
use ::engine::kernel_gen::spec::{ActivationType, KvDType};
use ::engine::kernels::generated;
use ::engine::tokenizer::Tokenizer;

use crate::border::guard;
use crate::handles;
use crate::input::{self, PATH_BYTES_MAX, SizedStruct, size_of_struct};
use crate::output;
use crate::status::{BespokeStatus, Failure};

/// An engine: a model, loaded, and the requests it serves. 0 is none.
pub type BespokeEngine = u64;

/// Where a model runs.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BespokeBackend {
    /// The fastest one that the library has kernels for.
    Auto = 0,
    /// Kernels generated for the model's shapes, on the CPU.
    Cpu = 1,
    /// Plain loops in float32: any model, slowly.
    Reference = 2,
    /// Kernels generated for the model's shapes, on an NVIDIA GPU.
    Cuda = 3,
    /// Hashes instead of a model's mathematics, to test programs with; reads no weights.
    Null = 4,
}

/// Element type of the KV cache. The reference backend keeps float32 whatever this says.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BespokeKvType {
    /// float16
    Default = 0,
    F16 = 1,
    F32 = 2,
    Int8 = 3,
    Int4 = 4,
}

/// What weights are multiplied with.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BespokeActivations {
    /// int8
    Default = 0,
    /// float32 as they are
    Float = 1,
    /// Rounded to 8 bits, with a scale per row and group; for 4-bit weights, others ignore it.
    Int8 = 2,
    /// Rounded to bfloat16; for models whose weights are all bfloat16, on the CPU.
    Bf16 = 3,
}

/// How an engine is set up. Zeros are the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BespokeEngineOptions {
    /// sizeof(BespokeEngineOptions)
    pub size: usize,
    /// A `BespokeBackend`.
    pub backend: i32,
    /// A `BespokeKvType`.
    pub kv_type: i32,
    /// A `BespokeActivations`.
    pub activations: i32,
    /// Threads to compute with, 1024 at most; 0 for one on each core.
    pub num_threads: u32,
    /// Tokens of prompt and answer together; 0 for as many as the model was trained for, as far as
    /// a KV cache of 2 GiB holds them.
    pub max_context: usize,
    /// Requests that run at once, 4096 at most, others wait; 0 for 64.
    pub max_sequences: usize,
    /// Sessions that are kept at once, 65536 at most; 0 for 256.
    pub max_sessions: usize,
}

/// What is told of an engine.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BespokeEngineInfo {
    /// sizeof(BespokeEngineInfo)
    pub size: usize,
    /// Tokens that the model knows; every token id is below.
    pub vocab_size: usize,
    /// Tokens of prompt and answer together.
    pub max_context: usize,
    /// Memory of the weights, in bytes.
    pub weights_bytes: usize,
    /// Memory of the KV cache, in bytes.
    pub kv_cache_bytes: usize,
    /// The `BespokeBackend` that was chosen.
    pub backend: i32,
    /// Whether the model reads and writes text; else it takes and gives token ids alone.
    pub has_tokenizer: i32,
    /// Whether the model takes chat messages.
    pub has_chat_template: i32,
    pub reserved: i32,
}

// SAFETY: numbers.
unsafe impl SizedStruct for BespokeEngineOptions {
    const NAME: &'static str = "BespokeEngineOptions";
}

// SAFETY: numbers.
unsafe impl SizedStruct for BespokeEngineInfo {
    const NAME: &'static str = "BespokeEngineInfo";
}

/// Loads a model and starts an engine for it, on a thread of its own.
///
/// `model_dir` is a folder as the Hugging Face Hub has them, `options` may be null. Returns when
/// the model is loaded, and writes the engine to `engine`, or 0 where it fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_engine_open(
    model_dir: *const c_char,
    options: *const BespokeEngineOptions,
    engine: *mut BespokeEngine,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        let (dir, options) = unsafe {
            output::write(engine, 0, "engine")?;
            let dir = input::text(model_dir, PATH_BYTES_MAX, "model_dir")?;
            (dir, input::read_sized(options)?)
        };
        let opened = OpenEngine::load(PathBuf::from(dir), options.checked()?)?;
        let handle = handles::add_engine(opened)?;
        // SAFETY: as above.
        unsafe { output::write(engine, handle, "engine") }?;
        Ok(BespokeStatus::Ok)
    })
}

/// Cancels the engine's requests, ends its thread, waits for that as long as a step takes, and
/// frees the model. The handles of its requests stay until they are freed, and give what was
/// generated before.
#[unsafe(no_mangle)]
pub extern "C" fn bespoke_engine_close(engine: BespokeEngine) -> BespokeStatus {
    guard(|| {
        let engine = handles::remove_engine(engine)?;
        // NOTE: another thread may be about to let go of the engine; its thread ends all the same.
        engine.handle.drain(Duration::ZERO);
        Ok(BespokeStatus::Ok)
    })
}

/// Describes an engine. `info->size` has to be set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_engine_info(
    engine: BespokeEngine,
    info: *mut BespokeEngineInfo,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { size_of_struct(info) }?;
        let engine = handles::engine(engine)?;
        // SAFETY: as above.
        unsafe { output::write_sized(info, engine.info) }?;
        Ok(BespokeStatus::Ok)
    })
}

/// What an engine's handle stands for.
pub(crate) struct OpenEngine {
    pub(crate) handle: EngineHandle,
    tokenizer: Option<Arc<Tokenizer>>,
    /// Tokens that end an answer.
    pub(crate) end_ids: Arc<[u32]>,
    pub(crate) info: BespokeEngineInfo,
}

impl OpenEngine {
    fn load(dir: PathBuf, options: EngineOptions) -> Result<OpenEngine, Failure> {
        let tokenizer = Tokenizer::load_optional(&dir)?.map(Arc::new);
        let of_engine = tokenizer.clone();
        let load = move || load_engine(&dir, &options, of_engine);
        let handle = EngineHandle::start(load, HandleLimits::default())?;
        OpenEngine::of(handle, tokenizer)
    }

    /// An engine that runs, and knows `tokenizer`.
    pub(crate) fn of(
        handle: EngineHandle,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<OpenEngine, Failure> {
        let template = tokenizer.as_ref().and_then(|tokenizer| tokenizer.chat_template());
        let has_chat_template = i32::from(template.is_some());
        let has_tokenizer = i32::from(tokenizer.is_some());
        let (info, end_ids) = handle.call(move |engine| {
            let info = BespokeEngineInfo { has_tokenizer, has_chat_template, ..describe(engine) };
            (info, Arc::from(engine.config().eos_token_ids.as_slice()))
        })?;
        Ok(OpenEngine { handle, tokenizer, end_ids, info })
    }

    /// The tokenizer, or an error that says what works without one.
    pub(crate) fn tokenizer(&self) -> Result<&Arc<Tokenizer>, Failure> {
        self.tokenizer.as_ref().ok_or_else(|| {
            let message = "the model has no tokenizer.json, so it reads no text; give it token \
                           ids, or add the file";
            Failure::new(BespokeStatus::Unsupported, message)
        })
    }

    pub(crate) fn tokenizer_if_any(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }
}

fn load_engine(
    dir: &Path,
    options: &EngineOptions,
    tokenizer: Option<Arc<Tokenizer>>,
) -> Result<Engine, Error> {
    let mut engine = Engine::load(dir, options, &mut |_| {})?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.check_vocab_size(engine.shape().vocab_size)?;
        engine.add_eos_ids(tokenizer.eos_ids());
        engine.set_tokenizer(tokenizer);
    }
    Ok(engine)
}

fn describe(engine: &Engine) -> BespokeEngineInfo {
    let backend = match engine.backend_name() {
        "reference" => BespokeBackend::Reference,
        "cuda" => BespokeBackend::Cuda,
        "null" => BespokeBackend::Null,
        _ => BespokeBackend::Cpu,
    };
    let memory = engine.memory();
    BespokeEngineInfo {
        size: size_of::<BespokeEngineInfo>(),
        vocab_size: engine.shape().vocab_size,
        max_context: engine.max_context(),
        weights_bytes: memory.weights_bytes,
        kv_cache_bytes: memory.kv_cache_bytes,
        backend: backend as i32,
        has_tokenizer: 0,
        has_chat_template: 0,
        reserved: 0,
    }
}

impl BespokeEngineOptions {
    fn checked(&self) -> Result<EngineOptions, Failure> {
        let default = EngineOptions::new(generated::table());
        let num_threads = at_most("num_threads", self.num_threads as usize, 1024)?;
        let max_sequences = at_most("max_sequences", self.max_sequences, 4096)?;
        let max_sequences = max_sequences.unwrap_or(default.max_sequences);
        let max_sessions = at_most("max_sessions", self.max_sessions, 1 << 16)?;
        Ok(EngineOptions {
            backend: backend(self.backend)?,
            kv_dtype: kv_type(self.kv_type)?,
            activation: activations(self.activations)?,
            cuda_kernels: generated::cuda_table(),
            num_threads,
            max_context: (self.max_context > 0).then_some(self.max_context),
            max_sequences,
            max_batch_tokens: default.max_batch_tokens.max(max_sequences),
            max_sessions: max_sessions.unwrap_or(default.max_sessions),
            ..default
        })
    }
}

fn backend(number: i32) -> Result<BackendChoice, Failure> {
    const CHOICES: [(BespokeBackend, BackendChoice); 5] = [
        (BespokeBackend::Auto, BackendChoice::Auto),
        (BespokeBackend::Cpu, BackendChoice::Cpu),
        (BespokeBackend::Reference, BackendChoice::Reference),
        (BespokeBackend::Cuda, BackendChoice::Cuda),
        (BespokeBackend::Null, BackendChoice::Null),
    ];
    let found = CHOICES.iter().find(|(named, _)| *named as i32 == number);
    found.map(|(_, choice)| *choice).ok_or_else(|| unknown("backend", number))
}

fn kv_type(number: i32) -> Result<KvDType, Failure> {
    const TYPES: [(BespokeKvType, KvDType); 5] = [
        (BespokeKvType::Default, KvDType::F16),
        (BespokeKvType::F16, KvDType::F16),
        (BespokeKvType::F32, KvDType::F32),
        (BespokeKvType::Int8, KvDType::I8),
        (BespokeKvType::Int4, KvDType::I4),
    ];
    let found = TYPES.iter().find(|(named, _)| *named as i32 == number);
    found.map(|(_, kv_type)| *kv_type).ok_or_else(|| unknown("kv_type", number))
}

fn activations(number: i32) -> Result<ActivationType, Failure> {
    const TYPES: [(BespokeActivations, ActivationType); 4] = [
        (BespokeActivations::Default, ActivationType::Int8),
        (BespokeActivations::Float, ActivationType::Float),
        (BespokeActivations::Int8, ActivationType::Int8),
        (BespokeActivations::Bf16, ActivationType::Bf16),
    ];
    let found = TYPES.iter().find(|(named, _)| *named as i32 == number);
    found.map(|(_, activations)| *activations).ok_or_else(|| unknown("activations", number))
}

fn unknown(name: &str, number: i32) -> Failure {
    Failure::argument(format!("{name} is {number}, which stands for nothing; see bespoke.h"))
}

/// `None` for 0, the default.
fn at_most(name: &str, value: usize, value_max: usize) -> Result<Option<usize>, Failure> {
    match value {
        0 => Ok(None),
        _ if value <= value_max => Ok(Some(value)),
        _ => Err(Failure::argument(format!("{name} is {value}; it can be {value_max} at most"))),
    }
}
