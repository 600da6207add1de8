//! Loading a model into an engine.

use std::path::Path;
use std::sync::Arc;

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::ModelShape;

use super::loader::{Kept, Loader, position_max};
use super::{Engine, Model};
use crate::backend::Backend;
use crate::backend::cuda::CudaBackend;
use crate::backend::cuda::device::Device;
#[cfg(feature = "cuda")]
use crate::backend::cuda::driver::Driver;
use crate::backend::null::{NullBackend, NullOptions};
use crate::backend::reference::ReferenceBackend;
use crate::batch::Batch;
use crate::config::{BackendChoice, EngineOptions, LoadFormat, Progress};
use crate::error::Error;
use crate::kv_cache::PagePool;
use crate::model::decoder::{Decoder, FromWeights};
use crate::model::rope::Rope;
use crate::model::weights::{ModelWeights, RandomWeights, Weights};
use crate::packed::PackedParts;
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
                shape.check_activations(options.activation)?;
                let backend = backend.with_activations(options.activation);
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
            row_histogram: Arc::default(),
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
