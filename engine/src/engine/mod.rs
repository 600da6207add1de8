//! The engine: a model, its KV cache and the requests it serves, owned by one thread.

/// Runs an expression on the decoder, whatever its backend.
macro_rules! on_decoder {
    ($model:expr, $decoder:ident => $value:expr) => {
        match $model {
            Model::Reference($decoder) => $value,
            Model::Cpu($decoder) => $value,
            Model::Null($decoder) => $value,
            Model::Cuda($decoder) => $value,
        }
    };
}

mod load;
mod loader;
mod sessions;
#[cfg(test)]
mod simulation;

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::ModelShape;

use crate::backend::KernelUsage;
use crate::backend::cpu::CpuBackend;
use crate::backend::null::NullBackend;
use crate::backend::reference::ReferenceBackend;
use crate::batch::{Batch, BatchLimits};
use crate::error::Error;
use crate::grammar::GrammarState;
use crate::kernels::abi::LogitStats;
use crate::kv_cache::{Keep, Namespace, Page, PageCounts, PagePool, num_pages};
use crate::model::decoder::{AnyDecoder, Decoder};
use crate::model::rope::Rope;
use crate::request::{Generation, Request, RequestId, RequestOutput, check_prompt};
use crate::row_histogram::RowHistogram;
use crate::sampling::{Sample, Sampler, choice_seed, needs_logits, sample_greedily};
use crate::scheduler::{Scheduler, append_span};
use crate::sequence::{Sequence, StopCheck};
use crate::session::Sessions;
use crate::session_file::Identity;
use crate::startup::Startup;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::stream::{StopStrings, TextStream};

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
    sessions: Sessions,
    sampler: Sampler,
    tokenizer: Option<Arc<Tokenizer>>,
    uses_prefixes: bool,
    identity: Identity,
    startup: Startup,
    weights_name: String,
    next_id: u64,
    /// The step at hand; its vectors are reused.
    batch: Batch,
    start_lens: Vec<usize>,
    stats: Vec<LogitStats>,
    samples: Vec<Option<Sample>>,
    ended: Vec<Sequence>,
    row_histogram: Arc<RowHistogram>,
}

/// What an engine is busy with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStatus {
    /// Answers that wait for room.
    pub num_waiting: usize,
    /// Answers that a step computes.
    pub num_running: usize,
    /// How often an answer gave its pages back to one before it.
    pub num_preemptions: u64,
    pub num_sessions: usize,
    pub pages: PageCounts,
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
    Null(Decoder<NullBackend>),
    Cuda(Box<dyn AnyDecoder>),
}

impl Model {
    fn limits(&self) -> &BatchLimits {
        on_decoder!(self, decoder => decoder.limits())
    }

    fn num_pages(&self) -> usize {
        on_decoder!(self, decoder => decoder.num_pages())
    }
}

impl Engine {
    /// Queues a request.
    pub fn add_request(&mut self, request: Request) -> Result<RequestId, Error> {
        let history_len = match &request.session {
            Some(turn) => self.sessions.history_len(turn)?,
            None => 0,
        };
        request.check(self.shape.vocab_size, self.max_context, history_len)?;
        let id = RequestId(self.next_id);
        let num_prompt = history_len + request.prompt_ids.len();
        let len_max = num_prompt.saturating_add(request.max_tokens).min(self.max_context);
        self.scheduler.check_fits(len_max, &self.pool)?;
        let stop_checks: Vec<_> = (0..request.num_choices)
            .map(|_| self.stop_check(&request.stop_strings))
            .collect::<Result<_, Error>>()?;
        for (choice_idx, stop_check) in stop_checks.into_iter().enumerate() {
            let tokens = Vec::with_capacity(len_max);
            let mut sequence = Sequence { choice_idx, ..Sequence::new(id, tokens, len_max) };
            sequence.stop_check = stop_check;
            self.continue_session(&request, &mut sequence);
            self.prepare(&request, &mut sequence);
            self.scheduler.add(sequence);
        }
        self.next_id += 1;
        Ok(id)
    }

    /// Ends a request early; false where it has ended already. Its session stays, with what was
    /// generated.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let is_found = self.scheduler.cancel(id, &mut self.pool, &mut self.ended);
        self.settle_sessions();
        is_found
    }

    /// One model forward; appends the tokens it gave to `outputs`.
    pub fn step(&mut self, outputs: &mut Vec<RequestOutput>) -> Result<(), Error> {
        if let Model::Null(decoder) = &mut self.model {
            decoder.backend_mut().begin_step()?;
        }
        self.scheduler.schedule(&mut self.pool, &mut self.batch);
        if self.batch.is_empty() {
            return Ok(());
        }
        self.start_lens.clear();
        self.start_lens.extend(self.scheduler.scheduled().map(|sequence| sequence.num_prompt));
        self.rope.fill(&mut self.batch, &self.start_lens);
        self.row_histogram.add(self.batch.num_rows());
        self.run_model();
        self.sample();
        self.scheduler.commit(&self.samples, &mut self.pool, outputs, &mut self.ended);
        self.settle_sessions();
        Ok(())
    }

    /// Whether no request waits or runs.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Runs a request with one answer to its end. `on_output` sees its every token and may break
    /// off. Requests that were added before run along, and what they give is dropped.
    pub fn generate(
        &mut self,
        request: Request,
        on_output: &mut dyn FnMut(&RequestOutput) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let mut generations = self.generate_choices(request, on_output)?;
        assert_eq!(generations.len(), 1, "the request asks for one answer");
        Ok(generations.remove(0))
    }

    /// As [`Engine::generate`] for all answers to a request, in their order.
    pub fn generate_choices(
        &mut self,
        request: Request,
        on_output: &mut dyn FnMut(&RequestOutput) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, Error> {
        let mut generations = vec![Generation::default(); request.num_choices];
        let mut num_running = request.num_choices;
        let id = self.add_request(request)?;
        let mut outputs = Vec::new();
        while num_running > 0 {
            outputs.clear();
            self.step(&mut outputs)?;
            for output in outputs.iter().filter(|output| output.id == id) {
                generations[output.choice_idx].push(output);
                num_running -= usize::from(output.finish_reason.is_some());
                if on_output(output).is_break() {
                    self.cancel(id);
                    return Ok(generations);
                }
            }
        }
        Ok(generations)
    }

    /// Gives the logits of every position of `ids` to `sink`, in order.
    pub fn logits(
        &mut self,
        ids: &[u32],
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        self.logits_of(ids, 0..ids.len(), sink)
    }

    /// As [`Engine::logits`] for the positions `wanted` alone. With a prefix cache, full pages
    /// before them that an earlier call or a request computed are not computed again.
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
        let mut sequence = self.find_prefix(ids, wanted.start);
        let first = sequence.num_computed;
        let mut copies = Vec::new();
        if !sequence.reserve_pages(0, &mut self.pool, &mut copies) {
            return Err(Error::Resources(format!(
                "{} tokens take {} pages of the KV cache, {} of {} are free",
                ids.len(),
                num_pages(ids.len(), self.shape.page_size),
                self.pool.num_available(),
                self.pool.num_pages()
            )));
        }
        let rows_max = on_decoder!(&self.model, decoder => decoder.limits().rows_max);
        for start in (first..ids.len()).step_by(rows_max) {
            let positions = start..ids.len().min(start + rows_max);
            self.batch.clear();
            self.batch.copies.append(&mut copies);
            self.logits_of_chunk(ids, positions, &wanted, &sequence.pages, sink);
        }
        sequence.num_computed = ids.len();
        sequence.register_pages(first, &mut self.pool);
        sequence.release_pages(&mut self.pool, Keep::Nothing);
        Ok(())
    }

    /// A sequence of `ids` with the pages that hold its beginning, as far as position
    /// `first_wanted`, which is left to be computed.
    fn find_prefix(&mut self, ids: &[u32], first_wanted: usize) -> Sequence {
        let (known, rest) = ids.split_at(first_wanted.min(ids.len() - 1) + 1);
        let mut sequence = Sequence::new(RequestId(self.next_id), known.to_vec(), ids.len());
        if self.uses_prefixes {
            let variant = self.rope.variant(ids.len());
            sequence.find_in(self.pool.root_hash(Namespace::default(), variant));
            sequence.find_pages(&mut self.pool);
        }
        sequence.tokens.extend_from_slice(rest);
        sequence
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
                let logits = decoder.logits(0..select.len());
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

    /// What the engine is busy with.
    pub fn status(&self) -> EngineStatus {
        EngineStatus {
            num_waiting: self.scheduler.num_waiting(),
            num_running: self.scheduler.num_running(),
            num_preemptions: self.scheduler.num_preemptions(),
            num_sessions: self.sessions.len(),
            pages: self.pool.counts(),
        }
    }

    /// The kernels that steps have used and how near they come to the machine's limits, see
    /// [`Backend::kernel_usage`](crate::backend::Backend::kernel_usage).
    pub fn kernel_usage(&mut self) -> Result<Vec<KernelUsage>, Error> {
        on_decoder!(&mut self.model, decoder => decoder.kernel_usage())
    }

    /// Where the choices of the kernels come from that serve the model: how many intervals of row
    /// counts, by provenance. None where the backend has no choice.
    pub fn provenances(&self) -> BTreeMap<Provenance, usize> {
        let mut counts = BTreeMap::new();
        let all = on_decoder!(&self.model, decoder => decoder.provenances());
        all.into_iter().for_each(|provenance| *counts.entry(provenance).or_default() += 1);
        counts
    }

    /// The rows of the steps so far; counts on as the engine does.
    pub fn row_histogram(&self) -> Arc<RowHistogram> {
        Arc::clone(&self.row_histogram)
    }

    /// Lets requests have stop strings, and never chooses a token that the tokenizer lacks.
    pub fn set_tokenizer(&mut self, tokenizer: Arc<Tokenizer>) {
        self.sampler.limit(tokenizer.num_ids());
        self.tokenizer = Some(tokenizer);
    }

    /// Further tokens that end answers, besides those of the model's configuration.
    pub fn add_eos_ids(&mut self, ids: &[u32]) {
        let known = &mut self.config.eos_token_ids;
        known.extend_from_slice(ids);
        known.sort_unstable();
        known.dedup();
    }

    /// Names model, kernels and layout of pages: equal ones give equal tokens for equal seeds.
    pub fn fingerprint(&self) -> String {
        let Identity { model, layout } = &self.identity;
        let hash = blake3::hash(format!("{model} {layout}").as_bytes()).to_hex();
        format!("fp_{}", &hash[..16])
    }

    /// Checks what must hold between any two steps.
    pub fn check(&self) -> Result<(), String> {
        self.scheduler.check(&self.pool)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// What loading consisted of.
    pub fn startup(&self) -> &Startup {
        &self.startup
    }

    /// Names the weights, by a hash of names, types, shapes and beginnings of tensors.
    pub fn weights_name(&self) -> &str {
        &self.weights_name
    }

    /// The decoder where the model runs on the CPU.
    pub fn cpu_decoder(&self) -> Option<&Decoder<CpuBackend>> {
        match &self.model {
            Model::Cpu(decoder) => Some(decoder),
            _ => None,
        }
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
            Model::Null(_) => "null",
            Model::Cuda(_) => "cuda",
        }
    }

    /// Fills in everything but the tokens of a session's history.
    fn prepare(&mut self, request: &Request, sequence: &mut Sequence) {
        sequence.tokens.extend_from_slice(&request.prompt_ids);
        sequence.num_prompt = sequence.tokens.len();
        sequence.sampling = request.sampling.clone();
        sequence.sampling.seed = choice_seed(request.sampling.seed, sequence.choice_idx);
        sequence.stop_token_ids.clone_from(&request.stop_token_ids);
        let vocab_size = self.shape.vocab_size;
        sequence.grammar =
            request.grammar.as_ref().map(|grammar| GrammarState::new(grammar, vocab_size));
        if !request.ignore_eos {
            sequence.stop_token_ids.extend_from_slice(&self.config.eos_token_ids);
        }
        if self.uses_prefixes {
            let variant = self.rope.variant(sequence.num_prompt);
            sequence.find_in(self.pool.root_hash(request.namespace, variant));
        }
    }

    /// Watches for `stop_strings` in an answer; `None` where there are none.
    fn stop_check(&self, stop_strings: &[String]) -> Result<Option<StopCheck>, Error> {
        if stop_strings.is_empty() {
            return Ok(None);
        }
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Error::Request(
                "stop strings need a tokenizer, and the engine has none; use stop tokens".into(),
            ));
        };
        let mut text = TextStream::new(tokenizer.clone());
        let mut stops = StopStrings::new(stop_strings.to_vec())?;
        Ok(Some(Box::new(move |token| {
            // A token that is no text stops nothing.
            stops.push(&text.push(token).unwrap_or_default());
            stops.is_stopped()
        })))
    }

    /// Layers, head and statistics of the step at hand.
    fn run_model(&mut self) {
        self.stats.clear();
        self.stats.resize(self.batch.logit_rows.len(), LogitStats::default());
        on_decoder!(&mut self.model, decoder => {
            decoder.step(&self.batch);
            // NOTE: a GPU computes the step meanwhile; its statistics are what is waited for.
            self.scheduler.fill_masks();
            decoder.logit_stats(&mut self.stats);
        });
    }

    /// Chooses the next token of every logit row. Logits are fetched from the backend only as far
    /// as statistics alone do not decide.
    fn sample(&mut self) {
        let vocab_size = self.shape.vocab_size;
        let mut fetched = 0..0;
        for (row, (sequence, stats)) in self.scheduler.sampled().zip(&self.stats).enumerate() {
            if needs_logits(&sequence.sampling, &sequence.history(), stats)
                || !self.sampler.knows(stats)
            {
                fetched = if fetched.is_empty() { row..row + 1 } else { fetched.start..row + 1 };
            }
        }
        let logits = match fetched.is_empty() {
            true => &[],
            false => on_decoder!(&mut self.model, decoder => decoder.logits(fetched.clone())),
        };
        self.samples.clear();
        for (row, (sequence, stats)) in self.scheduler.sampled().zip(&self.stats).enumerate() {
            let (params, history) = (&sequence.sampling, sequence.history());
            self.samples.push(match fetched.contains(&row) {
                true => {
                    let logits = &logits[(row - fetched.start) * vocab_size..][..vocab_size];
                    self.sampler.sample(params, &history, logits, stats)
                }
                false => sample_greedily(stats),
            });
        }
    }
}
