//! `bespoke explain`: which kernel serves which layer at which row count, and why.

use bespoke_kernel_gen::cuda;
use bespoke_kernel_gen::name::spec_name;
use bespoke_kernel_gen::spec::ModelShape;
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::coverage::{Place, places};
use bespoke_kernel_gen::tuning::explain::Explanation;
use bespoke_kernel_gen::tuning::lock::{Lock, LockedInterval};
use clap::builder::RangedU64ValueParser;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use super::console::Console;
use super::model::{Activations, Kv, parse_threads, shape_of};
use crate::backend::cpu::{available_threads, best_target, device_key};
use crate::kernels::choice::{Choice, Chosen, DeviceChoice};
use crate::kernels::generated;

/// Tell which kernel serves which layer, and why
///
/// Times are those of the lock that the binary was built with, in microseconds; a kernel that
/// serves by default has none. For attention, one row means decoding.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Model folder, name of a cached model, preset, or a model that the binary was built for
    #[arg(value_name = "MODEL")]
    model: String,
    /// Only what serves so many rows
    #[arg(long, value_name = "N", value_parser = parse_rows())]
    rows: Option<usize>,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value_t = Kv::F16)]
    kv_dtype: Kv,
    /// What weights are multiplied with; int8 is for 4-bit weights, and others ignore it
    #[arg(long, value_enum, default_value_t = Activations::Int8)]
    activations: Activations,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    target: &'static str,
    /// Key of this machine's device class.
    device: String,
    kernels: Vec<Row>,
}

/// An op of some layers, and what serves it in an interval of row counts.
#[derive(Clone, Serialize)]
struct Row {
    layers: String,
    op: &'static str,
    spec: String,
    #[serde(flatten)]
    why: Explanation,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let shape = shape_of(&args.model, console)?;
    let target = best_target(&console.kernels).unwrap_or(Target::Portable);
    let num_threads = args.threads.unwrap_or_else(available_threads);
    let device = device_key(DeviceChoice::This, target, num_threads).unwrap_or_default();
    let lock = match console.kernels.lock {
        "" => Lock::default(),
        text => Lock::parse(text)?,
    };
    let choice = Choice { table: &console.kernels, target, device: Some(&device) };
    let places = places(&shape, args.activations.choice(), args.kv_dtype.choice())?;
    let mut kernels: Vec<Row> =
        places.iter().flat_map(|place| rows(place, choice, &lock)).collect();
    kernels.extend(cuda_rows(&shape)?);
    if let Some(num_rows) = args.rows {
        let serves = |row: &Row| {
            let Explanation { rows_min, rows_max, .. } = row.why;
            rows_min <= num_rows && rows_max.is_none_or(|rows_max| num_rows <= rows_max)
        };
        kernels.retain(serves);
    }
    let report = Report { model: shape.name.clone(), target: target.name(), device, kernels };
    match args.json {
        true => console.print_json(&report),
        false => console.print(&text(&report)),
    }
}

fn parse_rows() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1 << 20)
}

/// What serves a place, an interval each.
fn rows(place: &Place, choice: Choice<'_>, lock: &Lock) -> Vec<Row> {
    let spec = spec_name(&place.spec);
    let row = |why: Explanation| Row {
        layers: place.layers.clone(),
        op: place.op,
        spec: spec.clone(),
        why,
    };
    let Some(chosen) = choice.serving(&place.spec) else {
        return vec![row(Explanation::missing())];
    };
    let mut rows_min = 1;
    let mut rows = Vec::new();
    for (idx, interval) in chosen.serving.intervals.iter().enumerate() {
        let rows_max = (interval.rows_max != usize::MAX).then_some(interval.rows_max);
        let (symbol, provenance) = (interval.symbol.to_owned(), chosen.provenance(interval));
        let plain = Explanation::unmeasured(rows_min, rows_max, symbol, provenance);
        // NOTE: a kernel that is pinned is not the lock's.
        rows.push(row(match locked(lock, &spec, choice.target, chosen, idx) {
            Some((fact, device)) if fact.symbol == interval.symbol => {
                plain.with_times(fact, device)
            }
            _ => plain,
        }));
        rows_min = interval.rows_max.saturating_add(1);
    }
    rows
}

/// What the lock says about an interval of a serving, and the device that it was chosen on.
fn locked<'a>(
    lock: &'a Lock,
    spec: &str,
    target: Target,
    chosen: Chosen,
    interval_idx: usize,
) -> Option<(&'a LockedInterval, &'static str)> {
    let device = chosen.serving.device?;
    let problem = lock.problem(spec, target.name(), device)?;
    Some((problem.intervals.get(interval_idx)?, device))
}

/// The model's kernels for the GPUs that this binary was built for, where it was for any: those for
/// any of an architecture, and what was chosen on some.
fn cuda_rows(shape: &ModelShape) -> anyhow::Result<Vec<Row>> {
    let table = generated::cuda_table();
    let mut servings = Vec::new();
    for arch in table.archs() {
        for spec in shape.cuda_specs()? {
            servings.push(cuda::Serving::default_for(&spec, arch));
            let is_of_spec = |one: &cuda::Serving| one.spec == spec && one.arch == arch;
            servings.extend(table.servings().filter(is_of_spec));
        }
    }
    let rows = servings.iter().flat_map(|serving| {
        let row = |why| Row {
            layers: "model".to_owned(),
            op: serving.spec.op(),
            spec: serving.spec.name(),
            why,
        };
        serving.explanations().into_iter().map(row)
    });
    Ok(rows.collect())
}

fn text(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["layers", "op", "rows", "kernel", "from", "us", "default", "runner-up"]);
    for Row { layers, op, spec, why } in &report.kernels {
        let us = |us: Option<f64>| us.map_or("-".to_owned(), |us| format!("{us:.1}"));
        let runner_up = match (&why.runner_up, why.margin) {
            (Some(symbol), Some(margin)) => format!("{symbol} ({:+.1} %)", 100.0 * margin),
            (Some(symbol), None) => symbol.clone(),
            _ => "-".to_owned(),
        };
        table.add_row([
            layers.clone(),
            (*op).to_owned(),
            why.rows(),
            why.symbol.clone().unwrap_or_else(|| format!("{spec}: no kernel")),
            why.provenance.to_owned(),
            us(why.us),
            us(why.default_us),
            runner_up,
        ]);
    }
    format!("{} on {} ({})\n{}\n", report.model, report.target, report.device, table.trim_fmt())
}
