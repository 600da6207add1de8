//! `bespoke verify`: every kernel of this binary against the reference backend.

use std::collections::BTreeSet;

use anyhow::bail;
use bespoke_kernel_gen::spec::ModelShape;
use clap::ValueEnum;
use serde::Serialize;

use super::console::Console;
use crate::backend::cpu::is_available;
use crate::kernels::generated;
use crate::verify::{self, Check, Report};

/// Run every kernel of this binary that the machine can run against the reference backend
///
/// One layer with random weights of each model that the binary was built for, at row counts and
/// sequence lengths around the kernels' limits. Exit code 1 on any mismatch.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Whose kernels; without it, those of the CPU, and of a GPU that this binary has kernels for
    #[arg(long, value_enum, default_value_t = Which::Auto)]
    backend: Which,
    /// Only the models whose names contain this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Auto,
    Cpu,
    Cuda,
}

/// The JSON of a run.
#[derive(Serialize)]
struct Summary {
    passed: bool,
    models: Vec<String>,
    /// The GPU whose kernels were verified.
    gpu: Option<String>,
    num_checks: usize,
    /// Kernels that took part.
    verified: Vec<String>,
    /// Kernels for this machine that no check ran.
    unverified: Vec<String>,
    /// Kernels for instruction sets or GPUs that this machine has not.
    num_skipped: usize,
    mismatches: Vec<Mismatch>,
    /// The checks that used up the most of what is allowed.
    closest: Vec<Mismatch>,
}

#[derive(Serialize)]
struct Mismatch {
    kernels: Vec<String>,
    case: String,
    /// As a share of what is allowed; null where it is no finite number.
    error: f32,
    problem: Option<String>,
}

/// How many of the closest checks are told.
const CLOSEST_MAX: usize = 5;

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let shapes = shapes(args.only.as_deref())?;
    let mut report = Report::default();
    let (mut expected, mut num_skipped) = (BTreeSet::new(), 0);
    if args.backend != Which::Cuda {
        // Candidates of a tuner serve nothing; it verifies them itself.
        for (kernel, _) in console.kernels.served() {
            match is_available(kernel.target) {
                true => _ = expected.insert(kernel.symbol.to_owned()),
                false => num_skipped += 1,
            }
        }
        let table = console.kernels;
        verify::cpu(&table, &shapes, &mut report, &mut |case| {
            console.report(&format!("verifying {case}\n"));
        })?;
    }
    let gpu = match args.backend {
        Which::Cpu => None,
        which => gpu(which, &shapes, &mut report, &mut expected, &mut num_skipped, console)?,
    };
    // NOTE: with some of the models left out, their kernels are as well.
    let unverified: Vec<String> = match args.only {
        Some(_) => Vec::new(),
        None => expected.difference(&report.kernels).cloned().collect(),
    };
    let summary = summary(&shapes, gpu, &report, unverified, num_skipped);
    match args.json {
        true => console.print_json(&summary)?,
        false => console.print(&text(&summary))?,
    }
    match summary.passed {
        true => Ok(()),
        false => bail!(
            "{} of {} checks failed, {} kernels were not verified",
            summary.mismatches.len(),
            summary.num_checks,
            summary.unverified.len()
        ),
    }
}

/// The models of this binary whose names contain `only`.
pub(super) fn shapes(only: Option<&str>) -> anyhow::Result<Vec<ModelShape>> {
    let all = generated::models();
    let names: Vec<String> = all.iter().map(|shape| shape.name.clone()).collect();
    let is_wanted = |shape: &ModelShape| only.is_none_or(|only| shape.name.contains(only));
    let wanted: Vec<ModelShape> = all.into_iter().filter(is_wanted).collect();
    if wanted.is_empty() {
        bail!(
            "no model of this binary has {:?} in its name; it was built for {}",
            only.unwrap_or_default(),
            names.join(", ")
        );
    }
    Ok(wanted)
}

#[cfg(not(feature = "cuda"))]
fn gpu(
    which: Which,
    _shapes: &[ModelShape],
    _report: &mut Report,
    _expected: &mut BTreeSet<String>,
    _num_skipped: &mut usize,
    _console: &mut Console<'_>,
) -> anyhow::Result<Option<String>> {
    match which {
        Which::Cuda => bail!(
            "this binary was built without CUDA; build it with `cargo build --release --features \
             cuda`, or verify with `--backend cpu`"
        ),
        _ => Ok(None),
    }
}

/// Verifies the kernels of a GPU; its name.
#[cfg(feature = "cuda")]
fn gpu(
    which: Which,
    shapes: &[ModelShape],
    report: &mut Report,
    expected: &mut BTreeSet<String>,
    num_skipped: &mut usize,
    console: &mut Console<'_>,
) -> anyhow::Result<Option<String>> {
    use crate::backend::cuda::device::Device as _;
    use crate::backend::cuda::driver::Driver;
    let table = generated::cuda_table();
    let info = match Driver::open(&table) {
        Ok(device) => Some(device.info().clone()),
        Err(error) if which == Which::Cuda => return Err(error.into()),
        Err(error) => {
            console.report(&format!("no GPU: {error}\n"));
            None
        }
    };
    for target in table.targets {
        match info.as_ref().is_some_and(|info| info.arch == target.arch) {
            true => expected.extend(target.kernels.iter().map(|kernel| kernel.symbol.to_owned())),
            false => *num_skipped += target.kernels.len(),
        }
    }
    let Some(info) = info else { return Ok(None) };
    verify::cuda(&mut || Driver::open(&table), shapes, report, &mut |case| {
        console.report(&format!("verifying {case} on {}\n", info.name));
    })?;
    Ok(Some(info.name))
}

fn summary(
    shapes: &[ModelShape],
    gpu: Option<String>,
    report: &Report,
    unverified: Vec<String>,
    num_skipped: usize,
) -> Summary {
    let told = |check: &Check| Mismatch {
        kernels: check.kernels.clone(),
        case: check.case.clone(),
        error: check.error,
        problem: check.problem.clone(),
    };
    let mismatches: Vec<Mismatch> = report.failures().map(told).collect();
    let mut passed: Vec<&Check> =
        report.checks.iter().filter(|check| check.problem.is_none()).collect();
    passed.sort_by(|a, b| b.error.total_cmp(&a.error));
    Summary {
        passed: mismatches.is_empty() && unverified.is_empty() && !report.checks.is_empty(),
        models: shapes.iter().map(|shape| shape.name.clone()).collect(),
        gpu,
        num_checks: report.checks.len(),
        verified: report.kernels.iter().cloned().collect(),
        unverified,
        num_skipped,
        mismatches,
        closest: passed.into_iter().take(CLOSEST_MAX).map(told).collect(),
    }
}

fn text(summary: &Summary) -> String {
    let mut text = String::new();
    for mismatch in &summary.mismatches {
        let problem = mismatch.problem.as_deref().unwrap_or_default();
        text.push_str(&format!(
            "MISMATCH {}\n  {}\n  {problem}\n",
            mismatch.kernels.join(", "),
            mismatch.case
        ));
    }
    for symbol in &summary.unverified {
        text.push_str(&format!("NOT VERIFIED {symbol}\n"));
    }
    if let Some(closest) = summary.closest.first() {
        text.push_str(&format!(
            "largest error: {:.0} % of what is allowed, {}\n",
            100.0 * closest.error,
            closest.case
        ));
    }
    text.push_str(&format!(
        "{} kernels verified in {} checks, {} mismatches, {} kernels are for other machines\n",
        summary.verified.len(),
        summary.num_checks,
        summary.mismatches.len(),
        summary.num_skipped
    ));
    text
}
