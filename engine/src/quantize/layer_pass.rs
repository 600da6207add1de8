//! Layer after layer of a model: calibration activations run through it, and it becomes 4 bits.
//!
//! One stream of activations is the float model's. Where rounding errors are compensated for there
//! is a second, the quantized model's, so that every layer makes up for what those before it did
//! ("asymmetric calibration", GPTAQ, Li et al. 2025).

use std::path::{Path, PathBuf};
use std::time::Instant;

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{ActivationType, KvDType, ModelShape, WeightFormat, check_group};
use bespoke_kernel_gen::target::Target;

use super::awq_format::PACK;
use super::layer_builder::{LayerBuilder, load_quantized};
use super::layer_runner::{LayerRunner, RunLayer, WeightSet};
use super::quantized_layer::{AwqOptions, QuantizedLayer};
use super::streams::{ROLES, Streams};
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::reference::ReferenceBackend;
use crate::config::{BackendChoice, context_max};
use crate::error::Error;
use crate::kernels::KernelTable;
use crate::kernels::choice::DeviceChoice;
use crate::model::rope::Rope;
use crate::model::safetensors::read_json_file;
use crate::model::weights::{ModelWeights, Weights};

/// How the calibration rows are computed.
#[derive(Clone)]
pub struct PassOptions {
    pub kernels: KernelTable,
    pub backend: BackendChoice,
    /// `None`: as many as the process may use.
    pub num_threads: Option<usize>,
    /// Instruction set of the kernels; `None`: the best that this machine and this build have.
    pub target: Option<Target>,
    /// Folder for activations instead of memory.
    pub spill: Option<PathBuf>,
}

/// A model on its way to 4 bits, and the activations in front of its next layer.
pub struct LayerPass {
    dir: PathBuf,
    config: ModelConfig,
    shape: ModelShape,
    options: AwqOptions,
    num_threads: usize,
    runner: Box<dyn RunLayer>,
    streams: Streams,
    next_layer: usize,
}

impl LayerPass {
    /// `samples`: token ids, each sample of the same length, one sequence each.
    ///
    /// # Errors
    /// The model is quantized, damaged or not supported, its sizes do not suit the group size, the
    /// samples do not suit the model, or kernels, memory or disk are missing.
    pub fn open(
        model_dir: &Path,
        samples: &[Vec<u32>],
        options: &AwqOptions,
        pass: &PassOptions,
    ) -> Result<LayerPass, Error> {
        let config = ModelConfig::parse(&read_json_file(&model_dir.join("config.json"))?)?;
        let name = model_dir.file_name().map_or("model".into(), |name| name.to_string_lossy());
        let shape = ModelShape { page_size: pass.kernels.page_size, ..config.shape(&name)? };
        check_model(model_dir, &config, &shape, options)?;
        let sample_len = check_samples(samples, &config)?;
        let weights = Weights::open(model_dir, &config, &shape)?;
        let mut streams =
            Streams::new(samples.len(), sample_len, shape.hidden_size, options, pass)?;
        streams.embed(&weights, samples)?;
        let num_threads = pass.num_threads.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        });
        let runner = open_runner(&config, &shape, sample_len, pass)?;
        Ok(LayerPass {
            dir: model_dir.to_owned(),
            options: options.clone(),
            num_threads,
            runner,
            streams,
            next_layer: 0,
            config,
            shape,
        })
    }

    pub fn num_layers(&self) -> usize {
        self.config.num_layers
    }

    /// Quantizes the next layer and moves the activations behind it. `progress` hears how many
    /// pieces of work inside the layer are done, and how many there are.
    ///
    /// The result depends on model, samples and [`AwqOptions`] alone.
    ///
    /// # Errors
    /// Weights or activations are not finite, or a file cannot be read or written.
    ///
    /// # Panics
    /// Behind the last layer.
    pub fn quantize(
        &mut self,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<QuantizedLayer, Error> {
        let start = Instant::now();
        let (config, shape) = (self.config.clone(), self.shape.clone());
        let weights = self.open_layer(&config, &shape)?;
        let mut builder = LayerBuilder::new(
            &weights,
            (&config, &shape),
            self.next_layer,
            &self.options,
            self.num_threads,
        );
        let runner = &mut *self.runner;
        match self.options.compensate {
            false => self.streams.calibrate_float(runner, &mut builder, progress)?,
            true => self.streams.calibrate_both(runner, &mut builder, progress)?,
        }
        self.next_layer += 1;
        Ok(builder.finish(start.elapsed().as_secs_f64()))
    }

    /// Takes over what an earlier run made of the next layer, and moves the activations behind it.
    ///
    /// # Errors
    /// `layer` is another one or has other sizes, or a file cannot be read or written.
    ///
    /// # Panics
    /// Behind the last layer.
    pub fn resume(&mut self, layer: &QuantizedLayer) -> Result<(), Error> {
        let (config, shape) = (self.config.clone(), self.shape.clone());
        if layer.layer_idx != self.next_layer {
            return Err(Error::Request(format!(
                "layer {} was given where layer {} is to be resumed",
                layer.layer_idx, self.next_layer
            )));
        }
        let weights = self.open_layer(&config, &shape)?;
        let runner = &mut *self.runner;
        self.streams.move_float(runner)?;
        if self.options.compensate {
            load_quantized(layer, &weights, &config, runner, &ROLES)?;
            self.streams.move_quantized(runner)?;
        }
        self.next_layer += 1;
        Ok(())
    }

    /// Loads the float weights of the next layer.
    fn open_layer<'a>(
        &mut self,
        config: &'a ModelConfig,
        shape: &'a ModelShape,
    ) -> Result<Weights<'a>, Error> {
        let layer_idx = self.next_layer;
        assert!(layer_idx < config.num_layers, "layer {layer_idx} of {}", config.num_layers);
        let weights = Weights::open(&self.dir, config, shape)?;
        self.runner.load_norms(weights.norms(layer_idx)?)?;
        for role in ROLES {
            let linear = weights.linear(role, layer_idx)?;
            self.runner.load_linear(WeightSet::Float, role, &linear.source())?;
        }
        Ok(weights)
    }
}

/// Refuses models that cannot be quantized, or not in such groups.
fn check_model(
    dir: &Path,
    config: &ModelConfig,
    shape: &ModelShape,
    options: &AwqOptions,
) -> Result<(), Error> {
    if config.quantization.is_some() {
        return Err(Error::Request(format!(
            "{}: already quantized; give the original model",
            dir.display()
        )));
    }
    for role in ROLES {
        let linear = shape.linear(role);
        assert!(matches!(linear.format, WeightFormat::Dense(_)), "the model is not quantized");
        check_group(linear.k, options.group_size)?;
        if !linear.n.is_multiple_of(PACK) || !linear.k.is_multiple_of(PACK) {
            return Err(Error::Unsupported(format!(
                "a linear of {} inputs and {} outputs cannot be quantized: both must be multiples \
                 of {PACK}",
                linear.k, linear.n
            )));
        }
    }
    Ok(())
}

/// The length of all samples.
fn check_samples(samples: &[Vec<u32>], config: &ModelConfig) -> Result<usize, Error> {
    let refuse = |message: String| Err(Error::Request(message));
    let len = samples.first().map_or(0, Vec::len);
    if len == 0 {
        return refuse("calibration takes at least one sample of at least one token".into());
    }
    let len_max = context_max(config);
    if len > len_max {
        return refuse(format!(
            "the calibration samples have {len} tokens, the model has positions for {len_max}; \
             choose shorter samples"
        ));
    }
    for (idx, sample) in samples.iter().enumerate() {
        if sample.len() != len {
            let found = sample.len();
            return refuse(format!(
                "calibration sample {idx} has {found} tokens, sample 0 has {len}; all must be of \
                 one length"
            ));
        }
        let outside = sample.iter().find(|token| **token as usize >= config.vocab_size);
        if let Some(token) = outside {
            return refuse(format!(
                "calibration sample {idx} has token {token}, the model has {}; use the model's own \
                 tokenizer",
                config.vocab_size
            ));
        }
    }
    Ok(len)
}

/// A backend with room for one layer.
fn open_runner(
    config: &ModelConfig,
    shape: &ModelShape,
    sample_len: usize,
    pass: &PassOptions,
) -> Result<Box<dyn RunLayer>, Error> {
    let shape = &ModelShape { num_layers: 1, ..shape.clone() };
    let mut rope = Rope::new(config);
    match pass.backend {
        BackendChoice::Null => {
            return Err(Error::Request(
                "the null backend has no activations to calibrate with; choose another".into(),
            ));
        }
        BackendChoice::Reference => {
            let backend = match pass.num_threads {
                None => ReferenceBackend::new(config, shape),
                Some(num) => ReferenceBackend::with_threads(config, shape, num),
            };
            return Ok(Box::new(LayerRunner::new(backend, shape, &mut rope, sample_len)?));
        }
        BackendChoice::Cuda | BackendChoice::Auto => {
            if let Some(runner) = gpu_runner((config, shape), &mut rope, sample_len, pass)? {
                return Ok(runner);
            }
        }
        BackendChoice::Cpu => {}
    }
    let options = CpuOptions {
        kv_dtype: KvDType::F32,
        activation: ActivationType::Float,
        num_threads: pass.num_threads,
        target: pass.target,
        device: DeviceChoice::This,
    };
    let backend = CpuBackend::new(&pass.kernels, config, shape, &options)?;
    Ok(Box::new(LayerRunner::new(backend, shape, &mut rope, sample_len)?))
}

/// A GPU where one is asked for, or found and good for the model.
#[cfg(feature = "cuda")]
fn gpu_runner(
    (config, shape): (&ModelConfig, &ModelShape),
    rope: &mut Rope,
    sample_len: usize,
    pass: &PassOptions,
) -> Result<Option<Box<dyn RunLayer>>, Error> {
    use crate::backend::cuda::driver::Driver;
    use crate::backend::cuda::{CudaBackend, CudaOptions, KvMemory};

    let is_wanted = pass.backend == BackendChoice::Cuda;
    let device = match Driver::open(&crate::kernels::generated::cuda_table()) {
        Ok(device) => device,
        // A GPU that cannot be used is no reason not to use the CPU.
        Err(_) if !is_wanted => return Ok(None),
        Err(error) => return Err(error),
    };
    let kv_memory = KvMemory::Share(0.5);
    let options = CudaOptions { kv_dtype: KvDType::F16, kv_memory, graphs: false };
    match CudaBackend::new(device, config, shape, &options) {
        Err(Error::MissingKernels { .. }) if !is_wanted => Ok(None),
        Err(error) => Err(error),
        Ok(backend) => Ok(Some(Box::new(LayerRunner::new(backend, shape, rope, sample_len)?))),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu_runner(
    _: (&ModelConfig, &ModelShape),
    _: &mut Rope,
    _: usize,
    pass: &PassOptions,
) -> Result<Option<Box<dyn RunLayer>>, Error> {
    match pass.backend {
        BackendChoice::Cuda => Err(Error::Unsupported(
            "this binary was built without CUDA; build it with `cargo build --release --features \
             cuda`, or calibrate with `--backend cpu`"
                .into(),
        )),
        _ => Ok(None),
    }
}
