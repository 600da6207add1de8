//! The null backend: a model without mathematics, for tests of everything around a model and to
//! measure what the engine itself costs.
//!
//! A row is a 64-bit hash. The slot of position `p` keeps a hash of the token at `p`, of `p` and of
//! the slot before, as found through the page table. Attention folds all slots `0..=p`, and the
//! fold alone decides the next token: one wrong, stale or overwritten page anywhere in the context
//! changes what comes out. [`next_token`] says what has to come out, without pages.

use bespoke_kernel_gen::model::{Architecture, ModelConfig, RopeScaling};
use bespoke_kernel_gen::spec::{DType, LinearRole};

use std::ops::Range;

use crate::backend::{Backend, RowsKind};
use crate::batch::{Batch, PageCopy};
use crate::error::Error;
use crate::kernels::abi::{LogitStats, SequenceSpan};
use crate::model::linear::{DenseView, LinearSource};

/// Logits of the tokens that a row may be followed by; all others have [`LOGIT_FLOOR`].
const LOGITS: [f32; 4] = [20.0, 19.5, 19.0, 18.0];
const LOGIT_FLOOR: f32 = 0.0;

/// Smallest vocabulary: the candidates of a row are distinct.
const VOCAB_MIN: usize = LOGITS.len();
const VOCAB_MAX: usize = 1 << 21;

/// The hash of a row that has no finite logit.
const NOT_FINITE: u64 = u64::MAX;

/// What a slot holds until it is written. Reading it yields tokens, but not those of any history.
const POISON: u64 = 0x0bad_51d0_0bad_51d0;

/// Bytes of a slot.
const SLOT_BYTES: usize = size_of::<u64>();

/// A model that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullOptions {
    /// At least 4 tokens.
    pub vocab_size: usize,
    /// Slots of a page.
    pub page_size: usize,
    /// Longest context.
    pub max_position: usize,
    pub fault: Option<Fault>,
}

/// What goes wrong, to test those who live through it. Steps count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Error {
        step: u64,
    },
    Panic {
        step: u64,
    },
    /// Nothing finite follows a row of this token.
    NotFinite {
        token: u32,
    },
}

/// Runs no model, exactly.
#[derive(Debug)]
pub struct NullBackend {
    vocab_size: usize,
    page_size: usize,
    fault: Option<Fault>,
    num_steps: u64,
    /// Of any row: all have the same logits, at other tokens.
    log_sum_exp: f32,
}

/// One hash a row, and for logits the values.
#[derive(Clone, Debug)]
pub struct Rows {
    /// `[rows_max]`
    hashes: Vec<u64>,
    /// `[rows_max, vocab]` for logits, else empty.
    logits: Vec<f32>,
}

/// The hash of each slot.
#[derive(Clone, Debug)]
pub struct KvCache {
    /// `[num_pages · page_size]`
    slots: Vec<u64>,
}

/// The greedy token that follows `history`, computed without an engine.
pub fn next_token(history: &[u32], vocab_size: usize) -> u32 {
    candidates(fold(history), vocab_size)[0]
}

/// The logits that follow `history`, `[vocab]`, and their statistics, computed without an engine.
pub fn next_logits(history: &[u32], logits: &mut [f32]) -> LogitStats {
    let candidates = candidates(fold(history), logits.len());
    fill_logits(candidates, logits);
    LogitStats { max: LOGITS[0], argmax: candidates[0], log_sum_exp: log_sum_exp(logits.len()) }
}

fn fold(history: &[u32]) -> u64 {
    let (mut slot, mut fold) = (0, 0);
    for (position, token) in history.iter().enumerate() {
        slot = slot_hash(slot, u64::from(*token), position);
        fold = mix(fold, slot);
    }
    fold
}

/// The logits of a row, `[vocab]`.
fn fill_logits_of(hash: u64, logits: &mut [f32]) {
    match hash {
        NOT_FINITE => logits.fill(f32::NAN),
        _ => fill_logits(candidates(hash, logits.len()), logits),
    }
}

fn fill_logits(candidates: [u32; LOGITS.len()], logits: &mut [f32]) {
    logits.fill(LOGIT_FLOOR);
    for (token, logit) in candidates.into_iter().zip(LOGITS) {
        logits[token as usize] = logit;
    }
}

/// Of any row: all have the same logits, at other tokens.
fn log_sum_exp(vocab_size: usize) -> f32 {
    let num_floor = vocab_size - LOGITS.len();
    let sum: f64 = LOGITS.iter().map(|logit| f64::from(*logit).exp()).sum();
    (sum + num_floor as f64 * f64::from(LOGIT_FLOOR).exp()).ln() as f32
}

impl Default for NullOptions {
    fn default() -> NullOptions {
        NullOptions { vocab_size: 256, page_size: 16, max_position: 1 << 16, fault: None }
    }
}

impl NullOptions {
    /// One layer whose every row is one number wide; refuses sizes that cannot be.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        let refuse = |name: &str, value: usize, expected: &str| {
            Err(Error::Request(format!("{name} is {value}, it must be {expected}")))
        };
        if !(VOCAB_MIN..=VOCAB_MAX).contains(&self.vocab_size) {
            let expected = format!("between {VOCAB_MIN} and {VOCAB_MAX}");
            return refuse("vocab_size", self.vocab_size, &expected);
        }
        if self.page_size == 0 {
            return refuse("page_size", 0, "at least 1");
        }
        Ok(ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: self.vocab_size,
            hidden_size: 1,
            intermediate_size: 1,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 1,
            rotary_dim: 0,
            rms_norm_eps: 0.0,
            rope_theta: 1.0,
            rope_scaling: RopeScaling::Default,
            max_position: self.max_position,
            sliding_window: None,
            qk_norm: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
            dtype: DType::F32,
            quantization: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        })
    }
}

impl NullBackend {
    /// A backend for the model of `options`, which [`NullOptions::config`] accepted.
    pub fn new(options: &NullOptions) -> NullBackend {
        NullBackend {
            vocab_size: options.vocab_size,
            page_size: options.page_size,
            fault: options.fault,
            num_steps: 0,
            log_sum_exp: log_sum_exp(options.vocab_size),
        }
    }

    /// Counts a step; here the fault strikes.
    pub fn begin_step(&mut self) -> Result<(), Error> {
        let step = self.num_steps;
        self.num_steps += 1;
        match self.fault {
            Some(Fault::Error { step: fault }) if fault == step => {
                Err(Error::Resources(format!("step {step} fails, as its options ask")))
            }
            Some(Fault::Panic { step: fault }) if fault == step => {
                panic!("step {step} panics, as its options ask")
            }
            _ => Ok(()),
        }
    }

    /// Whether nothing finite follows a row of `token`.
    fn fails(&self, token: u64) -> bool {
        matches!(self.fault, Some(Fault::NotFinite { token: fault }) if u64::from(fault) == token)
    }

    fn page_start(&self, page: u32) -> usize {
        page as usize * self.page_size
    }

    /// The slot of a position, through the page table.
    fn slot(&self, batch: &Batch, span: &SequenceSpan, position: usize) -> usize {
        let page = batch.page_table[span.first_page as usize + position / self.page_size];
        self.page_start(page) + position % self.page_size
    }
}

impl Backend for NullBackend {
    /// Which linear it is.
    type Linear = LinearRole;
    type Embedding = ();
    type Norm = ();
    type Rows = Rows;
    type Input = Rows;
    type KvCache = KvCache;

    fn load_linear(&mut self, role: LinearRole, _: &LinearSource<'_>) -> Result<LinearRole, Error> {
        Ok(role)
    }

    fn load_embedding(&mut self, _: &DenseView<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn load_norm(&mut self, _: Vec<f32>) -> Result<(), Error> {
        Ok(())
    }

    fn new_rows(&mut self, rows_max: usize, width: usize, kind: RowsKind) -> Result<Rows, Error> {
        let num_logits = if kind == RowsKind::Logits { rows_max * width } else { 0 };
        Ok(Rows { hashes: vec![0; rows_max], logits: vec![0.0; num_logits] })
    }

    fn new_input(&mut self, rows_max: usize, _: LinearRole) -> Result<Rows, Error> {
        self.new_rows(rows_max, 1, RowsKind::Linear)
    }

    fn new_kv_cache(&mut self, num_pages: usize) -> Result<KvCache, Error> {
        let num_slots = num_pages * self.page_size;
        let mut slots = Vec::new();
        slots.try_reserve_exact(num_slots).map_err(|_| {
            Error::Resources(format!("no memory for {num_slots} slots; give the cache fewer pages"))
        })?;
        slots.resize(num_slots, POISON);
        Ok(KvCache { slots })
    }

    fn page_bytes(&self) -> usize {
        self.page_size * SLOT_BYTES
    }

    fn identity(&self) -> String {
        "null".to_owned()
    }

    fn weights_bytes(&self) -> usize {
        0
    }

    fn copy_pages(&mut self, copies: &[PageCopy], kv_cache: &mut KvCache) {
        for copy in copies {
            let from = self.page_start(copy.from);
            kv_cache.slots.copy_within(from..from + self.page_size, self.page_start(copy.to));
        }
    }

    fn read_page(&mut self, page: u32, kv_cache: &KvCache, out: &mut Vec<u8>) {
        let start = self.page_start(page);
        let slots = &kv_cache.slots[start..start + self.page_size];
        out.extend(slots.iter().flat_map(|slot| slot.to_le_bytes()));
    }

    fn write_page(&mut self, page: u32, bytes: &[u8], kv_cache: &mut KvCache) {
        assert_eq!(bytes.len(), self.page_size * SLOT_BYTES, "bytes of one page");
        let start = self.page_start(page);
        let (chunks, _) = bytes.as_chunks::<SLOT_BYTES>();
        for (slot, chunk) in kv_cache.slots[start..].iter_mut().zip(chunks) {
            *slot = u64::from_le_bytes(*chunk);
        }
    }

    fn embed(&mut self, _: &(), tokens: &[u32], out: &mut Rows) {
        for (hash, token) in out.hashes.iter_mut().zip(tokens) {
            *hash = u64::from(*token);
        }
    }

    fn rms_norm(
        &mut self,
        num_rows: usize,
        residual: &mut Rows,
        delta: Option<&Rows>,
        _: &(),
        out: &mut Rows,
    ) {
        out.copy(num_rows, delta.unwrap_or(residual));
    }

    fn rms_norm_select(
        &mut self,
        select: &[u32],
        residual: &mut Rows,
        delta: Option<&Rows>,
        _: &(),
        out: &mut Rows,
    ) {
        let from = delta.unwrap_or(residual);
        for (hash, row) in out.hashes.iter_mut().zip(select) {
            *hash = from.hashes[*row as usize];
        }
    }

    fn linear(&mut self, num_rows: usize, role: &LinearRole, x: &Rows, out: &mut Rows) {
        out.copy(num_rows, x);
        if *role == LinearRole::Head {
            let rows = out.logits.chunks_exact_mut(self.vocab_size).zip(&out.hashes);
            for (logits, hash) in rows.take(num_rows) {
                fill_logits_of(*hash, logits);
            }
        }
    }

    fn rope(
        &mut self,
        batch: &Batch,
        _layer_idx: usize,
        qkv: &mut Rows,
        _qk_norm: Option<(&(), &())>,
        kv_cache: &mut KvCache,
    ) {
        for span in &batch.spans {
            for row in span.first_row as usize..(span.first_row + span.num_rows) as usize {
                let position = batch.positions[row] as usize;
                let before = match position {
                    0 => 0,
                    _ => kv_cache.slots[self.slot(batch, span, position - 1)],
                };
                let slot = batch.slots[row] as usize;
                kv_cache.slots[slot] = slot_hash(before, qkv.hashes[row], position);
            }
        }
    }

    fn paged_attention(
        &mut self,
        batch: &Batch,
        _layer_idx: usize,
        qkv: &Rows,
        kv_cache: &KvCache,
        out: &mut Rows,
    ) {
        for span in &batch.spans {
            let num_before = (span.context_len - span.num_rows) as usize;
            let mut fold = 0;
            for position in 0..span.context_len as usize {
                fold = mix(fold, kv_cache.slots[self.slot(batch, span, position)]);
                // A row sees the slots up to its own: its fold is a prefix of the last row's.
                if position >= num_before {
                    let row = span.first_row as usize + position - num_before;
                    out.hashes[row] = if self.fails(qkv.hashes[row]) { NOT_FINITE } else { fold };
                }
            }
        }
    }

    fn silu_and_mul(&mut self, num_rows: usize, gate_up: &Rows, out: &mut Rows) {
        out.copy(num_rows, gate_up);
    }

    fn sample(&mut self, logits: &Rows, stats: &mut [LogitStats]) {
        for (stats, hash) in stats.iter_mut().zip(&logits.hashes) {
            *stats = match *hash {
                // What a kernel finds where NaN counts as −∞.
                NOT_FINITE => {
                    LogitStats { max: f32::NEG_INFINITY, argmax: 0, log_sum_exp: f32::NEG_INFINITY }
                }
                hash => LogitStats {
                    max: LOGITS[0],
                    argmax: candidates(hash, self.vocab_size)[0],
                    log_sum_exp: self.log_sum_exp,
                },
            };
        }
    }

    fn read<'a>(&'a mut self, rows: Range<usize>, logits: &'a Rows) -> &'a [f32] {
        &logits.logits[rows.start * self.vocab_size..rows.end * self.vocab_size]
    }
}

impl Rows {
    fn copy(&mut self, num_rows: usize, from: &Rows) {
        self.hashes[..num_rows].copy_from_slice(&from.hashes[..num_rows]);
    }
}

/// What the slot of `position` holds.
fn slot_hash(before: u64, token: u64, position: usize) -> u64 {
    mix(mix(before, token), position as u64)
}

/// The tokens that may follow, likeliest first. Multiples of a step of at most a quarter of the
/// vocabulary are distinct.
fn candidates(hash: u64, vocab_size: usize) -> [u32; LOGITS.len()] {
    let vocab = vocab_size as u64;
    let first = hash % vocab;
    let step = 1 + (hash >> 32) % (vocab / LOGITS.len() as u64);
    std::array::from_fn(|idx| ((first + idx as u64 * step) % vocab) as u32)
}

/// Depends on the order of its arguments (the finalizer of SplitMix64).
fn mix(before: u64, value: u64) -> u64 {
    let z = before.rotate_left(23) ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
