//! Generated kernels against the reference backend, op by op, on this very machine.
//!
//! One layer of a model with random weights is run for several row counts. After each op its output
//! is compared with the reference's for the same input, and then becomes the reference's as well,
//! so that errors do not add up. Sequences around the sizes of pages and of attention's chunks
//! follow, as prompts and as decoded rows. Rows must have the same bits for every row count.

mod compare;
mod side;

use std::collections::BTreeSet;

use bespoke_kernel_gen::cuda::attention_plan::DECODE_ROWS_MAX;
use bespoke_kernel_gen::cuda::{KvType, Regime, Spec};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::presets::PRESETS;
use bespoke_kernel_gen::spec::{
    ActivationType, KernelSpec, KvDType, LinearRole, ModelShape, RowFormat, RowRegime,
};
use bespoke_kernel_gen::target::Target;

use crate::backend::Inspect;
use crate::backend::cpu::{CpuBackend, CpuOptions, is_available};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::{CudaBackend, CudaOptions, KvMemory};
use crate::backend::reference::ReferenceBackend;
use crate::batch::{Batch, BatchLimits};
use crate::error::Error;
use crate::kernels::KernelTable;
use crate::model::weights::RandomWeights;
use compare::Tolerance;
use side::Side;

/// One op's output compared.
#[derive(Clone, Debug)]
pub struct Check {
    pub kernels: Vec<String>,
    /// The model, the row counts and what else distinguishes the check.
    pub case: String,
    /// The largest error, as a share of what is allowed.
    pub error: f32,
    /// What is wrong.
    pub problem: Option<String>,
}

/// Everything that was compared.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub checks: Vec<Check>,
    /// Kernels that took part in a check.
    pub kernels: BTreeSet<String>,
}

impl Report {
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.problem.is_some())
    }
}

/// An op of a layer, by the linear it belongs to where there are several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Embed,
    /// The norm before a linear.
    Norm(LinearRole),
    Linear(LinearRole),
    Rope,
    Attention,
    SiluAndMul,
    Sample,
}

/// A layer's ops in order, the head's included.
const PARTS: [Part; 13] = [
    Part::Embed,
    Part::Norm(LinearRole::Qkv),
    Part::Linear(LinearRole::Qkv),
    Part::Rope,
    Part::Attention,
    Part::Linear(LinearRole::O),
    Part::Norm(LinearRole::GateUp),
    Part::Linear(LinearRole::GateUp),
    Part::SiluAndMul,
    Part::Linear(LinearRole::Down),
    Part::Norm(LinearRole::Head),
    Part::Linear(LinearRole::Head),
    Part::Sample,
];

impl Part {
    fn depends_on_kv(self) -> bool {
        matches!(self, Part::Rope | Part::Attention)
    }
}

/// Row counts around the limits of the regimes; the last is the largest.
const CPU_ROWS: [usize; 5] = [1, 2, 8, 9, 33];
const CUDA_ROWS: [usize; 10] = [1, 7, 8, 9, 16, 17, 33, 64, 65, 129];

/// Tokens of a sequence at most.
const CONTEXT_MAX: usize = 320;

/// Verifies the kernels that `table` has for the instruction sets of this machine.
///
/// # Errors
/// There is no memory for the weights, or a model's kernels are not all there.
pub fn cpu(
    table: &KernelTable,
    shapes: &[ModelShape],
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let held = |target: &Target| table.kernels.iter().any(|kernel| kernel.target == *target);
    let targets = Target::ALL.into_iter().filter(held).filter(|target| is_available(*target));
    for target in targets {
        for shape in shapes {
            let activations = match shape.is_quantized() {
                true => &[ActivationType::Float, ActivationType::Int8][..],
                false => &[ActivationType::Float],
            };
            for &activation in activations {
                for kv_dtype in KvDType::ALL {
                    let options = CpuOptions {
                        kv_dtype,
                        activation,
                        num_threads: None,
                        target: Some(target),
                    };
                    let case = Case {
                        shape: ModelShape { num_layers: 1, ..shape.clone() },
                        kv: kv_dtype,
                        rows: &CPU_ROWS,
                        name: format!(
                            "{} on {}, {activation:?} activations, {} KV cache",
                            shape.name,
                            target.name(),
                            kv_dtype.name()
                        ),
                    };
                    let backend = CpuBackend::new(table, &config(), &case.shape, &options)?;
                    let kernels = |_: &CpuBackend, part, batch: &Batch| {
                        cpu_kernels(table, &case.shape, &options, part, batch)
                    };
                    run(&case, backend, &kernels, report, progress)?;
                }
            }
        }
    }
    Ok(())
}

/// Verifies the kernels of `device` for `shapes`; `open` gives the device anew for every KV type.
///
/// # Errors
/// As [`cpu`], and where the device cannot be opened.
pub fn cuda<D: Device>(
    open: &mut dyn FnMut() -> Result<D, Error>,
    shapes: &[ModelShape],
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    for shape in shapes {
        for kv_dtype in KvDType::ALL {
            let Some(kv_type) = KvType::of(kv_dtype) else { continue };
            let case = Case {
                shape: ModelShape { num_layers: 1, ..shape.clone() },
                kv: kv_dtype,
                rows: &CUDA_ROWS,
                name: format!("{}, {} KV cache", shape.name, kv_dtype.name()),
            };
            let kv_memory = KvMemory::Share(0.5);
            let options = CudaOptions { kv_dtype, kv_memory, graphs: false };
            let backend = CudaBackend::new(open()?, &config(), &case.shape, &options)?;
            let kernels = |backend: &CudaBackend<D>, part, batch: &Batch| {
                cuda_kernels(backend.device(), &case.shape, kv_type, part, batch)
            };
            run(&case, backend, &kernels, report, progress)?;
        }
    }
    Ok(())
}

/// Backends read the epsilon of norms from a configuration, and nothing else.
fn config() -> ModelConfig {
    let (_, json) = PRESETS[0];
    ModelConfig::parse(json).expect("a preset that the generator's tests parse")
}

/// One backend of one model.
struct Case<'a> {
    /// With a single layer.
    shape: ModelShape,
    kv: KvDType,
    rows: &'a [usize],
    name: String,
}

/// The kernels that serve an op for a batch.
type KernelsOf<'a, B> = dyn Fn(&B, Part, &Batch) -> Vec<String> + 'a;

fn cpu_kernels(
    table: &KernelTable,
    shape: &ModelShape,
    options: &CpuOptions,
    part: Part,
    batch: &Batch,
) -> Vec<String> {
    let CpuOptions { kv_dtype, activation, target, .. } = *options;
    let hidden = shape.hidden_size;
    let rows_of = |role| shape.linear_rows(role, activation);
    let is_decode = batch.spans.iter().all(|span| span.num_rows == 1);
    let any = |spec| vec![(spec, RowRegime::Any)];
    let wanted = match part {
        Part::Embed => any(KernelSpec::Embed { hidden, dtype: shape.dtype }),
        Part::Norm(role) => any(KernelSpec::RmsNorm { hidden, out: rows_of(role) }),
        Part::Linear(role) => {
            let regime = match batch.num_rows() {
                1 => RowRegime::One,
                rows if rows <= RowRegime::FEW_MAX => RowRegime::Few,
                _ => RowRegime::Many,
            };
            shape.linear_kernel(role, activation).map_or(vec![], |spec| vec![(spec, regime)])
        }
        Part::Rope => any(shape.rope_kernel(kv_dtype)),
        Part::Attention => {
            let regime = if is_decode { RowRegime::One } else { RowRegime::Many };
            let mut all = vec![(shape.paged_attention_kernel(kv_dtype), regime)];
            if let RowFormat::I8 { group } = rows_of(LinearRole::O) {
                all.extend(any(KernelSpec::Quantize { k: shape.o.k, group }));
            }
            all
        }
        Part::SiluAndMul => any(KernelSpec::SiluAndMul {
            intermediate: shape.intermediate_size,
            out: rows_of(LinearRole::Down),
        }),
        Part::Sample => any(KernelSpec::Sample { vocab: shape.vocab_size }),
    };
    let target = target.unwrap_or(Target::Portable);
    let found = wanted.iter().filter_map(|(spec, regime)| table.find(spec, *regime, target));
    found.map(|kernel| kernel.symbol.to_owned()).collect()
}

fn cuda_kernels<D: Device>(
    device: &D,
    shape: &ModelShape,
    kv: KvType,
    part: Part,
    batch: &Batch,
) -> Vec<String> {
    let any = |spec| vec![(spec, Regime::Any)];
    let wanted: Vec<(Spec, Regime)> = match part {
        Part::Embed => any(shape.cuda_embed()),
        Part::Norm(_) => any(shape.cuda_rms_norm()),
        Part::Linear(role) => {
            let regime = Regime::of_rows(batch.num_rows());
            shape.cuda_linear(role).map_or(vec![], |spec| vec![(spec, regime)])
        }
        Part::Rope => any(shape.cuda_rope(kv)),
        Part::Attention => {
            let is_decoded = |num_rows: u32| num_rows as usize <= DECODE_ROWS_MAX;
            let mut regimes: Vec<Regime> = batch
                .spans
                .iter()
                .map(|span| match is_decoded(span.num_rows) {
                    true => Regime::Decode,
                    false => Regime::Prefill,
                })
                .collect();
            regimes.sort_unstable();
            regimes.dedup();
            let spec = shape.cuda_paged_attention(kv);
            regimes.into_iter().map(|regime| (spec, regime)).collect()
        }
        Part::SiluAndMul => any(shape.cuda_silu_and_mul()),
        Part::Sample => any(shape.cuda_sample()),
    };
    let found = wanted.iter().filter_map(|(spec, regime)| device.find(spec, *regime));
    found.map(|variant| variant.symbol()).collect()
}

/// Runs one backend, unless other cases have shown all of its kernels.
fn run<B: Inspect>(
    case: &Case<'_>,
    backend: B,
    kernels: &KernelsOf<'_, B>,
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let plan = Plan::new(case);
    let is_new = |part: Part, batch: &Batch| {
        kernels(&backend, part, batch).iter().any(|symbol| !report.kernels.contains(symbol))
    };
    let has_new = |batches: &[Batch], kv_only: bool| {
        let parts = PARTS.iter().filter(|part| !kv_only || part.depends_on_kv());
        parts.into_iter().any(|part| batches.iter().any(|batch| is_new(*part, batch)))
    };
    let has_layers = has_new(&plan.layers, false);
    let has_sequences = has_new(&plan.sequences, true);
    if !has_layers && !has_sequences {
        return Ok(());
    }
    progress(&case.name);
    let known = report.kernels.clone();
    let weights = RandomWeights::new(&case.shape, 1);
    let reference = ReferenceBackend::new(&config(), &case.shape);
    let mut pair = Pair {
        case,
        kernels,
        known: &known,
        tolerance: Tolerance { kv: case.kv },
        subject: Side::new(backend, &weights, &case.shape, &plan.limits, plan.num_pages)?,
        reference: Side::new(reference, &weights, &case.shape, &plan.limits, plan.num_pages)?,
        report,
    };
    if has_layers {
        pair.layers(&plan.layers);
    }
    if has_sequences {
        pair.sequences(&plan.sequences);
    }
    Ok(())
}

/// What a case computes.
struct Plan {
    limits: BatchLimits,
    num_pages: usize,
    /// One sequence each, of the case's row counts.
    layers: Vec<Batch>,
    /// Prompts in pieces, and then a decoded row of each sequence.
    sequences: Vec<Batch>,
}

/// Rows of a sequence: tokens `first..end`.
#[derive(Clone, Copy)]
struct Rows {
    sequence: usize,
    first: usize,
    end: usize,
}

impl Plan {
    fn new(case: &Case<'_>) -> Plan {
        let page = case.shape.page_size;
        let rows_max = case.rows.iter().copied().max().unwrap_or(1);
        let lens = [rows_max, 1, 2, page - 1, page, page + 1, 2 * page + 3, CONTEXT_MAX - 19];
        let pages_of_one = CONTEXT_MAX.div_ceil(page);
        let num_pages = lens.len() * pages_of_one;
        let batch = |rows: &[Rows]| batch(&case.shape, rows, num_pages, pages_of_one);
        let layer = |rows: &usize| batch(&[Rows { sequence: 0, first: 0, end: *rows }]);
        let mut sequences = Vec::new();
        for (sequence, len) in lens.iter().enumerate().skip(1) {
            for first in (0..len - 1).step_by(rows_max) {
                let end = (first + rows_max).min(len - 1);
                sequences.push(batch(&[Rows { sequence, first, end }]));
            }
        }
        let lasts: Vec<Rows> = (1..lens.len())
            .map(|sequence| {
                let end = lens[sequence];
                Rows { sequence, first: end - 1, end }
            })
            .collect();
        sequences.extend(lasts.chunks(rows_max).map(batch));
        let limits = BatchLimits {
            rows_max: rows_max.max(lens.len()),
            sequences_max: lens.len(),
            context_max: CONTEXT_MAX,
            logit_rows_max: rows_max.max(lens.len()),
        };
        Plan { limits, num_pages, layers: case.rows.iter().map(layer).collect(), sequences }
    }
}

/// Rows with pages that do not lie in order. Tokens and angles depend on sequence and place alone.
fn batch(shape: &ModelShape, all: &[Rows], num_pages: usize, pages_of_one: usize) -> Batch {
    let page = |sequence: usize, idx: usize| (num_pages - 1 - sequence - idx * 8) as u32;
    assert_eq!(num_pages, 8 * pages_of_one, "eight sequences take turns");
    let mut batch = Batch::default();
    for rows in all {
        batch.spans.push(crate::kernels::abi::SequenceSpan {
            first_row: batch.num_rows() as u32,
            num_rows: (rows.end - rows.first) as u32,
            context_len: rows.end as u32,
            first_page: batch.page_table.len() as u32,
        });
        let pages = 0..rows.end.div_ceil(shape.page_size);
        batch.page_table.extend(pages.map(|idx| page(rows.sequence, idx)));
        for position in rows.first..rows.end {
            let token = (7 + 31 * rows.sequence + 13 * position + position * position) as u32;
            batch.tokens.push(token % shape.vocab_size as u32);
            batch.positions.push(position as u32);
            let page = page(rows.sequence, position / shape.page_size) as usize;
            batch.slots.push((page * shape.page_size + position % shape.page_size) as u32);
            let half = shape.rotary_dim / 2;
            let angle = |i: usize| position as f32 * 1e4_f32.powf(-(i as f32) / half as f32);
            batch.cos_sin.extend((0..half).map(|i| angle(i).cos()));
            batch.cos_sin.extend((0..half).map(|i| angle(i).sin()));
        }
    }
    // NOTE: backwards, so that a selection that is not read would show.
    batch.logit_rows.extend((0..batch.num_rows() as u32).rev());
    batch
}

/// A backend beside the reference.
struct Pair<'a, B: Inspect> {
    case: &'a Case<'a>,
    kernels: &'a KernelsOf<'a, B>,
    /// Kernels that other cases have shown.
    known: &'a BTreeSet<String>,
    tolerance: Tolerance,
    subject: Side<B>,
    reference: Side<ReferenceBackend>,
    report: &'a mut Report,
}

impl<B: Inspect> Pair<'_, B> {
    /// All ops for each row count.
    fn layers(&mut self, batches: &[Batch]) {
        // Logits of each row.
        let mut logits: Vec<Vec<f32>> = Vec::new();
        for batch in batches {
            self.subject.backend.begin_rows(batch);
            for part in PARTS {
                self.step(part, batch);
            }
            let num_rows = batch.num_rows();
            let found = self.subject.output(Part::Linear(LinearRole::Head), num_rows);
            let found = found.chunks_exact(self.case.shape.vocab_size).rev().map(<[f32]>::to_vec);
            let found: Vec<Vec<f32>> = found.collect();
            let same = |(a, b): (&Vec<f32>, &Vec<f32>)| {
                a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
            };
            let other = logits.iter().zip(&found).position(|rows| !same(rows));
            if let Some(row) = other {
                let kernels = PARTS.iter().flat_map(|part| self.kernels_of(*part, batch)).collect();
                self.report.checks.push(Check {
                    kernels,
                    case: format!("{}, {num_rows} rows", self.case.name),
                    error: f32::INFINITY,
                    problem: Some(format!(
                        "row {row} has other logits among {num_rows} rows than among fewer"
                    )),
                });
            }
            logits.extend(found.into_iter().skip(logits.len()));
        }
    }

    /// The ops that know sequences.
    fn sequences(&mut self, batches: &[Batch]) {
        for batch in batches {
            self.subject.backend.begin_rows(batch);
            for part in &PARTS[..5] {
                self.step(*part, batch);
            }
        }
    }

    fn kernels_of(&self, part: Part, batch: &Batch) -> Vec<String> {
        (self.kernels)(&self.subject.backend, part, batch)
    }

    /// Runs an op, compares it if its kernels are new, and takes its output over.
    fn step(&mut self, part: Part, batch: &Batch) {
        let mut kernels = self.kernels_of(part, batch);
        if part == Part::Attention {
            // What is seen of the cache is what `rope` appended.
            kernels.extend(self.kernels_of(Part::Rope, batch));
        }
        let is_new = kernels.iter().any(|symbol| !self.known.contains(symbol));
        self.subject.run(part, batch);
        // The reference's pages are its own.
        if is_new || part == Part::Rope {
            self.reference.run(part, batch);
        }
        if part == Part::Rope && self.case.kv == KvDType::I4 {
            // NOTE: its queries are multiplied by a Hadamard matrix; attention shows if rightly.
            return;
        }
        let num_rows = batch.num_rows();
        let found = self.subject.output(part, num_rows);
        if is_new {
            let expected = self.reference.output(part, num_rows);
            let precision = self.subject.precision(part);
            let width = found.len() / num_rows;
            let outcome = self.tolerance.compare(
                part,
                precision,
                &self.case.shape,
                (&found, &expected, width),
            );
            let spans = batch.spans.len();
            self.report.checks.push(Check {
                kernels: kernels.clone(),
                case: format!(
                    "{}, {part:?}, {num_rows} rows of {spans} sequences, up to {} tokens",
                    self.case.name,
                    batch.spans.iter().map(|span| span.context_len).max().unwrap_or(0)
                ),
                error: outcome.error,
                problem: outcome.problem,
            });
            self.report.kernels.extend(kernels);
        }
        self.reference.replace(part, &found);
    }
}
