//! `bespoke quantize`: 4-bit weights.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{GroupSize, ModelShape};
use clap::ValueEnum;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde::Serialize;

use super::console::Console;
use super::model::parse_threads;
use super::progress::Meter;
use crate::config::BackendChoice;
use crate::files::{IfExists, human_bytes};
use crate::memory;
use crate::quantize::calibration::{CalibrationOptions, TextSource};
use crate::quantize::layer_pass::PassOptions;
use crate::quantize::quantized_layer::AwqOptions;
use crate::quantize::report::{
    CalibrationReport, ErrorReport, PerplexityReport, QuantizationReport, SizeReport,
};
use crate::quantize::{self, AwqJob, PerplexityOf, RtnOptions, SHARD_BYTES_MAX};

/// Quantize a model to 4 bits
///
/// Writes a new model folder in the AWQ "gemm" format: 4-bit weights with a float16 scale and a
/// 4-bit zero per group of input weights. The methods awq and awq+ look at the model's activations
/// on a text, and leave a report in the folder (quantization.html, quantization.json). What is
/// interrupted goes on where it ended when the same command is run again.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    bespoke quantize smollm2-135m -o smollm2-int4 --group-size 64\n  \
    bespoke quantize my-model -o my-int4 --method awq+ --calibration my-chats.jsonl")]
pub(super) struct Args {
    /// Model folder, name of a cached model, or preset
    model: String,
    /// Folder to make; without --overwrite it must not be there yet
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Replace the folder if it is there; it stays whole until the new one is
    #[arg(long)]
    overwrite: bool,
    /// How the 4-bit values are chosen
    #[arg(long, value_enum, default_value_t = Method::Awq)]
    method: Method,
    /// Weights that share a scale; it must divide the input size of every linear [default: the
    /// largest that does]
    #[arg(long, value_enum)]
    group_size: Option<Group>,
    /// Leave modules in 16 bits whose name has these dotted parts, such as down_proj or layers.0
    /// (repeatable)
    #[arg(long, value_name = "PATTERN")]
    skip: Vec<String>,
    /// Largest safetensors file, such as 5G or 500M
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "5G")]
    shard_size: u64,
    #[command(flatten)]
    awq: AwqArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What the methods with a text take.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Options of awq and awq+")]
struct AwqArgs {
    /// Text to calibrate on: UTF-8, or JSON lines with a string, "text" or "messages" each
    /// [default: an excerpt of WikiText-2]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Samples that are taken from the text, as far as it has them
    #[arg(long, value_name = "N", default_value_t = CalibrationOptions::default().num_samples)]
    samples: usize,
    /// Tokens of a sample
    #[arg(long, value_name = "N", default_value_t = CalibrationOptions::default().sample_len)]
    seqlen: usize,
    /// Levels lie evenly around zero
    #[arg(long)]
    symmetric: bool,
    /// Leave the linears with the largest errors in 16 bits, as long as a weight has no more bits
    /// than this on average
    #[arg(long, value_name = "BITS")]
    max_bits_per_weight: Option<f64>,
    /// Measure the perplexity on this text, instead of the parts of the calibration text that are
    /// no samples
    #[arg(long, value_name = "FILE", conflicts_with = "no_report_perplexity")]
    report_perplexity: Option<PathBuf>,
    /// Measure no perplexity
    #[arg(long)]
    no_report_perplexity: bool,
    /// Keep activations in files of this folder instead of memory
    #[arg(long, value_name = "DIR")]
    spill: Option<PathBuf>,
    /// Where to compute; `reference` runs any shape, slowly
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    backend: Backend,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// Scales and clipping that keep outputs close, then each weight to the nearest value
    Awq,
    /// As awq, and each weight makes up for the errors of those before it
    #[value(name = "awq+")]
    AwqPlus,
    /// Each weight to the nearest value, without a text
    Rtn,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    #[value(name = "32")]
    Of32,
    #[value(name = "64")]
    Of64,
    #[value(name = "128")]
    Of128,
    /// One scale per output
    Channel,
}

/// The backends that can be looked into.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    /// The fastest one that has kernels for the model
    Auto,
    /// Plain loops in float32, any shape
    Reference,
    /// Kernels generated for the model's shapes, on the CPU
    Cpu,
    /// Kernels generated for the model's shapes, on an NVIDIA GPU
    Cuda,
}

impl Group {
    fn size(self) -> GroupSize {
        match self {
            Group::Of32 => GroupSize::Of(32),
            Group::Of64 => GroupSize::Of(64),
            Group::Of128 => GroupSize::Of(128),
            Group::Channel => GroupSize::Channel,
        }
    }
}

impl Backend {
    fn choice(self) -> BackendChoice {
        match self {
            Backend::Auto => BackendChoice::Auto,
            Backend::Reference => BackendChoice::Reference,
            Backend::Cpu => BackendChoice::Cpu,
            Backend::Cuda => BackendChoice::Cuda,
        }
    }
}

/// `5G`, `500M`, or bytes.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 1_000),
        Some(b'M') => (&text[..text.len() - 1], 1_000_000),
        Some(b'G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    match bytes {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("expected bytes such as 500M or 5G".to_owned()),
    }
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    output: &'a Path,
    method: &'a str,
    group_size: &'a str,
    #[serde(flatten)]
    awq: Option<AwqReport<'a>>,
}

/// `quantization.json` without its layers.
#[derive(Serialize)]
struct AwqReport<'a> {
    symmetric: bool,
    calibration: &'a CalibrationReport,
    bits_per_weight: f64,
    modules_not_converted: &'a [String],
    bytes: SizeReport,
    error: ErrorReport,
    perplexity: Option<&'a PerplexityReport>,
    perplexity_note: Option<&'a str>,
    num_layers: usize,
    num_layers_resumed: usize,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let model = console.resolve(&args.model)?;
    let group_size = match args.group_size {
        Some(group) => group.size(),
        None => default_group_size(&model)?,
    };
    let if_exists = if args.overwrite { IfExists::Replace } else { IfExists::Refuse };
    match args.method {
        Method::Rtn => run_rtn(args, &model, group_size, if_exists, console),
        Method::Awq | Method::AwqPlus => run_awq(args, &model, group_size, if_exists, console),
    }
}

fn run_rtn(
    args: &Args,
    model: &Path,
    group_size: GroupSize,
    if_exists: IfExists,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    if args.awq.max_bits_per_weight.is_some() {
        bail!(
            "--max-bits-per-weight needs the errors of the linears, which --method rtn does not \
             measure; use --method awq, or --skip"
        );
    }
    let (skip, shard_bytes_max) = (args.skip.clone(), args.shard_size);
    let options = RtnOptions { group_size, skip, shard_bytes_max, if_exists };
    let mut meter = Meter::new(console);
    quantize::rtn(model, &args.output, &options, &mut |progress| meter.show(progress))?;
    drop(meter);
    let (group_size, output) = (group_size.to_string(), args.output.display());
    match args.json {
        true => print_json(args, "rtn", &group_size, None, console),
        false => console.print(&format!("{output}: 4-bit weights, group size {group_size}\n")),
    }
}

fn run_awq(
    args: &Args,
    model: &Path,
    group_size: GroupSize,
    if_exists: IfExists,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let AwqArgs { samples, seqlen, symmetric, max_bits_per_weight, .. } = args.awq;
    let text = |file: &Option<PathBuf>| file.clone().map_or(TextSource::Shipped, TextSource::File);
    let job = AwqJob {
        options: AwqOptions {
            group_size,
            symmetric,
            compensate: args.method == Method::AwqPlus,
            skip: args.skip.clone(),
        },
        pass: PassOptions {
            kernels: console.kernels,
            backend: args.awq.backend.choice(),
            num_threads: args.awq.threads,
            target: None,
            spill: args.awq.spill.clone(),
        },
        calibration: CalibrationOptions {
            text: text(&args.awq.calibration),
            num_samples: samples,
            sample_len: seqlen,
        },
        bits_max: max_bits_per_weight,
        shard_bytes_max: args.shard_size,
        perplexity: match &args.awq.report_perplexity {
            Some(file) => PerplexityOf::Text(TextSource::File(file.clone())),
            None if args.awq.no_report_perplexity => PerplexityOf::Nothing,
            None => PerplexityOf::HeldOut,
        },
        if_exists,
    };
    let report = awq(model, &args.output, &job, console)?;
    let wanted = &job.calibration;
    if report.calibration.num_samples < wanted.num_samples {
        console.report(&format!(
            "note: the text has {} samples of {seqlen} tokens, fewer than the {} of --samples\n",
            report.calibration.num_samples, wanted.num_samples
        ));
    }
    match args.json {
        true => print_json(args, &report.method, &report.group_size, Some(&report), console),
        false => console.print(&table(&report, &args.output)),
    }
}

/// Quantizes with a progress bar.
pub(super) fn awq(
    model: &Path,
    output: &Path,
    job: &AwqJob,
    console: &mut Console<'_>,
) -> anyhow::Result<QuantizationReport> {
    let mut meter = Meter::new(console);
    Ok(quantize::awq(model, output, job, &mut |progress| meter.show(progress))?)
}

/// What is asked for where only the group size, the text's samples and the place to compute are
/// told: the shipped text, and no perplexity.
pub(super) fn quick_job(
    group_size: GroupSize,
    num_samples: usize,
    backend: BackendChoice,
    num_threads: Option<usize>,
    console: &Console<'_>,
) -> AwqJob {
    AwqJob {
        options: AwqOptions { group_size, symmetric: false, compensate: false, skip: Vec::new() },
        pass: PassOptions {
            kernels: console.kernels,
            backend,
            num_threads,
            target: None,
            spill: None,
        },
        calibration: CalibrationOptions { num_samples, ..CalibrationOptions::default() },
        bits_max: None,
        shard_bytes_max: SHARD_BYTES_MAX,
        perplexity: PerplexityOf::Nothing,
        if_exists: IfExists::Refuse,
    }
}

fn print_json(
    args: &Args,
    method: &str,
    group_size: &str,
    report: Option<&QuantizationReport>,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let awq = report.map(|report| AwqReport {
        symmetric: report.symmetric,
        calibration: &report.calibration,
        bits_per_weight: report.bits_per_weight,
        modules_not_converted: &report.modules_not_converted,
        bytes: report.bytes,
        error: report.error,
        perplexity: report.perplexity.as_ref(),
        perplexity_note: report.perplexity_note.as_deref(),
        num_layers: report.layers.len(),
        num_layers_resumed: report.num_layers_resumed,
        seconds: report.seconds,
        peak_rss_bytes: memory::peak_rss_bytes(),
    });
    let (model, output) = (&args.model, &args.output);
    console.print_json(&Report { model, output, method, group_size, awq })
}

fn table(report: &QuantizationReport, output: &Path) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["", "before", "rounded to nearest", &report.method]);
    let bits = format!("{:.3}", report.bits_per_weight);
    let (before, after) = (human_bytes(report.bytes.before), human_bytes(report.bytes.after));
    table.add_row(["weights", &before, "", &after]);
    table.add_row(["bits per weight", "", "", &bits]);
    let error = |error: f64| format!("{error:.5}");
    let ErrorReport { rtn, written, .. } = report.error;
    table.add_row(["mean output error", "", &error(rtn), &error(written)]);
    if let Some(PerplexityReport { before, after, .. }) = &report.perplexity {
        table.add_row(["perplexity", &format!("{before:.2}"), "", &format!("{after:.2}")]);
    }
    let mut text = format!("{table}\n");
    if let Some(perplexity) = &report.perplexity {
        text.push_str(&format!("Perplexity on {}.\n", perplexity.text));
    }
    if let Some(note) = &report.perplexity_note {
        text.push_str(&format!("No perplexity: {note}.\n"));
    }
    if !report.modules_not_converted.is_empty() {
        text.push_str(&format!("{} modules keep 16 bits.\n", report.modules_not_converted.len()));
    }
    let memory = memory::peak_rss_bytes()
        .map_or(String::new(), |bytes| format!(", {} of memory at most", human_bytes(bytes)));
    let resumed = match report.num_layers_resumed {
        0 => String::new(),
        num => format!(" behind {num} layers that were finished"),
    };
    text.push_str(&format!("{:.0} s{resumed}{memory}.\n", report.seconds));
    text.push_str(&format!("{0}\nReport: {0}/quantization.html\n", output.display()));
    text
}

/// The largest usual group that divides the input size of every linear.
fn default_group_size(model: &Path) -> anyhow::Result<GroupSize> {
    let config = ModelConfig::from_file(&model.join("config.json"))
        .with_context(|| model.display().to_string())?;
    let shape = config.shape("model")?;
    let groups = [GroupSize::Of(128), GroupSize::Of(64), GroupSize::Of(32)];
    Ok(groups.into_iter().find(|group| divides(*group, &shape)).unwrap_or(GroupSize::Channel))
}

fn divides(group: GroupSize, shape: &ModelShape) -> bool {
    let linears = [shape.qkv, shape.o, shape.gate_up, shape.down];
    linears.iter().all(|linear| linear.k.is_multiple_of(group.of(linear.k)))
}
