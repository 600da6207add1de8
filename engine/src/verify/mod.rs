//! Generated kernels against the reference backend, op by op, on this very machine.
//!
//! One layer of a model with random weights is run for several row counts. After each op its output
//! is compared with the reference's for the same input, and then becomes the reference's as well,
//! so that errors do not add up. Sequences around the sizes of pages and of attention's chunks
//! follow, as prompts and as decoded rows. Rows must have the same bits for every row count, and by
//! the kernels of a lock the bits that the default ones give (`end_to_end`).

mod compare;
mod end_to_end;
mod kernels;
mod plan;
mod side;

use std::collections::BTreeSet;

use bespoke_kernel_gen::cuda::KvType;
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::presets::PRESETS;
use bespoke_kernel_gen::spec::{KvDType, LinearRole, ModelShape};
use bespoke_kernel_gen::target::Target;

use crate::backend::Inspect;
use crate::backend::cpu::{CpuBackend, CpuOptions, is_available};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::{CudaBackend, CudaOptions, KvMemory};
use crate::backend::reference::ReferenceBackend;
use crate::batch::Batch;
use crate::error::Error;
use crate::kernels::KernelTable;
use crate::kernels::choice::{Choice, DeviceChoice};
use crate::model::weights::RandomWeights;
use compare::Tolerance;
use kernels::{cpu_kernels, cuda_kernels};
use plan::Plan;
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

/// The ops that know sequences and the type of the KV cache.
const SEQUENCE_PARTS: [Part; 2] = [Part::Rope, Part::Attention];

/// Row counts of one sequence at most.
const ROWS_MAX: usize = 257;
/// Row counts around the limits of the regimes; the last is the largest.
const CPU_ROWS: [usize; 5] = [1, 2, 8, 9, 33];
const CUDA_ROWS: [usize; 10] = [1, 7, 8, 9, 16, 17, 33, 64, 65, 129];

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
    let layers: Vec<ModelShape> = shapes.iter().flat_map(ModelShape::single_layers).collect();
    for target in targets {
        for device in table.devices(target) {
            for shape in &layers {
                cpu_shape(table, (target, device), shape, report, progress)?;
            }
            let Some(device) = device else { continue };
            for shape in shapes {
                end_to_end::check(table, (target, device), shape, report, progress)?;
            }
        }
    }
    Ok(())
}

/// All that a device class runs of one model.
fn cpu_shape(
    table: &KernelTable,
    (target, device): (Target, Option<&'static str>),
    shape: &ModelShape,
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let choice = Choice { table, target, device };
    let rows = cpu_rows(table);
    for &activation in shape.activations() {
        for kv_dtype in KvDType::ALL {
            let options = CpuOptions {
                kv_dtype,
                activation,
                num_threads: None,
                target: Some(target),
                device: device.map_or(DeviceChoice::Any, DeviceChoice::Class),
            };
            let of_device = device.map_or(String::new(), |key| format!(" of {key}"));
            let case = Case {
                shape: shape.clone(),
                kv: kv_dtype,
                rows: &rows,
                name: format!(
                    "{} on {}{of_device}, {activation:?} activations, {} KV cache",
                    shape.name,
                    target.name(),
                    kv_dtype.name()
                ),
            };
            let backend = CpuBackend::new(table, &config(), &case.shape, &options)?;
            let kernels = |_: &CpuBackend, part, batch: &Batch| {
                cpu_kernels(choice, &case.shape, &options, part, batch)
            };
            run(&case, backend, &kernels, report, progress)?;
        }
    }
    Ok(())
}

/// Row counts around the limits of the table's intervals, as far as a sequence has rows.
fn cpu_rows(table: &KernelTable) -> Vec<usize> {
    let intervals = table.servings.iter().flat_map(|serving| serving.intervals);
    let limits = intervals.map(|interval| interval.rows_max).filter(|rows| *rows < ROWS_MAX);
    let mut rows: Vec<usize> = limits.flat_map(|rows| [rows, rows + 1]).collect();
    rows.extend(CPU_ROWS);
    rows.sort_unstable();
    rows.dedup();
    rows
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
    for shape in shapes.iter().flat_map(ModelShape::single_layers) {
        for kv_dtype in KvDType::ALL {
            let Some(kv_type) = KvType::of(kv_dtype) else { continue };
            let case = Case {
                shape: shape.clone(),
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

/// Runs one backend, unless other cases have shown all of its kernels.
fn run<B: Inspect>(
    case: &Case<'_>,
    backend: B,
    kernels: &KernelsOf<'_, B>,
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let plan = Plan::new(&case.shape, case.rows);
    let is_new = |part: Part, batch: &Batch| {
        kernels(&backend, part, batch).iter().any(|symbol| !report.kernels.contains(symbol))
    };
    let has_new = |batches: &[Batch], parts: &[Part]| {
        parts.iter().any(|part| batches.iter().any(|batch| is_new(*part, batch)))
    };
    let has_layers = has_new(&plan.layers, &PARTS);
    let has_sequences = has_new(&plan.sequences, &SEQUENCE_PARTS);
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

    /// The ops up to attention.
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
