//! The arguments that every command with a model shares, and loading what they name.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bespoke_kernel_gen::model::ModelConfig;
#[cfg(feature = "make")]
use bespoke_kernel_gen::presets;
#[cfg(feature = "make")]
use bespoke_kernel_gen::spec::ModelShape;
use bespoke_kernel_gen::spec::{ActivationType, KvDType};
use clap::ValueEnum;

use super::console::Console;
use super::progress::Meter;
use crate::backend::cuda::KvMemory;
use crate::config::{BackendChoice, EngineOptions, LoadFormat, context_max};
use crate::engine::Engine;
use crate::kernels::generated;
use crate::source::{ModelFolder, ModelSource, WeightsSource};
use crate::startup::Startup;
use crate::tokenizer::Tokenizer;

/// Which model, and how it runs.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// Model folder, name of a cached model, or preset
    #[arg(long, short, value_name = "MODEL")]
    pub(super) model: String,
    #[command(flatten)]
    pub(super) run: RunArgs,
}

/// How a model runs.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct RunArgs {
    /// Where to compute; `reference` runs any shape, slowly
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub(super) backend: Backend,
    /// Element type of the KV cache (the reference backend keeps float32)
    #[arg(long, value_enum, default_value_t = Kv::F16)]
    pub(super) kv_dtype: Kv,
    /// What weights are multiplied with; int8 is for 4-bit weights, and others ignore it
    #[arg(long, value_enum, default_value_t = Activations::Int8)]
    pub(super) activations: Activations,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    pub(super) threads: Option<usize>,
    /// Memory of the KV cache on a GPU: a share of what weights leave, or bytes (512M, 12G)
    #[arg(long, value_name = "MEMORY", value_parser = parse_kv_memory, default_value = "0.8")]
    pub(super) kv_memory: KvMemory,
    /// Pack the weights anew instead of keeping them as kernels read them for the next start
    #[arg(long)]
    pub(super) no_packed_cache: bool,
    /// Tell on standard error, or in the JSON, where the time before the first token went
    #[arg(long)]
    pub(super) startup_report: bool,
    /// Where the weights come from; `dummy` makes random ones, to measure speed without any
    #[arg(long, value_enum, default_value_t = Format::Checkpoint)]
    pub(super) load_format: Format,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum Format {
    /// The model folder's safetensors
    Checkpoint,
    /// Random weights in the shapes of config.json
    Dummy,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum Backend {
    /// The fastest one that has kernels for the model
    Auto,
    /// Plain loops in float32, any shape
    Reference,
    /// Kernels generated for the model's shapes, on the CPU
    Cpu,
    /// Kernels generated for the model's shapes, on an NVIDIA GPU
    Cuda,
    /// Hashes instead of a model's mathematics, to measure and test everything around it
    Null,
}

impl Backend {
    pub(super) fn choice(self) -> BackendChoice {
        match self {
            Backend::Auto => BackendChoice::Auto,
            Backend::Reference => BackendChoice::Reference,
            Backend::Cpu => BackendChoice::Cpu,
            Backend::Cuda => BackendChoice::Cuda,
            Backend::Null => BackendChoice::Null,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum Kv {
    F16,
    F32,
    Int8,
    Int4,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum Activations {
    /// float32 as they are
    Float,
    /// Rounded to 8 bits, a scale per row and group
    Int8,
    /// Rounded to bfloat16, for models whose weights are all bfloat16, on the CPU
    Bf16,
}

impl Kv {
    pub(super) fn choice(self) -> KvDType {
        match self {
            Kv::F16 => KvDType::F16,
            Kv::F32 => KvDType::F32,
            Kv::Int8 => KvDType::I8,
            Kv::Int4 => KvDType::I4,
        }
    }
}

impl Activations {
    pub(super) fn choice(self) -> ActivationType {
        match self {
            Activations::Float => ActivationType::Float,
            Activations::Int8 => ActivationType::Int8,
            Activations::Bf16 => ActivationType::Bf16,
        }
    }
}

/// `0.8`, or bytes as `12G`.
fn parse_kv_memory(text: &str) -> Result<KvMemory, String> {
    let expected = || "expected a share such as 0.8, or bytes such as 512M or 12G".to_owned();
    if let Some(number) = text.strip_suffix(['K', 'M', 'G']) {
        let shift = match text.as_bytes()[number.len()] {
            b'K' => 10,
            b'M' => 20,
            _ => 30,
        };
        let number: usize = number.parse().map_err(|_| expected())?;
        return number.checked_mul(1 << shift).map(KvMemory::Bytes).ok_or_else(expected);
    }
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(KvMemory::Share(share)),
        _ => Err(expected()),
    }
}

pub(super) fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads) if (1..=1024).contains(&threads) => Ok(threads),
        _ => Err("expected a number from 1 to 1024".to_owned()),
    }
}

/// Where a model is, and what is read before its weights.
pub(super) struct ModelFiles {
    pub(super) source: ModelSource,
    pub(super) config: ModelConfig,
    /// `None` where the model has no tokenizer.
    tokenizer: Option<Arc<Tokenizer>>,
    /// What reading them took.
    pub(super) startup: Startup,
}

impl ModelFiles {
    /// Finds the model `name` and reads its configuration and tokenizer.
    pub(super) fn open(name: &str, console: &Console<'_>) -> anyhow::Result<ModelFiles> {
        ModelFiles::read(console.source(name)?)
    }

    /// Reads configuration and tokenizer of a model.
    pub(super) fn read(source: ModelSource) -> anyhow::Result<ModelFiles> {
        if let WeightsSource::Packed(file) = &source.weights {
            // Weights are read while the tokenizer is. Whoever needs them waits for that.
            let file = file.clone();
            thread::spawn(move || file.check(1));
        }
        let mut startup = Startup::default();
        let config = ModelFiles::read_config(&source.files)?;
        let tokenizer = startup.time("read tokenizer", || Tokenizer::of_optional(&source.files))?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocab_size(config.vocab_size)?;
        }
        Ok(ModelFiles { source, config, tokenizer: tokenizer.map(Arc::new), startup })
    }

    pub(super) fn read_config(folder: &ModelFolder) -> anyhow::Result<ModelConfig> {
        let text = folder.config_text()?;
        ModelConfig::parse(&text).with_context(|| folder.root().display().to_string())
    }

    /// The tokenizer, or an error that says what works without one.
    pub(super) fn tokenizer(&self) -> anyhow::Result<&Arc<Tokenizer>> {
        self.tokenizer.as_ref().with_context(|| {
            format!(
                "{}: the model has no tokenizer.json, so it cannot read text; give token ids \
                 with --prompt-ids, or add the file",
                self.source.files.root().display()
            )
        })
    }

    pub(super) fn tokenizer_if_any(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// Tokens that end a generation, those of `config.json` aside.
    pub(super) fn eos_ids(&self) -> Vec<u32> {
        self.tokenizer.iter().flat_map(|tokenizer| tokenizer.eos_ids().to_vec()).collect()
    }

    /// Loads the weights for one sequence at once, of at most `context_len` tokens.
    pub(super) fn load(
        &self,
        run: &RunArgs,
        context_len: usize,
        console: &mut Console<'_>,
    ) -> anyhow::Result<(Engine, Duration)> {
        self.load_with(&self.options(run, context_len, console), console)
    }

    /// What [`ModelFiles::load`] loads with.
    pub(super) fn options(
        &self,
        run: &RunArgs,
        context_len: usize,
        console: &Console<'_>,
    ) -> EngineOptions {
        options(&self.config, run, context_len, console)
    }

    /// Loads the weights, with a progress bar, and says how long that took.
    pub(super) fn load_with(
        &self,
        options: &EngineOptions,
        console: &mut Console<'_>,
    ) -> anyhow::Result<(Engine, Duration)> {
        let start = Instant::now();
        let mut meter = Meter::new(console);
        let mut engine =
            Engine::load_from(&self.source, options, &mut |progress| meter.show_load(progress))?;
        drop(meter);
        warn(engine.startup(), console);
        if let Some(tokenizer) = &self.tokenizer {
            engine.set_tokenizer(tokenizer.clone());
        }
        Ok((engine, start.elapsed()))
    }
}

/// Tells what went wrong without stopping anything.
pub(super) fn warn(startup: &Startup, console: &mut Console<'_>) {
    for warning in &startup.warnings {
        console.report(&format!("warning: {warning}\n"));
    }
}

/// What a model is loaded with for one sequence at once, of at most `context_len` tokens.
pub(super) fn options(
    config: &ModelConfig,
    run: &RunArgs,
    context_len: usize,
    console: &Console<'_>,
) -> EngineOptions {
    EngineOptions {
        backend: run.backend.choice(),
        load_format: match run.load_format {
            Format::Checkpoint => LoadFormat::Checkpoint,
            Format::Dummy => LoadFormat::Dummy,
        },
        kv_dtype: run.kv_dtype.choice(),
        activation: run.activations.choice(),
        num_threads: run.threads,
        packed_cache: !run.no_packed_cache,
        cuda_kernels: generated::cuda_table(),
        kv_memory: run.kv_memory,
        max_sequences: 1,
        max_context: Some(context_len.min(context_max(config)).max(2)),
        ..EngineOptions::new(console.kernels)
    }
}

/// The shape of a model that the binary was built for, that is found, or that kernels can be made
/// for by name.
#[cfg(feature = "make")]
pub(super) fn shape_of(model: &str, console: &Console<'_>) -> anyhow::Result<ModelShape> {
    let built = generated::models().into_iter().find(|shape| shape.name == model);
    if let Some(shape) = built {
        return Ok(shape);
    }
    let shape = match console.resolve(model) {
        Ok(dir) => ModelFiles::read_config(&ModelFolder::Disk(dir))?.shape(model)?,
        Err(error) => presets::shape(model, &[]).map_err(|_| error)?,
    };
    Ok(ModelShape { page_size: console.kernels.page_size, ..shape })
}
