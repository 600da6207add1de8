//! `bespoke export`: models in other formats.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use serde::Serialize;

use super::console::Console;
use super::progress::Meter;
use crate::export::gguf::{self, ExportOptions, HeadFormat, LinearFormat, Summary};
use crate::files::{IfExists, human_bytes};

/// Turn a model folder into a file of another format
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    format: Format,
}

#[derive(Subcommand)]
enum Format {
    Gguf(GgufArgs),
}

/// Write a GGUF file, as llama.cpp reads it
///
/// Takes Llama, Mistral, Qwen2, Qwen3, InternLM2 and Phi-3 models with a byte-level tokenizer.
/// Weights in 16 and 32 bits stay as they are, 4-bit ones become Q4_1 or Q5_0.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bespoke export gguf my-model-int4 -o my-model.gguf")]
struct GgufArgs {
    /// Model folder, name of a cached model, or preset
    model: String,
    /// File to write; without --overwrite it must not be there yet
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Replace the file if it is there; it stays whole until the new one is
    #[arg(long)]
    overwrite: bool,
    /// What 4-bit weights become
    #[arg(long, value_enum, default_value_t = Linears::Q4_1)]
    weights: Linears,
    /// What embedding and language-model head become
    #[arg(long, value_enum, default_value_t = Head::Keep)]
    head: Head,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Linears {
    /// 5 bits a weight; the minimum of each group is rounded to float16
    #[value(name = "q4_1")]
    Q4_1,
    /// 5.5 bits a weight, exact
    #[value(name = "q5_0")]
    Q5_0,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Head {
    /// As they are in the folder
    Keep,
    F16,
    /// 8.5 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    output: &'a Path,
    bytes: u64,
    tensors: usize,
    /// Groups of 4-bit weights, those whose minimum was rounded, and the largest error of one in
    /// steps of its group.
    groups: u64,
    rounded_groups: u64,
    error_max_steps: f64,
    notes: &'a [String],
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let Format::Gguf(args) = &args.format;
    let model = console.resolve(&args.model)?;
    let options = ExportOptions {
        linears: match args.weights {
            Linears::Q4_1 => LinearFormat::Q4_1,
            Linears::Q5_0 => LinearFormat::Q5_0,
        },
        head: match args.head {
            Head::Keep => HeadFormat::AsStored,
            Head::F16 => HeadFormat::F16,
            Head::Q8_0 => HeadFormat::Q8_0,
        },
        if_exists: if args.overwrite { IfExists::Replace } else { IfExists::Refuse },
    };
    let mut meter = Meter::new(console);
    let summary =
        gguf::export(&model, &args.output, &options, &mut |progress| meter.show(progress))?;
    drop(meter);
    if !args.json {
        return console.print(&text(&args.output, &summary));
    }
    let rounding = summary.rounding.unwrap_or_default();
    console.print_json(&Report {
        model: &args.model,
        output: &args.output,
        bytes: summary.num_bytes,
        tensors: summary.num_tensors,
        groups: rounding.num_groups,
        rounded_groups: rounding.num_rounded,
        error_max_steps: rounding.error_max,
        notes: &summary.notes,
    })
}

fn text(output: &Path, summary: &Summary) -> String {
    let Summary { num_tensors, num_bytes, rounding, notes } = summary;
    let mut text =
        format!("{}: {num_tensors} tensors, {}\n", output.display(), human_bytes(*num_bytes));
    // Writing to a string cannot fail.
    let _ = match rounding {
        None => Ok(()),
        Some(rounding) if rounding.num_rounded == 0 => {
            writeln!(text, "all {} groups of 4-bit weights are exact", rounding.num_groups)
        }
        Some(rounding) => writeln!(
            text,
            "{} of {} groups of 4-bit weights have a minimum that float16 rounds, by {:.4} of a \
             step at most; --weights q5_0 is exact",
            rounding.num_rounded, rounding.num_groups, rounding.error_max
        ),
    };
    for note in notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}
