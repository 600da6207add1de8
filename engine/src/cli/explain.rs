//! `bespoke explain`: which kernel serves which layer at which row count, and why.

use bespoke_kernel_gen::cuda;
use bespoke_kernel_gen::name::spec_name;
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{
    ActivationType, KernelSpec, KvDType, LinearRole, ModelShape, RowFormat,
};
use bespoke_kernel_gen::target::Target;
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
    /// What 4-bit weights are multiplied with
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
    rows_min: usize,
    /// Null: no limit.
    rows_max: Option<usize>,
    /// Null where this binary has no kernel for it.
    symbol: Option<String>,
    provenance: &'static str,
    /// Device class that the choice was made on, null for any.
    chosen_on: Option<&'static str>,
    us: Option<f64>,
    default_us: Option<f64>,
    runner_up: Option<String>,
    runner_up_us: Option<f64>,
    /// By how much the runner-up takes longer, as a share.
    margin: Option<f64>,
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
    let ops = ops(&shape, args.activations.choice(), args.kv_dtype.choice())?;
    let mut kernels: Vec<Row> = ops.iter().flat_map(|op| rows(op, choice, &lock)).collect();
    kernels.extend(cuda_rows(&shape)?);
    if let Some(num_rows) = args.rows {
        let serves = |row: &Row| {
            row.rows_min <= num_rows && row.rows_max.is_none_or(|rows_max| num_rows <= rows_max)
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

/// An op, where it is, and what it computes.
struct Op {
    layers: String,
    name: &'static str,
    spec: KernelSpec,
}

/// All ops of a model in their order; those of layers once for all layers that have the same.
fn ops(shape: &ModelShape, activation: ActivationType, kv: KvDType) -> anyhow::Result<Vec<Op>> {
    let all = layers_text(0, shape.num_layers);
    let hidden = shape.hidden_size;
    let mut ops = Vec::new();
    let mut add = |layers: &str, name, spec| ops.push(Op { layers: layers.to_owned(), name, spec });
    let norm = |out| KernelSpec::RmsNorm { hidden, out };
    add("model", "embed", KernelSpec::Embed { hidden, dtype: shape.dtype });
    for role in [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down] {
        let groups = groups(shape, role, activation)?;
        for (layers, rows, _) in &groups {
            match (role, rows) {
                (LinearRole::Qkv | LinearRole::GateUp, rows) => {
                    add(layers, "rms_norm", norm(*rows));
                }
                (LinearRole::Down, rows) => {
                    let intermediate = shape.intermediate_size;
                    let spec = KernelSpec::SiluAndMul { intermediate, out: *rows };
                    add(layers, "silu_and_mul", spec);
                }
                (_, RowFormat::I8 { group }) => {
                    add(layers, "quantize", KernelSpec::Quantize { k: shape.o.k, group: *group });
                }
                _ => {}
            }
        }
        groups.into_iter().for_each(|(layers, _, spec)| add(&layers, role.name(), spec));
        if role == LinearRole::Qkv {
            add(&all, "rope", shape.rope_kernel(kv));
            add(&all, "attention", shape.paged_attention_kernel(kv));
        }
    }
    add("model", "rms_norm", norm(shape.linear_rows(LinearRole::Head, activation)));
    add("model", "head", shape.linear_kernel(LinearRole::Head, activation)?);
    add("model", "sample", KernelSpec::Sample { vocab: shape.vocab_size });
    Ok(ops)
}

/// Runs of layers with the same linear, the form of its rows, and its spec.
fn groups(
    shape: &ModelShape,
    role: LinearRole,
    activation: ActivationType,
) -> anyhow::Result<Vec<(String, RowFormat, KernelSpec)>> {
    let mut groups = Vec::new();
    let mut first = 0;
    for layer_idx in 0..shape.num_layers {
        let linear = shape.linear_in(role, layer_idx);
        let end = layer_idx + 1;
        if end < shape.num_layers && shape.linear_in(role, end) == linear {
            continue;
        }
        let rows = linear.row_format(activation);
        groups.push((layers_text(first, end), rows, linear.kernel(activation)?));
        first = end;
    }
    Ok(groups)
}

/// Layers `first..end` in words.
fn layers_text(first: usize, end: usize) -> String {
    match end - first {
        1 => format!("layer {first}"),
        _ => format!("layers {first}-{}", end.saturating_sub(1)),
    }
}

/// What serves an op, an interval each.
fn rows(op: &Op, choice: Choice<'_>, lock: &Lock) -> Vec<Row> {
    let spec = spec_name(&op.spec);
    let row = |rows_min, rows_max, symbol, provenance| Row {
        layers: op.layers.clone(),
        op: op.name,
        spec: spec.clone(),
        rows_min,
        rows_max,
        symbol,
        provenance,
        chosen_on: None,
        us: None,
        default_us: None,
        runner_up: None,
        runner_up_us: None,
        margin: None,
    };
    let Some(chosen) = choice.serving(&op.spec) else { return vec![row(1, None, None, "missing")] };
    let mut rows_min = 1;
    let mut rows = Vec::new();
    for (idx, interval) in chosen.serving.intervals.iter().enumerate() {
        let rows_max = (interval.rows_max != usize::MAX).then_some(interval.rows_max);
        let provenance = chosen.provenance(interval);
        let row = row(rows_min, rows_max, Some(interval.symbol.to_owned()), provenance.name());
        rows.push(match locked(lock, &spec, choice.target, chosen, idx) {
            Some(fact) if fact.symbol == interval.symbol => with_times(row, chosen, fact),
            _ => row,
        });
        rows_min = interval.rows_max.saturating_add(1);
    }
    rows
}

/// What the lock says about an interval of a serving.
fn locked<'a>(
    lock: &'a Lock,
    spec: &str,
    target: Target,
    chosen: Chosen,
    interval_idx: usize,
) -> Option<&'a LockedInterval> {
    let device = chosen.serving.device?;
    let problem = lock.problems.iter().find(|problem| {
        problem.spec == spec && problem.target == target.name() && problem.device == device
    })?;
    problem.intervals.get(interval_idx)
}

fn with_times(row: Row, chosen: Chosen, fact: &LockedInterval) -> Row {
    let margin = fact.runner_up.as_ref().map(|_| fact.margin);
    Row {
        chosen_on: chosen.serving.device,
        us: Some(fact.us),
        default_us: Some(fact.default_us),
        runner_up: fact.runner_up.clone(),
        runner_up_us: fact.runner_up_us,
        margin,
        ..row
    }
}

/// The model's kernels for the GPUs that this binary was built for, where it was for any.
fn cuda_rows(shape: &ModelShape) -> anyhow::Result<Vec<Row>> {
    let archs = generated::cuda_table().archs();
    let variants = match archs.is_empty() {
        true => Vec::new(),
        false => cuda::plan::plan(std::slice::from_ref(shape), &archs)?,
    };
    let row = |variant: &cuda::Variant| Row {
        layers: "model".to_owned(),
        op: variant.spec().op(),
        spec: variant.symbol().split("__").next().unwrap_or_default().to_owned(),
        rows_min: variant.regime.rows_min(),
        rows_max: variant.regime.rows_max(),
        symbol: Some(variant.symbol()),
        provenance: Provenance::Default.name(),
        chosen_on: None,
        us: None,
        default_us: None,
        runner_up: None,
        runner_up_us: None,
        margin: None,
    };
    Ok(variants.iter().map(row).collect())
}

fn text(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["layers", "op", "rows", "kernel", "from", "us", "default", "runner-up"]);
    for row in &report.kernels {
        let rows = match row.rows_max {
            Some(rows_max) if rows_max == row.rows_min => rows_max.to_string(),
            Some(rows_max) => format!("{}-{rows_max}", row.rows_min),
            None => format!("{}-", row.rows_min),
        };
        let us = |us: Option<f64>| us.map_or("-".to_owned(), |us| format!("{us:.1}"));
        let runner_up = match (&row.runner_up, row.margin) {
            (Some(symbol), Some(margin)) => format!("{symbol} (+{:.1} %)", 100.0 * margin),
            (Some(symbol), None) => symbol.clone(),
            _ => "-".to_owned(),
        };
        table.add_row([
            row.layers.clone(),
            row.op.to_owned(),
            rows,
            row.symbol.clone().unwrap_or_else(|| format!("{}: no kernel", row.spec)),
            row.provenance.to_owned(),
            us(row.us),
            us(row.default_us),
            runner_up,
        ]);
    }
    format!("{} on {} ({})\n{}\n", report.model, report.target, report.device, table.trim_fmt())
}
