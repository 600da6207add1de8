//! `bespoke perplexity`: how well a model predicts a text.

use std::path::PathBuf;

use serde::Serialize;

use super::console::Console;
use super::model::{ModelArgs, ModelFiles, RunArgs};
use super::progress::Meter;
use super::prompt::read_text;
use crate::engine::Engine;
use crate::perplexity::{self, Perplexity};
use crate::tokenizer::SpecialTokens;

/// Measure the perplexity of a model on a text
///
/// Follows llama.cpp: the text without BOS is cut into chunks, and the second half of each is
/// scored. Lower is better; numbers compare only on the same text with the same tokenizer.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bespoke perplexity --model smollm2-135m --file text.txt")]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// UTF-8 text
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a chunk
    #[arg(long, value_name = "N", default_value_t = CTX)]
    ctx: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Tokens of a chunk unless told otherwise.
pub(super) const CTX: usize = 512;

#[derive(Serialize)]
struct Report {
    ppl: f64,
    tokens_scored: usize,
    chunks: usize,
    nll_sum: f64,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let files = ModelFiles::open(&args.model.model, console)?;
    let ids = text_ids(&files, &args.file)?;
    let mut engine = load(&files, &args.model.run, args.ctx, console)?;
    let result = measure(&mut engine, &ids, args.ctx, console)?;
    let Perplexity { ppl, tokens_scored, chunks, nll_sum } = result;
    match args.json {
        true => console.print_json(&Report { ppl, tokens_scored, chunks, nll_sum }),
        false => console.print(&format!(
            "perplexity {ppl:.4} ({tokens_scored} tokens scored in {chunks} chunks of {})\n",
            args.ctx
        )),
    }
}

fn load(
    files: &ModelFiles,
    run: &RunArgs,
    ctx: usize,
    console: &mut Console<'_>,
) -> anyhow::Result<Engine> {
    Ok(files.load(run, ctx, console)?.0)
}

/// The tokens of a text file, without a BOS.
pub(super) fn text_ids(files: &ModelFiles, path: &std::path::Path) -> anyhow::Result<Vec<u32>> {
    Ok(files.tokenizer()?.encode(&read_text(path)?, SpecialTokens::Omit)?)
}

/// Measures with a progress bar that tells the perplexity so far.
pub(super) fn measure(
    engine: &mut Engine,
    ids: &[u32],
    ctx: usize,
    console: &mut Console<'_>,
) -> anyhow::Result<Perplexity> {
    let mut meter = Meter::new(console);
    let template = "{msg} {wide_bar} {pos}/{len} chunks, {eta} left";
    let result = perplexity::measure(engine, ids, ctx, &mut |done, total, _| {
        meter.set("scoring", template, done as u64, total as u64);
    });
    Ok(result?)
}
