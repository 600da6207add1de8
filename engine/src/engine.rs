//! The engine: a model, its KV cache and the requests it serves, owned by one thread.

use std::ops::{ControlFlow, Range};
use std::path::Path;

use bespoke_kernel_gen::model::{ModelConfig, RopeScaling};
use bespoke_kernel_gen::spec::ModelShape;

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::reference::ReferenceBackend;
use crate::batch::Batch;
use crate::config::{BackendChoice, EngineOptions, KV_CACHE_BYTES_DEFAULT, Progress, context_max};
use crate::error::Error;
use crate::kernels::abi::LogitStats;
use crate::kv_cache::{Page, PagePool, num_pages};
use crate::model::decoder::{Decoder, DecoderLimits};
use crate::model::rope::Rope;
use crate::model::safetensors::read_json_file;
use crate::model::weights::Weights;
use crate::request::{FinishReason, Generation, Request, RequestId, RequestOutput, check_prompt};
use crate::sampling::{Sample, Sampler};
use crate::scheduler::{Scheduler, SchedulerLimits, append_span};
use crate::sequence::Sequence;

/// Rows whose logits are computed at once when every position's are wanted.
const LOGIT_ROWS: usize = 64;

/// Serves requests with one model.
pub struct Engine {
    config: ModelConfig,
    shape: ModelShape,
    max_context: usize,
    model: Model,
    rope: Rope,
    pool: PagePool,
    scheduler: Scheduler,
    sampler: Sampler,
    next_id: u64,
    /// The step at hand; its vectors are reused.
    batch: Batch,
    start_lens: Vec<usize>,
    stats: Vec<LogitStats>,
    samples: Vec<Option<Sample>>,
}

/// Memory that an engine holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub weights_bytes: usize,
    pub kv_cache_bytes: usize,
}

/// A decoder on one of the backends.
#[allow(clippy::large_enum_variant, reason = "there is one, and it never moves")]
enum Model {
    Reference(Decoder<ReferenceBackend>),
    Cpu(Decoder<CpuBackend>),
}

/// Runs an expression on the decoder, whatever its backend.
macro_rules! on_decoder {
    ($model:expr, $decoder:ident => $value:expr) => {
        match $model {
            Model::Reference($decoder) => $value,
            Model::Cpu($decoder) => $value,
        }
    };
}

impl Engine {
    /// Loads the model folder `dir`.
    pub fn load(
        dir: &Path,
        options: &EngineOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Engine, Error> {
        let config = ModelConfig::parse(&read_json_file(&dir.join("config.json"))?)?;
        let name = dir.file_name().map_or("model".into(), |name| name.to_string_lossy());
        let shape = ModelShape { page_size: options.kernels.page_size, ..config.shape(&name)? };
        check_options(options)?;
        let weights = Weights::open(dir, &config, &shape)?;
        let loader = Loader { config: &config, shape: &shape, weights: &weights, options };
        let (model, max_context) = match options.backend {
            BackendChoice::Reference => {
                let backend = match options.num_threads {
                    None => ReferenceBackend::new(&config, &shape),
                    Some(num) => ReferenceBackend::with_threads(&config, &shape, num),
                };
                let (decoder, max_context) = loader.load(backend, progress)?;
                (Model::Reference(decoder), max_context)
            }
            BackendChoice::Auto | BackendChoice::Cpu => {
                let cpu_options = CpuOptions {
                    kv_dtype: options.kv_dtype,
                    activation: options.activation,
                    num_threads: options.num_threads,
                    target: options.target,
                };
                let backend = CpuBackend::new(&options.kernels, &config, &shape, &cpu_options)?;
                let (decoder, max_context) = loader.load(backend, progress)?;
                (Model::Cpu(decoder), max_context)
            }
        };
        let limits = on_decoder!(&model, decoder => decoder.limits());
        let scheduler = Scheduler::new(SchedulerLimits {
            batch_tokens_max: options.max_batch_tokens,
            sequences_max: options.max_sequences,
            page_size: shape.page_size,
        });
        Ok(Engine {
            rope: Rope::new(&config),
            sampler: Sampler::new(shape.vocab_size),
            config,
            shape,
            max_context,
            model,
            pool: PagePool::new(limits.num_pages),
            scheduler,
            next_id: 0,
            batch: Batch::default(),
            start_lens: Vec::new(),
            stats: Vec::with_capacity(limits.logit_rows_max),
            samples: Vec::with_capacity(limits.logit_rows_max),
        })
    }

    /// Queues a request.
    pub fn add_request(&mut self, request: Request) -> Result<RequestId, Error> {
        request.check(self.shape.vocab_size, self.max_context)?;
        let id = RequestId(self.next_id);
        let sequence = Sequence::new(id, request, &self.config.eos_token_ids, self.max_context);
        self.scheduler.add(sequence, &self.pool)?;
        self.next_id += 1;
        Ok(id)
    }

    /// Ends a request early; false where it has ended already.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        self.scheduler.cancel(id, &mut self.pool)
    }

    /// One model forward; appends the tokens it gave to `outputs`.
    pub fn step(&mut self, outputs: &mut Vec<RequestOutput>) -> Result<(), Error> {
        self.scheduler.schedule(&mut self.pool, &mut self.batch);
        if self.batch.is_empty() {
            return Ok(());
        }
        self.start_lens.clear();
        self.start_lens.extend(self.scheduler.scheduled().map(|sequence| sequence.num_prompt));
        self.rope.fill(&mut self.batch, &self.start_lens);
        self.run_model();
        self.sample();
        self.scheduler.commit(&self.samples, &mut self.pool, outputs);
        Ok(())
    }

    /// Whether no request waits or runs.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Runs one request to its end. `on_output` sees its every token and may break off. Requests
    /// that were added before run along, and what they give is dropped.
    pub fn generate(
        &mut self,
        request: Request,
        on_output: &mut dyn FnMut(&RequestOutput) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let id = self.add_request(request)?;
        let mut outputs = Vec::new();
        let mut generation = Generation {
            output_ids: Vec::new(),
            logprobs: Vec::new(),
            finish_reason: FinishReason::Stop,
        };
        loop {
            outputs.clear();
            self.step(&mut outputs)?;
            for output in outputs.iter().filter(|output| output.id == id) {
                if let Some(token) = output.token {
                    generation.output_ids.push(token);
                    generation.logprobs.push(output.logprob);
                }
                let flow = on_output(output);
                if let Some(reason) = output.finish_reason {
                    generation.finish_reason = reason;
                    return Ok(generation);
                }
                if flow.is_break() {
                    self.cancel(id);
                    return Ok(generation);
                }
            }
        }
    }

    /// Gives the logits of every position of `ids` to `sink`, in order.
    pub fn logits(
        &mut self,
        ids: &[u32],
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        self.logits_of(ids, 0..ids.len(), sink)
    }

    /// As [`Engine::logits`] for the positions `wanted` alone.
    pub fn logits_of(
        &mut self,
        ids: &[u32],
        wanted: Range<usize>,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        check_prompt(ids, self.shape.vocab_size)?;
        if ids.len() > self.max_context {
            return Err(Error::Request(format!(
                "{} tokens do not fit the context of {}",
                ids.len(),
                self.max_context
            )));
        }
        let num_needed = num_pages(ids.len(), self.shape.page_size);
        let mut pages = Vec::new();
        if !self.pool.allocate_many(num_needed, &mut pages) {
            return Err(Error::Resources(format!(
                "{} tokens take {num_needed} pages of the KV cache, {} of {} are free",
                ids.len(),
                self.pool.num_free(),
                self.pool.num_pages()
            )));
        }
        let rows_max = on_decoder!(&self.model, decoder => decoder.limits().rows_max);
        for first in (0..ids.len()).step_by(rows_max) {
            let positions = first..ids.len().min(first + rows_max);
            self.logits_of_chunk(ids, positions, &wanted, &pages, sink);
        }
        pages.into_iter().for_each(|page| self.pool.free(page));
        Ok(())
    }

    fn logits_of_chunk(
        &mut self,
        ids: &[u32],
        positions: Range<usize>,
        wanted: &Range<usize>,
        pages: &[Page],
        sink: &mut dyn FnMut(usize, &[f32]),
    ) {
        let batch = &mut self.batch;
        batch.clear();
        append_span(batch, ids, positions.clone(), pages, self.shape.page_size);
        self.rope.fill(batch, &[ids.len()]);
        let rows = positions.filter(|position| wanted.contains(position));
        let first_row = batch.positions[0] as usize;
        batch.logit_rows.extend(rows.map(|position| (position - first_row) as u32));
        on_decoder!(&mut self.model, decoder => {
            decoder.run_layers(&self.batch);
            let rows_max = decoder.limits().logit_rows_max;
            for select in self.batch.logit_rows.chunks(rows_max) {
                decoder.head(select);
                let logits = decoder.logits(select.len());
                for (row, logits) in select.iter().zip(logits.chunks_exact(self.shape.vocab_size)) {
                    sink(first_row + *row as usize, logits);
                }
            }
        });
    }

    /// Memory held by weights and KV cache.
    pub fn memory(&self) -> Memory {
        on_decoder!(&self.model, decoder => Memory {
            weights_bytes: decoder.weights_bytes(),
            kv_cache_bytes: decoder.kv_cache_bytes(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Tokens of one sequence, prompt and output together.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// The backend that the model runs on.
    pub fn backend_name(&self) -> &'static str {
        match &self.model {
            Model::Reference(_) => "reference",
            Model::Cpu(_) => "cpu",
        }
    }

    /// Layers, head and statistics of the step at hand.
    fn run_model(&mut self) {
        self.stats.clear();
        self.stats.resize(self.batch.logit_rows.len(), LogitStats::default());
        on_decoder!(&mut self.model, decoder => {
            decoder.run_layers(&self.batch);
            decoder.head(&self.batch.logit_rows);
            decoder.logit_stats(&mut self.stats);
        });
    }

    /// Chooses the next token of every logit row.
    fn sample(&mut self) {
        let num_rows = self.stats.len();
        let logits = on_decoder!(&mut self.model, decoder => decoder.logits(num_rows));
        let rows = logits.chunks_exact(self.shape.vocab_size).zip(&self.stats);
        self.samples.clear();
        for (sequence, (logits, stats)) in self.scheduler.sampled().zip(rows) {
            let params = &sequence.sampling;
            self.samples.push(self.sampler.sample(params, &sequence.tokens, logits, stats));
        }
    }
}

/// What a decoder is loaded from.
struct Loader<'a> {
    config: &'a ModelConfig,
    shape: &'a ModelShape,
    weights: &'a Weights<'a>,
    options: &'a EngineOptions,
}

impl Loader<'_> {
    /// The decoder and the longest context it serves.
    fn load<B: Backend>(
        &self,
        backend: B,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Decoder<B>, usize), Error> {
        let options = self.options;
        let page_size = self.shape.page_size;
        let max_context = match options.max_context {
            Some(max_context) => max_context,
            None => {
                let num_pages = (KV_CACHE_BYTES_DEFAULT / backend.page_bytes().max(1)).max(1);
                position_max(self.config).min(num_pages * page_size)
            }
        };
        check_context(self.config, max_context)?;
        let num_pages = options.num_pages.unwrap_or(num_pages(max_context, page_size));
        check_num_pages(num_pages, page_size)?;
        let limits = DecoderLimits {
            rows_max: options.max_batch_tokens,
            logit_rows_max: LOGIT_ROWS.max(options.max_sequences),
            num_pages,
        };
        let (config, shape) = (self.config, self.shape);
        let decoder = Decoder::load(backend, self.weights, config, shape, limits, progress)?;
        Ok((decoder, max_context))
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
    if let Some(max_context) = options.max_context.filter(|max_context| *max_context < 2) {
        return refuse("max_context", max_context, "at least 2");
    }
    if options.num_pages == Some(0) {
        return refuse("num_pages", 0, "at least 1");
    }
    Ok(())
}
