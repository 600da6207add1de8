//! `bespoke pack-weights`: hidden; what `bespoke build` runs to embed weights.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use bespoke_kernel_gen::target::Target;

use super::console::Console;
use crate::config::{BackendChoice, EngineOptions};
use crate::engine::Engine;
use crate::files::write_error;
use crate::packed;
use crate::source::ModelSource;

/// Write a model's weights as this program's kernels read them
#[derive(clap::Args)]
pub(super) struct Args {
    /// Model folder
    dir: PathBuf,
    /// File to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Instruction set to pack for
    #[arg(long, value_parser = parse_target)]
    target: Target,
}

fn parse_target(text: &str) -> Result<Target, String> {
    Target::from_name(text)
        .ok_or_else(|| format!("expected one of {}", Target::ALL.map(Target::name).join(", ")))
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let options = EngineOptions {
        backend: BackendChoice::Cpu,
        target: Some(args.target),
        max_sequences: 1,
        max_batch_tokens: 1,
        max_context: Some(2),
        ..EngineOptions::new(console.kernels)
    };
    let source = ModelSource::folder(&args.dir);
    let engine = Engine::load_from(&source, &options, &mut |_| {})?;
    let decoder = engine.cpu_decoder().context("the model is not on the CPU")?;
    let needed = packed::packed_bytes(decoder);
    let fail = |error| write_error(&args.output, needed, error);
    let file = File::create_new(&args.output).map_err(fail)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    packed::write(decoder, engine.weights_name(), &mut out)
        .and_then(|_| out.flush())
        .map_err(fail)?;
    Ok(())
}
