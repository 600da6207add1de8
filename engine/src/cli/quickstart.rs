//! `bespoke quickstart`: from nothing to an answer, in float and in 4 bits.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bespoke_kernel_gen::spec::GroupSize;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde::Serialize;

use super::console::Console;
use super::generate::{TextWriter, answer};
use super::model::{ModelFiles, RunArgs};
use super::{perplexity, prompt, pull, quantize};
use crate::engine::Engine;
use crate::files::{SidecarLock, human_bytes};
use crate::import::cache::is_model_dir;
use crate::request::Request;
use crate::source::ModelSource;
use crate::tokenizer::chat::Message;

/// Fetch a small model, quantize it, and compare both
///
/// Pulls SmolLM2-135M-Instruct, quantizes it to 4 bits, asks both models a question and prints a
/// table: memory of the weights and speed. Later runs use the cache.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Also measure the perplexity on this text (minutes)
    #[arg(long, value_name = "FILE")]
    perplexity: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const MODEL: &str = "smollm2-135m";
const QUANTIZED: &str = "smollm2-135m-awq-g64";
/// Samples of the calibration: a minute's worth.
const NUM_SAMPLES: usize = 16;
const QUESTION: &str = "What is the capital of France?";
const ANSWER_TOKENS_MAX: usize = 48;

/// Sizes of the speed measurement: long enough to be steady, short enough to be quick.
const SPEED_PROMPT_TOKENS: usize = 256;
const SPEED_OUTPUT_TOKENS: usize = 32;

#[derive(Serialize)]
struct Report<'a> {
    question: &'a str,
    models: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    model: &'static str,
    path: PathBuf,
    answer: String,
    weights_bytes: usize,
    prompt_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    perplexity: Option<f64>,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let dir = pull::pull(MODEL, console)?;
    let quantized = console.cache()?.models_dir().join(QUANTIZED);
    if !is_model_dir(&quantized) {
        quantize_into(&quantized, &dir, &args.run, console)?;
    }
    if !args.json {
        console.print(&format!("Question: {QUESTION}\n"))?;
    }
    let mut models = Vec::new();
    for (model, dir) in [(MODEL, dir), (QUANTIZED, quantized)] {
        let row = row(args, model, &dir, console)?;
        if !args.json {
            console.print(&format!("{model}: {}\n", row.answer.trim()))?;
        }
        models.push(row);
    }
    match args.json {
        true => console.print_json(&Report { question: QUESTION, models }),
        false => console.print(&table(&models)),
    }
}

/// Quantizes after a quick calibration on the shipped text, unless another quickstart does.
fn quantize_into(
    quantized: &Path,
    dir: &Path,
    run: &RunArgs,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let lock_path = quantized.with_file_name(format!(".{QUANTIZED}.lock"));
    let _lock = SidecarLock::acquire(&lock_path, &mut || {
        console.report("waiting for another process\n");
    })?;
    if is_model_dir(quantized) {
        return Ok(());
    }
    let (backend, threads) = (run.backend.choice(), run.threads);
    let group_size = GroupSize::Of(64);
    let job = quantize::quick_job(group_size, NUM_SAMPLES, backend, threads, console);
    quantize::awq(dir, quantized, &job, console).map(|_| ())
}

fn row(
    args: &Args,
    model: &'static str,
    dir: &Path,
    console: &mut Console<'_>,
) -> anyhow::Result<Row> {
    let files = ModelFiles::read(ModelSource::folder(dir))?;
    let question = prompt::chat_ids(&files, &[Message::new("user", QUESTION)])?;
    let context_len = (SPEED_PROMPT_TOKENS + SPEED_OUTPUT_TOKENS)
        .max(question.len() + ANSWER_TOKENS_MAX)
        .max(perplexity::CTX);
    let (mut engine, _) = files.load(&args.run, context_len, console)?;
    let request = |prompt_ids, max_tokens, ignore_eos| Request {
        prompt_ids,
        max_tokens,
        ignore_eos,
        stop_token_ids: if ignore_eos { Vec::new() } else { files.eos_ids() },
        ..Request::default()
    };
    let answered = ask(&mut engine, &files, request(question.clone(), ANSWER_TOKENS_MAX, false))?;
    let long_prompt = question.iter().copied().cycle().take(SPEED_PROMPT_TOKENS).collect();
    let speed = ask(&mut engine, &files, request(long_prompt, SPEED_OUTPUT_TOKENS, true))?.timing;
    let perplexity = match &args.perplexity {
        None => None,
        Some(path) => {
            let ids = perplexity::text_ids(&files, path)?;
            Some(perplexity::measure(&mut engine, &ids, perplexity::CTX, console)?.ppl)
        }
    };
    Ok(Row {
        model,
        path: dir.to_owned(),
        answer: answered.text.unwrap_or_default(),
        weights_bytes: engine.memory().weights_bytes,
        prompt_tokens_per_s: speed.prompt_tokens_per_s,
        decode_tokens_per_s: speed.decode_tokens_per_s.context("the model gave one token only")?,
        perplexity,
    })
}

fn ask(
    engine: &mut Engine,
    files: &ModelFiles,
    request: Request,
) -> anyhow::Result<super::generate::Answer> {
    let writer = TextWriter::new(files, Vec::new())?;
    answer(engine, request, std::time::Duration::ZERO, writer, &mut |_| Ok(()))
}

fn table(rows: &[Row]) -> String {
    let has_perplexity = rows.iter().any(|row| row.perplexity.is_some());
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let mut header = vec!["model", "weights", "prompt", "decode"];
    if has_perplexity {
        header.push("perplexity");
    }
    table.set_header(header);
    for row in rows {
        let mut cells = vec![
            row.model.to_owned(),
            human_bytes(row.weights_bytes as u64),
            format!("{:.0} tokens/s", row.prompt_tokens_per_s),
            format!("{:.1} tokens/s", row.decode_tokens_per_s),
        ];
        cells.extend(row.perplexity.map(|perplexity| format!("{perplexity:.2}")));
        table.add_row(cells);
    }
    format!(
        "{table}\nSpeed with a prompt of {SPEED_PROMPT_TOKENS} and an answer of \
         {SPEED_OUTPUT_TOKENS} tokens.\nNext: bespoke generate --model {QUANTIZED} --prompt '…'\n"
    )
}
