//! `bespoke quantize`: 4-bit weights.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{GroupSize, ModelShape};
use clap::ValueEnum;
use serde::Serialize;

use super::console::Console;
use super::progress::Meter;
use crate::files::IfExists;
use crate::quantize::{self, RtnOptions};

/// Quantize a model to 4 bits
///
/// Writes a new model folder in the AWQ "gemm" format: 4-bit weights with a float16 scale and a
/// 4-bit zero per group of input weights.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  \
    bespoke quantize smollm2-135m -o smollm2-int4 --group-size 64")]
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
    #[arg(long, value_enum, default_value_t = Method::Rtn)]
    method: Method,
    /// Weights that share a scale; it must divide the input size of every linear [default: the
    /// largest that does]
    #[arg(long, value_enum)]
    group_size: Option<Group>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Method {
    /// Each weight to the nearest value
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

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    output: &'a Path,
    method: &'a str,
    group_size: String,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let Method::Rtn = args.method;
    let model = console.resolve(&args.model)?;
    let group_size = match args.group_size {
        Some(group) => group.size(),
        None => default_group_size(&model)?,
    };
    let if_exists = if args.overwrite { IfExists::Replace } else { IfExists::Refuse };
    rtn(&model, &args.output, &RtnOptions { group_size, if_exists }, console)?;
    let group_size = group_size.to_string();
    match args.json {
        true => console.print_json(&Report {
            model: &args.model,
            output: &args.output,
            method: "rtn",
            group_size,
        }),
        false => console
            .print(&format!("{}: 4-bit weights, group size {group_size}\n", args.output.display())),
    }
}

/// Rounds the model in the folder `model` to the nearest 4-bit values.
pub(super) fn rtn(
    model: &Path,
    output: &Path,
    options: &RtnOptions,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let mut meter = Meter::new(console);
    Ok(quantize::rtn(model, output, options, &mut |progress| meter.show(progress))?)
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
