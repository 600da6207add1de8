//! `bespoke generate`: one prompt, one answer.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde::Serialize;

use super::console::Console;
use super::grammar::GrammarArgs;
use super::model::{ModelArgs, ModelFiles};
use super::prompt::PromptArgs;
use super::sampling::SamplingArgs;
use super::startup::StartupReport;
use crate::config::EngineOptions;
use crate::engine::Engine;
use crate::memory;
use crate::request::{FinishReason, Generation, Request, RequestOutput};
use crate::sampling::TokenLogprob;
use crate::startup::{Stage, Startup};
use crate::tokenizer::stream::{StopStrings, TextStream};

/// Continue a prompt
///
/// The text is streamed to standard output, a line of timing goes to standard error. Without
/// sampling options the likeliest token is taken each time.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    grammar: GrammarArgs,
    /// Text that ends the answer and is not part of it; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Go on after the model's end token
    #[arg(long)]
    ignore_eos: bool,
    /// Answers to print, each with a seed of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    n: usize,
    /// Answers to generate, of which the likeliest by mean log-probability are printed [default:
    /// as many as are printed]
    #[arg(long, value_name = "N")]
    best_of: Option<usize>,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bespoke generate --model smollm2-135m --prompt 'Once upon a time' --max-tokens 64
  bespoke generate --model ./my-model --messages chat.json --temperature 0.7 --seed 1
  bespoke generate --model smollm2-135m --prompt-ids 504,3575,282,4649,314 --json
  bespoke generate --model smollm2-135m --prompt 'Once' --temperature 1 --min-p 0.1 \
    --bad-words king --logit-bias 28=-5 --top-logprobs 3 --json

chat.json is [{\"role\": \"user\", \"content\": \"…\"}, …].
With several answers, the JSON has the first one at its top level and all of them in `choices`.
Times in the JSON are milliseconds; total_ms counts from the prompt to the last token, without
loading.";

/// The JSON of the command.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    backend: &'a str,
    prompt_ids: &'a [u32],
    output_ids: &'a [u32],
    /// Null without a tokenizer.
    text: Option<&'a str>,
    logprobs: &'a [f32],
    /// For each output id the likeliest tokens as `[id, logprob]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<Vec<(u32, f32)>>>,
    finish_reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    choices: Option<Vec<Choice<'a>>>,
    timing: Timing,
    memory: Memory,
    #[serde(skip_serializing_if = "Option::is_none")]
    startup: Option<StartupReport>,
}

/// One of several answers in the JSON.
#[derive(Serialize)]
struct Choice<'a> {
    output_ids: &'a [u32],
    text: Option<&'a str>,
    logprobs: &'a [f32],
    finish_reason: &'a str,
}

#[derive(Clone, Copy, Serialize)]
pub(super) struct Timing {
    load_ms: f64,
    first_token_ms: f64,
    total_ms: f64,
    pub(super) prompt_tokens_per_s: f64,
    /// Null where one token or none was generated.
    pub(super) decode_tokens_per_s: Option<f64>,
}

#[derive(Clone, Copy, Serialize)]
pub(super) struct Memory {
    pub(super) weights_bytes: usize,
    pub(super) kv_cache_bytes: usize,
    pub(super) peak_rss_bytes: Option<u64>,
}

impl Memory {
    /// The memory of `engine`, and of this process up to now.
    pub(super) fn of(engine: &Engine) -> Memory {
        Memory {
            weights_bytes: engine.memory().weights_bytes,
            kv_cache_bytes: engine.memory().kv_cache_bytes,
            peak_rss_bytes: memory::peak_rss_bytes(),
        }
    }
}

/// What one run gave.
pub(super) struct Answer {
    pub(super) output_ids: Vec<u32>,
    logprobs: Vec<f32>,
    top_logprobs: Vec<Vec<TokenLogprob>>,
    pub(super) text: Option<String>,
    finish_reason: FinishReason,
    pub(super) timing: Timing,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let files = ModelFiles::open(&args.model.model, console)?;
    let prompt_ids = args.prompt.ids(&files)?;
    let request = request(args, &files, prompt_ids.clone())?;
    request.check(files.config.vocab_size, usize::MAX, 0)?;
    let writer = TextWriter::new(&files, args.stop.clone())?;
    let context_len = prompt_ids.len().saturating_add(args.max_tokens);
    let options = EngineOptions {
        max_sequences: request.num_choices,
        ..files.options(&args.model.run, context_len, console)
    };
    let (mut engine, load_time) = files.load_with(&options, console)?;
    let is_streamed = !args.json && writer.stream.is_some() && request.num_choices == 1;
    let answers = match request.num_choices {
        1 => vec![answer(&mut engine, request, load_time, writer, &mut |text| {
            if is_streamed { console.print(text) } else { Ok(()) }
        })?],
        _ => answers(&mut engine, request, load_time, args, &files)?,
    };
    let answer = &answers[0];
    let memory = Memory::of(&engine);
    let startup = args.model.run.startup_report.then(|| {
        let stages = [&files.startup, engine.startup(), &answer.startup()];
        StartupReport::new(&stages, console)
    });
    if args.json {
        return console.print_json(&Report {
            model: &args.model.model,
            backend: engine.backend_name(),
            prompt_ids: &prompt_ids,
            output_ids: &answer.output_ids,
            text: answer.text.as_deref(),
            logprobs: &answer.logprobs,
            top_logprobs: args.sampling.has_top_logprobs().then(|| pairs(&answer.top_logprobs)),
            finish_reason: answer.finish_reason.name(),
            choices: (args.n > 1).then(|| answers.iter().map(Answer::choice).collect()),
            timing: answer.timing,
            memory,
            startup,
        });
    }
    print_answers(&answers, is_streamed, console)?;
    console.report(&summary(prompt_ids.len(), answer));
    if let Some(startup) = startup {
        console.report(&startup.text());
    }
    Ok(())
}

/// Prints what was not streamed.
fn print_answers(
    answers: &[Answer],
    is_streamed: bool,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    for (idx, answer) in answers.iter().enumerate() {
        if answers.len() > 1 {
            console.print(&format!("[{}] ", idx + 1))?;
        }
        match &answer.text {
            None => {
                let ids: Vec<String> = answer.output_ids.iter().map(u32::to_string).collect();
                console.print(&ids.join(","))?;
            }
            Some(text) if !is_streamed => console.print(text)?,
            Some(_) => {}
        }
        console.print("\n")?;
    }
    Ok(())
}

impl Answer {
    /// The stretch before the first token.
    fn startup(&self) -> Startup {
        let time = Duration::from_secs_f64(self.timing.first_token_ms * 1e-3);
        let stages = vec![Stage { name: "first token", time }];
        Startup { stages, warnings: Vec::new() }
    }

    fn choice(&self) -> Choice<'_> {
        Choice {
            output_ids: &self.output_ids,
            text: self.text.as_deref(),
            logprobs: &self.logprobs,
            finish_reason: self.finish_reason.name(),
        }
    }
}

fn request(args: &Args, files: &ModelFiles, prompt_ids: Vec<u32>) -> anyhow::Result<Request> {
    let num_choices = args.best_of.unwrap_or(args.n);
    if args.n == 0 || num_choices < args.n {
        bail!("the best {} of {num_choices} answers; ask for 1 or more, of as many", args.n);
    }
    Ok(Request {
        prompt_ids,
        max_tokens: args.max_tokens,
        num_choices,
        sampling: args.sampling.params(files)?,
        grammar: args.grammar.compile(files)?,
        ignore_eos: args.ignore_eos,
        stop_token_ids: if args.ignore_eos { Vec::new() } else { files.eos_ids() },
        ..Request::default()
    })
}

fn pairs(rows: &[Vec<TokenLogprob>]) -> Vec<Vec<(u32, f32)>> {
    let pairs = |row: &Vec<TokenLogprob>| row.iter().map(|top| (top.token, top.logprob)).collect();
    rows.iter().map(pairs).collect()
}

/// Generated ids to text, as far as the model has a tokenizer.
pub(super) struct TextWriter {
    stream: Option<TextStream>,
    stops: StopStrings,
    /// All text so far.
    pub(super) text: String,
}

impl TextWriter {
    pub(super) fn new(files: &ModelFiles, stops: Vec<String>) -> anyhow::Result<TextWriter> {
        if !stops.is_empty() {
            files.tokenizer()?;
        }
        let stream = files.tokenizer_if_any().cloned().map(TextStream::new);
        Ok(TextWriter { stream, stops: StopStrings::new(stops)?, text: String::new() })
    }

    /// The text that `id`, or the end of the sequence, adds.
    pub(super) fn push(&mut self, id: Option<u32>) -> anyhow::Result<String> {
        let Some(stream) = &mut self.stream else { return Ok(String::new()) };
        let piece = match id {
            Some(id) => stream.push(id)?,
            None => stream.flush()?,
        };
        let mut text = self.stops.push(&piece);
        if id.is_none() && !self.stops.is_stopped() {
            text.push_str(&self.stops.flush());
        }
        self.text.push_str(&text);
        Ok(text)
    }

    /// Whether a stop string was found.
    pub(super) fn is_stopped(&self) -> bool {
        self.stops.is_stopped()
    }
}

/// Runs `request` to its end; `print` hears the text as it comes.
pub(super) fn answer(
    engine: &mut Engine,
    request: Request,
    load_time: Duration,
    mut writer: TextWriter,
    print: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    let num_prompt = request.prompt_ids.len();
    let start = Instant::now();
    let mut first_token = None;
    let mut failure = None;
    let mut on_output = |output: &RequestOutput| {
        first_token.get_or_insert_with(|| start.elapsed());
        let Some(id) = output.token else { return ControlFlow::Continue(()) };
        match writer.push(Some(id)).and_then(|text| print(&text)) {
            Ok(()) if !writer.is_stopped() => ControlFlow::Continue(()),
            Ok(()) => ControlFlow::Break(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let generation = engine.generate(request, &mut on_output)?;
    let total = start.elapsed();
    if let Some(error) = failure {
        return Err(error);
    }
    print(&writer.push(None)?)?;
    if let Some(FinishReason::Failed(failure)) = generation.finish_reason {
        bail!(failure.message());
    }
    let stopped = writer.is_stopped();
    let first_token = first_token.unwrap_or(total);
    Ok(Answer {
        timing: timing(load_time, first_token, total, num_prompt, generation.output_ids.len()),
        output_ids: generation.output_ids,
        logprobs: generation.logprobs,
        top_logprobs: generation.top_logprobs,
        text: writer.stream.is_some().then_some(writer.text),
        finish_reason: match generation.finish_reason {
            Some(reason) if !stopped => reason,
            _ => FinishReason::Stop,
        },
    })
}

/// The answers to `request` that `args` ask for, the likeliest first where they are chosen from
/// more.
fn answers(
    engine: &mut Engine,
    mut request: Request,
    load_time: Duration,
    args: &Args,
    files: &ModelFiles,
) -> anyhow::Result<Vec<Answer>> {
    if !args.stop.is_empty() {
        files.tokenizer()?;
        request.stop_strings.clone_from(&args.stop);
    }
    let num_prompt = request.prompt_ids.len();
    let start = Instant::now();
    let mut first_token = None;
    let mut generations = engine.generate_choices(request, &mut |_| {
        first_token.get_or_insert_with(|| start.elapsed());
        ControlFlow::Continue(())
    })?;
    let total = start.elapsed();
    if args.n < generations.len() {
        generations.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
        generations.truncate(args.n);
    }
    let num_output = generations.iter().map(|generation| generation.output_ids.len()).sum();
    let first_token = first_token.unwrap_or(total);
    let timing = timing(load_time, first_token, total, num_prompt, num_output);
    let answer = |generation: Generation| {
        let mut writer = TextWriter::new(files, args.stop.clone())?;
        for id in &generation.output_ids {
            writer.push(Some(*id))?;
        }
        writer.push(None)?;
        Ok(Answer {
            output_ids: generation.output_ids,
            logprobs: generation.logprobs,
            top_logprobs: generation.top_logprobs,
            text: writer.stream.is_some().then_some(writer.text),
            finish_reason: generation.finish_reason.unwrap_or(FinishReason::Length),
            timing,
        })
    };
    generations.into_iter().map(answer).collect()
}

fn timing(
    load: Duration,
    first_token: Duration,
    total: Duration,
    num_prompt: usize,
    num_output: usize,
) -> Timing {
    let ms = |time: Duration| round(time.as_secs_f64() * 1e3);
    // The first token comes with the prompt.
    let rate = |count: usize, time: Duration| round(count as f64 / time.as_secs_f64().max(1e-9));
    Timing {
        load_ms: ms(load),
        first_token_ms: ms(first_token),
        total_ms: ms(total),
        prompt_tokens_per_s: rate(num_prompt, first_token),
        decode_tokens_per_s: (num_output > 1)
            .then(|| rate(num_output - 1, total.saturating_sub(first_token))),
    }
}

/// To three decimals: clocks tell no more.
pub(super) fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn summary(num_prompt: usize, answer: &Answer) -> String {
    let timing = &answer.timing;
    let decode =
        timing.decode_tokens_per_s.map_or(String::new(), |rate| format!(" at {rate:.1}/s"));
    format!(
        "[{num_prompt} prompt tokens at {:.1}/s, {} tokens{decode}, first after {:.0} ms, {}]\n",
        timing.prompt_tokens_per_s,
        answer.output_ids.len(),
        timing.first_token_ms,
        answer.finish_reason.name(),
    )
}
