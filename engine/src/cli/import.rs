//! `bespoke import`: models in other formats.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;

use super::console::Console;
use super::progress::Meter;
use crate::import::gguf;

/// Turn a model in another format into a model folder
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    format: Format,
}

#[derive(Subcommand)]
enum Format {
    /// Read a GGUF file
    ///
    /// Writes config.json, the tokenizer with its chat template, and the weights in float16. Reads
    /// F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K.
    #[command(after_help = "Example:\n  bespoke import gguf model.Q4_K.gguf -o my-model")]
    Gguf {
        /// GGUF file
        file: PathBuf,
        /// Folder to make; it must not be there yet
        #[arg(long, short, value_name = "DIR")]
        output: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Serialize)]
struct Report<'a> {
    file: &'a Path,
    output: &'a Path,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let Format::Gguf { file, output, json } = &args.format;
    let mut meter = Meter::new(console);
    gguf::import(file, output, &mut |progress| meter.show(progress))?;
    drop(meter);
    match json {
        true => console.print_json(&Report { file, output }),
        false => console.print(&format!("{}\n", output.display())),
    }
}
