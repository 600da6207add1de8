//! A model by the kernels that a lock chose against the same model by the default ones: the logits
//! have the same bits.
//!
//! This is level V6 of the ladder of verification (`tune::ladder`), and the only one that sees the
//! servings: which kernel runs at which row count, in prompts and in decoded rows.

use std::collections::BTreeSet;

use bespoke_kernel_gen::spec::{KvDType, ModelShape};
use bespoke_kernel_gen::target::Target;

use super::kernels::cpu_kernels;
use super::plan::Plan;
use super::{Check, PARTS, Report, config, cpu_rows};
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::batch::Batch;
use crate::error::Error;
use crate::kernels::KernelTable;
use crate::kernels::choice::{Choice, DeviceChoice};
use crate::model::decoder::{Decoder, DecoderLimits};
use crate::model::weights::RandomWeights;

/// Layers at most: what a layer gets wrong goes through another one.
const NUM_LAYERS: usize = 2;

/// Compares what serves `shape` on `device` with what serves it anywhere, for every form of rows
/// and of the KV cache in which these differ.
///
/// # Errors
/// There is no memory for the weights, or the model's kernels are not all there.
pub(super) fn check(
    table: &KernelTable,
    (target, device): (Target, &'static str),
    shape: &ModelShape,
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let mut shape = shape.clone();
    shape.num_layers = shape.num_layers.min(NUM_LAYERS);
    shape.dense_linears.retain(|place| place.layer_idx < NUM_LAYERS);
    let plan = Plan::new(&shape, &cpu_rows(table));
    let mut batches: Vec<Batch> = plan.layers.into_iter().chain(plan.sequences).collect();
    batches.iter_mut().for_each(|batch| batch.logit_rows.sort_unstable());
    let limits = DecoderLimits { batch: plan.limits, num_pages: Some(plan.num_pages) };
    let weights = RandomWeights::new(&shape, 1);
    let mut seen = BTreeSet::new();
    for &activation in shape.activations() {
        for kv_dtype in KvDType::ALL {
            let options = CpuOptions {
                kv_dtype,
                activation,
                num_threads: None,
                target: Some(target),
                device: DeviceChoice::Any,
            };
            let chosen = |batch: &Batch| chosen(table, device, &shape, &options, batch);
            let num_seen = seen.len();
            seen.extend(batches.iter().flat_map(chosen));
            if seen.len() == num_seen {
                continue;
            }
            let name = format!(
                "{} end to end on {device}, {activation:?} activations, {} KV cache",
                shape.name,
                kv_dtype.name()
            );
            progress(&name);
            let load = |device| {
                let options = CpuOptions { device, ..options };
                let backend = CpuBackend::new(table, &config(), &shape, &options)?;
                Decoder::load(backend, &weights, &shape, limits, &mut |_| {})
            };
            let mut default = load(DeviceChoice::Any)?;
            let mut locked = load(DeviceChoice::Class(device))?;
            for batch in &batches {
                let (expected, found) = (default.forward(batch), locked.forward(batch));
                let problem = difference(expected, found, shape.vocab_size);
                report.checks.push(Check {
                    kernels: chosen(batch).into_iter().collect(),
                    case: format!("{name}, {} rows", batch.num_rows()),
                    error: if problem.is_some() { f32::INFINITY } else { 0.0 },
                    problem,
                });
            }
        }
    }
    Ok(())
}

/// The kernels that serve a batch on `device`, and without a lock do not.
fn chosen(
    table: &KernelTable,
    device: &'static str,
    shape: &ModelShape,
    options: &CpuOptions,
    batch: &Batch,
) -> BTreeSet<String> {
    let of_device = |device| -> BTreeSet<String> {
        let target = options.target.expect("the caller names one");
        let choice = Choice { table, target, device };
        let kernels = |part| cpu_kernels(choice, shape, options, part, batch);
        PARTS.into_iter().flat_map(kernels).collect()
    };
    &of_device(Some(device)) - &of_device(None)
}

/// Where two tables of logits, `[num_rows, vocab]`, have other bits.
fn difference(expected: &[f32], found: &[f32], vocab_size: usize) -> Option<String> {
    assert_eq!(expected.len(), found.len(), "both computed the same rows");
    let mut pairs = expected.iter().zip(found);
    let idx = pairs.position(|(a, b)| a.to_bits() != b.to_bits())?;
    Some(format!(
        "logit {} of row {} is {:e}, the default kernels have {:e}",
        idx % vocab_size,
        idx / vocab_size,
        found[idx],
        expected[idx]
    ))
}
