//! From a model's weights to a decoder: how large, on which backend, packed or not.

use std::cell::RefCell;
use std::path::PathBuf;

use bespoke_kernel_gen::model::{ModelConfig, RopeScaling};
use bespoke_kernel_gen::spec::{ActivationType, ModelShape};

use super::LOGIT_ROWS;
use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::{CudaBackend, CudaOptions};
use crate::batch::BatchLimits;
use crate::config::{EngineOptions, KV_CACHE_BYTES_DEFAULT, Progress, context_max};
use crate::error::Error;
use crate::kv_cache::num_pages;
use crate::model::decoder::{Decoder, DecoderLimits, FromWeights, Parts};
use crate::model::weights::ModelWeights;
use crate::packed::{PackedCache, PackedFile, PackedParts};
use crate::startup::Startup;

/// What a decoder is loaded from.
pub(super) struct Loader<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) shape: &'a ModelShape,
    options: &'a EngineOptions,
    /// The weights, where they are packed already.
    pub(super) packed: Option<&'a PackedFile>,
    /// Where they may be, where they are not.
    pub(super) kept: Option<Kept<'a>>,
    pub(super) startup: RefCell<Startup>,
}

/// A checkpoint's packed weights in a cache.
pub(super) struct Kept<'a> {
    pub(super) cache: &'a PackedCache,
    pub(super) fingerprint: String,
    pub(super) files: Vec<PathBuf>,
}

pub(super) type LoadedCpu = (Decoder<CpuBackend>, usize);

impl<'a> Loader<'a> {
    pub(super) fn new(
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
    pub(super) fn load_cpu(
        &self,
        weights: &dyn ModelWeights,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<LoadedCpu, Error> {
        let backend = self.cpu()?;
        let mut startup = self.startup.borrow_mut();
        let num_threads = backend.num_threads();
        if let Some(file) = self.packed {
            startup.time("read packed weights", || file.check(num_threads))?;
            return startup.time("set up layers", || self.load_packed(backend, file, progress));
        }
        let Some(Kept { cache, fingerprint, files }) = &self.kept else {
            let parts = &mut FromWeights(weights);
            return startup.time("pack weights", || self.load(backend, parts, progress));
        };
        let key = PackedCache::key(files, fingerprint, &backend.layout_name())?;
        match startup.time("read packed weights", || cache.open(&key, num_threads)) {
            Ok(Some(file)) => {
                let load = || self.load_packed(backend, &file, progress);
                match startup.time("set up layers", load) {
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

    pub(super) fn cpu(&self) -> Result<CpuBackend, Error> {
        let options = self.options;
        let cpu_options = CpuOptions {
            kv_dtype: options.kv_dtype,
            activation: options.activation,
            num_threads: options.num_threads,
            target: options.target,
            device: options.device,
        };
        CpuBackend::new(&options.kernels, self.config, self.shape, &cpu_options)
    }

    pub(super) fn cuda<D: Device>(&self, device: D) -> Result<CudaBackend<D>, Error> {
        let EngineOptions { kv_dtype, kv_memory, cuda_graphs, activation, .. } = *self.options;
        if activation == ActivationType::Bf16 {
            return Err(Error::Unsupported(
                "bf16 activations are a choice on the CPU; on a GPU rows have 16 bits anyway, so \
                 leave the choice away, or run with `--backend cpu`"
                    .into(),
            ));
        }
        let cuda_options = CudaOptions { kv_dtype, kv_memory, graphs: cuda_graphs };
        CudaBackend::new(device, self.config, self.shape, &cuda_options)
    }

    /// The decoder and the longest context it serves.
    pub(super) fn load<B: Backend>(
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
    pub(super) fn limits(&self, page_bytes: usize) -> Result<(DecoderLimits, usize), Error> {
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
pub(super) fn position_max(config: &ModelConfig) -> usize {
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
