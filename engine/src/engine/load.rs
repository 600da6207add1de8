//! Loading a model into an engine.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use bespoke_kernel_gen::model::{ModelConfig, RopeScaling};
use bespoke_kernel_gen::spec::ModelShape;

use super::{Engine, LOGIT_ROWS, Model};
use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::cuda::device::Device;
#[cfg(feature = "cuda")]
use crate::backend::cuda::driver::Driver;
use crate::backend::cuda::{CudaBackend, CudaOptions};
use crate::backend::null::{NullBackend, NullOptions};
use crate::backend::reference::ReferenceBackend;
use crate::batch::{Batch, BatchLimits};
use crate::config::{
    BackendChoice, EngineOptions, KV_CACHE_BYTES_DEFAULT, LoadFormat, Progress, context_max,
};
use crate::error::Error;
use crate::kv_cache::{PagePool, num_pages};
use crate::model::decoder::{Decoder, DecoderLimits, FromWeights, Parts};
use crate::model::rope::Rope;
use crate::model::weights::{ModelWeights, RandomWeights, Weights};
use crate::packed::{PackedCache, PackedFile, PackedParts};
use crate::sampling::Sampler;
use crate::scheduler::{Scheduler, SchedulerLimits};
use crate::session::Sessions;
use crate::session_file::Identity;
use crate::source::{ModelSource, WeightsSource};
use crate::startup::Startup;

impl Engine {
    /// Loads the model folder `dir`.
    pub fn load(
        dir: &Path,
        options: &EngineOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Engine, Error> {
        Engine::load_from(&ModelSource::folder(dir), options, progress)
    }

    /// Loads a model from wherever it is.
    pub fn load_from(
        source: &ModelSource,
        options: &EngineOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Engine, Error> {
        if options.backend == BackendChoice::Null {
            return Engine::load_null(source, options);
        }
        if let Some(engine) = Engine::load_on_gpu(source, options, progress)? {
            return Ok(engine);
        }
        Engine::load_by(source, options, &mut |loader, weights| match options.backend {
            BackendChoice::Reference => {
                let (config, shape) = (loader.config, loader.shape);
                let backend = match options.num_threads {
                    None => ReferenceBackend::new(config, shape),
                    Some(num) => ReferenceBackend::with_threads(config, shape, num),
                };
                let parts = &mut FromWeights(weights);
                let (decoder, max_context) = loader.load(backend, parts, progress)?;
                Ok((Model::Reference(decoder), max_context))
            }
            _ => {
                let (decoder, max_context) = loader.load_cpu(weights, progress)?;
                Ok((Model::Cpu(decoder), max_context))
            }
        })
    }

    /// The engine on a GPU where one is asked for, or found and good for the options; `None` where
    /// the CPU is to be used.
    #[cfg(feature = "cuda")]
    fn load_on_gpu(
        source: &ModelSource,
        options: &EngineOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<Engine>, Error> {
        let device = match options.backend {
            BackendChoice::Cuda => Driver::open(&options.cuda_kernels)?,
            // A GPU that cannot be used is no reason not to use the CPU.
            BackendChoice::Auto => match Driver::open(&options.cuda_kernels) {
                Ok(device) => device,
                Err(_) => return Ok(None),
            },
            _ => return Ok(None),
        };
        match Engine::load_device(source, device, options, progress) {
            Err(Error::MissingKernels { .. }) if options.backend == BackendChoice::Auto => Ok(None),
            result => result.map(Some),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn load_on_gpu(
        _source: &ModelSource,
        options: &EngineOptions,
        _progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<Engine>, Error> {
        match options.backend {
            BackendChoice::Cuda => Err(Error::Unsupported(
                "this binary was built without CUDA; build it with `cargo build --release \
                 --features cuda`, or run with `--backend cpu`"
                    .into(),
            )),
            _ => Ok(None),
        }
    }

    /// As [`Engine::load`] on a GPU, or on what stands for one.
    pub fn load_on<D: Device>(
        dir: &Path,
        device: D,
        options: &EngineOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Engine, Error>
    where
        CudaBackend<D>: Send + 'static,
    {
        Engine::load_device(&ModelSource::folder(dir), device, options, progress)
    }

    fn load_device<D: Device>(
        source: &ModelSource,
        device: D,
        options: &EngineOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Engine, Error>
    where
        CudaBackend<D>: Send + 'static,
    {
        let mut device = Some(device);
        Engine::load_by(source, options, &mut |loader, weights| {
            let device = device.take().expect("a model is loaded once");
            let backend = loader.cuda(device)?;
            let parts = &mut FromWeights(weights);
            let (decoder, max_context) = loader.load(backend, parts, progress)?;
            Ok((Model::Cuda(Box::new(decoder)), max_context))
        })
    }

    /// The null backend in the sizes of the model, whose weights are not read.
    fn load_null(source: &ModelSource, options: &EngineOptions) -> Result<Engine, Error> {
        let config = ModelConfig::parse(&source.files.config_text()?)?;
        let null = NullOptions {
            vocab_size: config.vocab_size,
            page_size: options.kernels.page_size,
            max_position: position_max(&config),
            fault: None,
        };
        Engine::null(&null, options)
    }

    fn load_by(
        source: &ModelSource,
        options: &EngineOptions,
        load: LoadModel<'_>,
    ) -> Result<Engine, Error> {
        let config_text = source.files.config_text()?;
        let config = ModelConfig::parse(&config_text)?;
        let name = source.files.name();
        let shape = ModelShape { page_size: options.kernels.page_size, ..config.shape(&name)? };
        check_options(options)?;
        let mut loader = Loader::new(&config, &shape, options);
        let ((model, max_context), fingerprint) = match (options.load_format, &source.weights) {
            (LoadFormat::Checkpoint, WeightsSource::Folder(dir)) => {
                let open = || Weights::open(dir, &config, &shape);
                let weights = loader.startup.get_mut().time("open weights", open)?;
                let fingerprint = weights.fingerprint()?.to_string();
                let (of_weights, files) = (fingerprint.clone(), weights.files());
                let kept = |cache| Kept { cache, fingerprint: of_weights, files };
                let cache = source.packed_cache.as_ref().filter(|_| options.packed_cache);
                loader.kept = cache.map(kept);
                (load(&loader, &weights)?, fingerprint)
            }
            (LoadFormat::Checkpoint, WeightsSource::Packed(file)) => {
                loader.packed = Some(file);
                let parts = PackedParts::new(file, &shape, config.tie_word_embeddings);
                (load(&loader, &parts)?, file.source().to_owned())
            }
            (LoadFormat::Dummy, _) => {
                let weights = RandomWeights::new(&shape, 0);
                (load(&loader, &weights)?, "dummy".to_owned())
            }
        };
        let startup = loader.startup.take();
        let model_name = format!("{} {fingerprint}", blake3::hash(config_text.as_bytes()));
        let engine = Engine::new(model, config, shape, max_context, options, &model_name)?;
        Ok(Engine { startup, weights_name: fingerprint, ..engine })
    }

    /// An engine on the null backend, without a model's files. Of `options` only the sizes count.
    pub fn null(null: &NullOptions, options: &EngineOptions) -> Result<Engine, Error> {
        let config = null.config()?;
        let shape = ModelShape { page_size: null.page_size, ..config.shape("null")? };
        check_options(options)?;
        let backend = NullBackend::new(null);
        let loader = Loader::new(&config, &shape, options);
        let (limits, max_context) = loader.limits(backend.page_bytes())?;
        let decoder = Decoder::without_weights(backend, &shape, limits)?;
        let model_name = format!("null {}", shape.vocab_size);
        Engine::new(Model::Null(decoder), config, shape, max_context, options, &model_name)
    }

    /// An idle engine over a loaded model.
    fn new(
        model: Model,
        config: ModelConfig,
        shape: ModelShape,
        max_context: usize,
        options: &EngineOptions,
        model_name: &str,
    ) -> Result<Engine, Error> {
        let limits = *model.limits();
        let scheduler = Scheduler::new(SchedulerLimits {
            batch_tokens_max: options.max_batch_tokens,
            chunk_tokens_max: options.max_chunk_tokens.unwrap_or(options.max_batch_tokens),
            sequences_max: options.max_sequences,
        });
        let identity = Identity {
            model: blake3::hash(model_name.as_bytes()).to_string(),
            layout: layout(&model, &shape, options),
        };
        Ok(Engine {
            rope: Rope::new(&config),
            sampler: Sampler::new(shape.vocab_size),
            pool: PagePool::new(model.num_pages(), shape.page_size, hash_key(options)?),
            config,
            shape,
            max_context,
            model,
            scheduler,
            sessions: Sessions::new(options.max_sessions),
            tokenizer: None,
            uses_prefixes: options.prefix_cache,
            identity,
            startup: Startup::default(),
            weights_name: String::new(),
            next_id: 0,
            batch: Batch::default(),
            start_lens: Vec::new(),
            stats: Vec::with_capacity(limits.logit_rows_max),
            samples: Vec::with_capacity(limits.logit_rows_max),
            ended: Vec::new(),
        })
    }
}

/// Names everything but the model that the bits of keys and values depend on.
fn layout(model: &Model, shape: &ModelShape, options: &EngineOptions) -> String {
    let mut hasher = blake3::Hasher::new();
    let page_bytes = on_decoder!(model, decoder => decoder.page_bytes());
    let backend = on_decoder!(model, decoder => decoder.identity());
    let EngineOptions { kv_dtype, activation, kernels, .. } = options;
    let page_size = shape.page_size;
    hasher.update(
        format!("{backend} {kv_dtype:?} {activation:?} {page_size} {page_bytes}").as_bytes(),
    );
    for kernel in kernels.kernels {
        hasher.update(kernel.symbol.as_bytes());
        hasher.update(kernel.source_hash.as_bytes());
    }
    hasher.finalize().to_string()
}

/// The key of the prefix index: from the system where none is given.
fn hash_key(options: &EngineOptions) -> Result<[u8; 32], Error> {
    if let Some(key) = options.hash_key {
        return Ok(key);
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| {
        Error::Resources(format!("the system gives no random key for the prefix cache: {error}"))
    })?;
    Ok(key)
}

/// Loads a model on some backend; gives the longest context too.
type LoadModel<'a> =
    &'a mut dyn FnMut(&Loader<'_>, &dyn ModelWeights) -> Result<(Model, usize), Error>;

/// What a decoder is loaded from.
struct Loader<'a> {
    config: &'a ModelConfig,
    shape: &'a ModelShape,
    options: &'a EngineOptions,
    /// The weights, where they are packed already.
    packed: Option<&'a PackedFile>,
    /// Where they may be, where they are not.
    kept: Option<Kept<'a>>,
    startup: RefCell<Startup>,
}

/// A checkpoint's packed weights in a cache.
struct Kept<'a> {
    cache: &'a PackedCache,
    fingerprint: String,
    files: Vec<PathBuf>,
}

type LoadedCpu = (Decoder<CpuBackend>, usize);

impl<'a> Loader<'a> {
    fn new(
        config: &'a ModelConfig,
        shape: &'a ModelShape,
        options: &'a EngineOptions,
    ) -> Loader<'a> {
        Loader {
            config,
            shape,
            options,
            packed: None,
            kept: None,
            startup: RefCell::new(Startup::default()),
        }
    }

    /// The model on the CPU: packed weights where they lie, others packed, and kept for the next
    /// time where there is a cache.
    fn load_cpu(
        &self,
        weights: &dyn ModelWeights,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<LoadedCpu, Error> {
        let backend = self.cpu()?;
        let mut startup = self.startup.borrow_mut();
        let num_threads = backend.num_threads();
        if let Some(file) = self.packed {
            startup.time("check packed weights", || file.check(num_threads))?;
            return startup.time("map weights", || self.load_packed(backend, file, progress));
        }
        let Some(Kept { cache, fingerprint, files }) = &self.kept else {
            let parts = &mut FromWeights(weights);
            return startup.time("pack weights", || self.load(backend, parts, progress));
        };
        let key = PackedCache::key(files, fingerprint, &backend.layout_name())?;
        match startup.time("check packed weights", || cache.open(&key, num_threads)) {
            Ok(Some(file)) => {
                let load = || self.load_packed(backend, &file, progress);
                match startup.time("map weights", load) {
                    Ok(loaded) => return Ok(loaded),
                    Err(error) => {
                        startup.warnings.push(error.to_string());
                        cache.remove(&key);
                    }
                }
            }
            Ok(None) => drop(backend),
            Err(error) => startup.warnings.push(error.to_string()),
        }
        let load = || self.load(self.cpu()?, &mut FromWeights(weights), progress);
        let loaded = startup.time("pack weights", load)?;
        // The next start is slow too, and no worse.
        let _ = startup.time("keep packed weights", || cache.store(&key, &loaded.0));
        Ok(loaded)
    }

    fn load_packed(
        &self,
        backend: CpuBackend,
        file: &PackedFile,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<LoadedCpu, Error> {
        let mut parts = PackedParts::new(file, self.shape, self.config.tie_word_embeddings);
        self.load(backend, &mut parts, progress)
    }

    fn cpu(&self) -> Result<CpuBackend, Error> {
        let options = self.options;
        let cpu_options = CpuOptions {
            kv_dtype: options.kv_dtype,
            activation: options.activation,
            num_threads: options.num_threads,
            target: options.target,
        };
        CpuBackend::new(&options.kernels, self.config, self.shape, &cpu_options)
    }

    fn cuda<D: Device>(&self, device: D) -> Result<CudaBackend<D>, Error> {
        let EngineOptions { kv_dtype, kv_memory, cuda_graphs, .. } = *self.options;
        let cuda_options = CudaOptions { kv_dtype, kv_memory, graphs: cuda_graphs };
        CudaBackend::new(device, self.config, self.shape, &cuda_options)
    }

    /// The decoder and the longest context it serves.
    fn load<B: Backend>(
        &self,
        backend: B,
        parts: &mut dyn Parts<B>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Decoder<B>, usize), Error> {
        let (limits, max_context) = match backend.has_own_memory() {
            true => self.limits_on_device()?,
            false => self.limits(backend.page_bytes())?,
        };
        let shape = self.shape;
        let is_sized_here = limits.num_pages.is_some();
        let decoder = Decoder::load_parts(backend, parts, shape, limits, progress)?;
        if is_sized_here {
            return Ok((decoder, max_context));
        }
        let num_slots = decoder.num_pages() * shape.page_size;
        match self.options.max_context {
            Some(max_context) if max_context > num_slots => Err(Error::Resources(format!(
                "max_context is {max_context}, and the KV cache has room for {num_slots} tokens; \
                 choose a shorter context, or a KV cache of int8 or int4"
            ))),
            _ => Ok((decoder, max_context.min(num_slots))),
        }
    }

    /// As [`Loader::limits`] where the KV cache takes what memory the device has left.
    fn limits_on_device(&self) -> Result<(DecoderLimits, usize), Error> {
        let options = self.options;
        let max_context = options.max_context.unwrap_or_else(|| position_max(self.config));
        check_context(self.config, max_context)?;
        if let Some(num_pages) = options.num_pages {
            check_num_pages(num_pages, self.shape.page_size)?;
        }
        let batch = self.batch_limits(max_context);
        Ok((DecoderLimits { batch, num_pages: options.num_pages }, max_context))
    }

    fn batch_limits(&self, max_context: usize) -> BatchLimits {
        BatchLimits {
            rows_max: self.options.max_batch_tokens,
            sequences_max: self.options.max_sequences,
            context_max: max_context,
            logit_rows_max: LOGIT_ROWS.max(self.options.max_sequences),
        }
    }

    /// What a decoder is allocated for, and the longest context it serves.
    fn limits(&self, page_bytes: usize) -> Result<(DecoderLimits, usize), Error> {
        let options = self.options;
        let page_size = self.shape.page_size;
        let num_pages_default = (KV_CACHE_BYTES_DEFAULT / page_bytes.max(1)).max(1);
        let max_context = options
            .max_context
            .unwrap_or_else(|| position_max(self.config).min(num_pages_default * page_size));
        check_context(self.config, max_context)?;
        let num_pages = options.num_pages.unwrap_or_else(|| {
            let num_of_one = num_pages(max_context, page_size);
            num_of_one.saturating_mul(options.max_sequences).min(num_pages_default).max(num_of_one)
        });
        check_num_pages(num_pages, page_size)?;
        let limits =
            DecoderLimits { batch: self.batch_limits(max_context), num_pages: Some(num_pages) };
        Ok((limits, max_context))
    }
}

/// Positions that the model's rotary embedding is meant for.
fn position_max(config: &ModelConfig) -> usize {
    match config.rope_scaling {
        RopeScaling::Dynamic { factor, .. } => (config.max_position as f64 * factor) as usize,
        _ => config.max_position,
    }
}

/// Refuses a context beyond the model's positions.
fn check_context(config: &ModelConfig, max_context: usize) -> Result<(), Error> {
    let context_max = context_max(config);
    if max_context > context_max {
        return Err(Error::Request(format!(
            "max_context is {max_context}, the model has positions for {context_max} tokens"
        )));
    }
    Ok(())
}

/// Slots are numbered in 32 bits.
fn check_num_pages(num_pages: usize, page_size: usize) -> Result<(), Error> {
    let num_pages_max = u32::MAX as usize / page_size;
    if num_pages > num_pages_max {
        return Err(Error::Request(format!(
            "the KV cache would have {num_pages} pages, at most {num_pages_max} can be addressed"
        )));
    }
    Ok(())
}

fn check_options(options: &EngineOptions) -> Result<(), Error> {
    let refuse = |name: &str, value: usize, expected: &str| {
        Err(Error::Request(format!("{name} is {value}, it must be {expected}")))
    };
    if options.max_sequences == 0 {
        return refuse("max_sequences", 0, "at least 1");
    }
    if options.max_batch_tokens < options.max_sequences {
        let expected = format!("at least max_sequences, {}", options.max_sequences);
        return refuse("max_batch_tokens", options.max_batch_tokens, &expected);
    }
    if options.max_chunk_tokens == Some(0) {
        return refuse("max_chunk_tokens", 0, "at least 1");
    }
    if let Some(max_context) = options.max_context.filter(|max_context| *max_context < 2) {
        return refuse("max_context", max_context, "at least 2");
    }
    if options.num_pages == Some(0) {
        return refuse("num_pages", 0, "at least 1");
    }
    Ok(())
}
