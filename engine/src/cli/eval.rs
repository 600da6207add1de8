//! `bespoke eval`: how well a model answers multiple-choice questions.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use super::console::Console;
use super::model::{ModelArgs, ModelFiles};
use super::progress::Meter;
use super::prompt::read_text;
use crate::config::context_max;
use crate::eval::{self, Evaluation};

/// Measure how well a model answers multiple-choice questions
///
/// Each line of FILE is a JSON object: "choices" (texts), "answer" (index from 0, or letter), and
/// "question", which is asked as `Question: …` and `Answer:`, or "context", which stands before a
/// choice as it is. The answer is the choice with the largest log-likelihood; the second figure
/// takes it by byte. Both are acc and acc_norm of lm-evaluation-harness, without a BOS.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bespoke eval --model smollm2-135m --file questions.jsonl")]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Questions, one JSON object a line
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// Take the first N questions only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    file: &'a Path,
    accuracy: f64,
    accuracy_norm: f64,
    stderr: Option<f64>,
    stderr_norm: Option<f64>,
    questions: usize,
    tokens: usize,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let name = || args.file.display().to_string();
    let files = ModelFiles::open(&args.model.model, console)?;
    let tokenizer = files.tokenizer()?;
    let limit = args.limit.map(|limit| limit as usize);
    let questions = eval::parse(&read_text(&args.file)?, limit).with_context(name)?;
    let start = files.config.bos_token_id.or_else(|| files.eos_ids().first().copied());
    let len_max = context_max(&files.config);
    let questions = eval::tokenize(&questions, tokenizer, start, len_max).with_context(name)?;
    let choices = questions.iter().flat_map(|question| &question.choices);
    let context_len = choices.map(|choice| choice.ids.len()).max().unwrap_or(0);
    let (mut engine, _) = files.load(&args.model.run, context_len, console)?;
    let mut meter = Meter::new(console);
    let template = "{msg} {wide_bar} {pos}/{len} questions, {eta} left";
    let total = questions.len() as u64;
    let result = eval::measure(&mut engine, &questions, &mut |done| {
        meter.set("answering", template, done as u64, total);
    })
    .with_context(name)?;
    drop(meter);
    match args.json {
        true => console.print_json(&report(args, &result)),
        false => console.print(&text(&result)),
    }
}

fn report<'a>(args: &'a Args, result: &Evaluation) -> Report<'a> {
    Report {
        model: &args.model.model,
        file: &args.file,
        accuracy: result.accuracy,
        accuracy_norm: result.accuracy_norm,
        stderr: result.stderr,
        stderr_norm: result.stderr_norm,
        questions: result.num_questions,
        tokens: result.tokens_scored,
    }
}

fn text(result: &Evaluation) -> String {
    let share = |share: f64, error: Option<f64>| match error {
        Some(error) => format!("{:.1} % ± {:.1}", share * 100.0, error * 100.0),
        None => format!("{:.1} %", share * 100.0),
    };
    format!(
        "accuracy {}, by byte {} ({} questions, {} tokens scored)\n",
        share(result.accuracy, result.stderr),
        share(result.accuracy_norm, result.stderr_norm),
        result.num_questions,
        result.tokens_scored
    )
}
