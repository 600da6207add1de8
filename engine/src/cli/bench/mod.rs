//! `bespoke bench`: what the engine gives under load.

mod measurement;
mod report;
mod samples;
#[cfg(feature = "server")]
mod serving;
mod workload;

use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;
use serde::Serialize;

use super::console::Console;
use super::model::{ModelFiles, RunArgs};
use super::progress::Meter;
use crate::config::{EngineOptions, context_max};
use crate::files::human_bytes;
use crate::kv_cache::num_pages;
use crate::memory;
use crate::row_histogram::RowHistogram;
use measurement::{Load, Measurement};
use report::{Point, Report, Setting, overview};
use workload::{Lengths, Source, Workload};

/// Measure latency and throughput under load
///
/// Requests of pseudo-random tokens go straight to the engine, or to a server; each answer has its
/// full length.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Model folder, name of a cached model, or preset; for serving, the server's name of the model
    /// [default: the first that it lists]
    #[arg(long, short, value_name = "MODEL")]
    #[cfg_attr(feature = "server", arg(required_unless_present = "url"))]
    #[cfg_attr(not(feature = "server"), arg(required = true))]
    model: Option<String>,
    #[command(flatten)]
    run: RunArgs,
    #[cfg(feature = "server")]
    #[command(flatten)]
    serving: serving::ServingArgs,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Mode::Latency)]
    mode: Mode,
    /// Requests at once; a list measures each [default: 1,16,32,64 for latency, 64 for others]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = count(CONCURRENCY_MAX))]
    concurrency: Vec<usize>,
    /// Tokens of a prompt; a list is paired with that of --max-tokens
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = count(COUNT_MAX))]
    prompt_tokens: Vec<usize>,
    /// Tokens to generate for each request
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = count(COUNT_MAX))]
    max_tokens: Vec<usize>,
    /// latency: batches to measure, after one to warm up [default: 3]
    #[arg(long, value_name = "N", value_parser = count(COUNT_MAX))]
    rounds: Option<usize>,
    /// throughput, serving: how many requests [default: 200, or all of the trace]
    #[arg(long, value_name = "N", value_parser = count(COUNT_MAX))]
    requests: Option<usize>,
    /// throughput, serving: lengths, one JSON object a line: {"prompt_tokens": 100, "max_tokens":
    /// 20}
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_tokens", "max_tokens"])]
    trace: Option<PathBuf>,
    /// throughput, serving: tokens that all prompts have in common at their beginning
    #[arg(long, value_name = "N", value_parser = count(COUNT_MAX))]
    shared_prefix_tokens: Option<usize>,
    /// throughput: do not look for the beginnings of prompts in the KV cache
    #[arg(long)]
    no_prefix_cache: bool,
    /// Start of the random lengths and tokens
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Pages of the KV cache [default: enough for all requests that run at once]
    #[arg(long, value_name = "N")]
    num_pages: Option<usize>,
    /// Token rows of one step [default: 512; for latency all prompts of a batch, up to 8192]
    #[arg(long, value_name = "N")]
    max_batch_tokens: Option<usize>,
    /// Rows of one prompt in one step [default: no limit]
    #[arg(long, value_name = "N")]
    chunk_tokens: Option<usize>,
    /// latency, throughput: write how many steps had how many rows, for `kernel-gen select
    /// --from-trace`
    #[arg(long, value_name = "FILE")]
    trace_shapes: Option<PathBuf>,
    /// latency, throughput: also tell the time of each kernel, beside what this machine's limits,
    /// measured afterwards, allow
    #[arg(long)]
    kernels: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bespoke bench --model smollm2-135m --concurrency 1,8,32 --prompt-tokens 128 --max-tokens 128
  bespoke bench --model smollm2-135m --mode throughput --requests 100 --concurrency 32
  bespoke bench --model smollm2-135m --mode throughput --shared-prefix-tokens 256
  bespoke bench --mode serving --url http://127.0.0.1:23333 --concurrency 1,16,64
  bespoke bench --mode serving --url http://127.0.0.1:23333 --request-rate 4 --requests 500

latency: a batch starts together and ends together; its prompts may take several steps where they
are more than --max-batch-tokens. prompt_tokens_per_s counts up to the last first token of a batch,
decode_tokens_per_s from there on. Lengths unless given: 1 and 128, 128 and 128, 128 and 2048, 2048
and 128, 2048 and 2048 tokens, as far as the model's context holds them.
throughput: a new request starts whenever one ends; rates count over the whole time. Lengths unless
given are drawn as in chats, about 200 tokens for a prompt and 225 for an answer.
serving: as throughput, by HTTP with streamed answers, behind one request to warm up. With
--request-rate requests start at random times (a Poisson process) whether or not others have ended;
--concurrency then bounds how many are under way. A request that fails is counted by the kind of its
failure and not sent again. The exit code is 1 where the server went away or nothing succeeded.

ttft: from handing a request over to its first token. tpot: between two tokens of a request (for
serving, between two pieces of its text; request_tpot is the mean of one request behind its first
token, e2e the time of a whole request).
Percentiles are measured values (nearest rank), beyond a million values those of a fair choice.
--kernels times every eighth step, warm-up included; limit is the time that the machine's memory,
caches or arithmetic would need at least.
The JSON has the values of each point in `points`, and those of the last point at the top as well;
prompt_tokens and max_tokens are means where lengths differ.";

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// Static batches
    Latency,
    /// A stream of requests
    Throughput,
    /// A stream of requests to a server
    #[cfg(feature = "server")]
    Serving,
}

/// The modes that an option has a meaning with.
#[cfg(feature = "server")]
const STREAMS: &[Mode] = &[Mode::Throughput, Mode::Serving];
#[cfg(not(feature = "server"))]
const STREAMS: &[Mode] = &[Mode::Throughput];
const ENGINE: &[Mode] = &[Mode::Latency, Mode::Throughput];

const CONCURRENCY_MAX: u64 = 4096;
const COUNT_MAX: u64 = 1_000_000;

const CONCURRENCY_LATENCY: [usize; 4] = [1, 16, 32, 64];
const CONCURRENCY_STREAM: [usize; 1] = [64];
const ROUNDS: usize = 3;
const REQUESTS: usize = 200;

/// Prompt and answer of static batches unless they are given.
const PAIRS: [(usize, usize); 5] = [(1, 128), (128, 128), (128, 2048), (2048, 128), (2048, 2048)];
/// Where only one of the two is given, the other.
const TOKENS: usize = 128;

/// Rows of a step: as many as the engine has by itself, and for static batches as many as their
/// prompts have, as long as that costs no more than a small model's weights.
const BATCH_TOKENS: usize = 512;
const BATCH_TOKENS_MAX: usize = 8192;

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Latency => "latency",
            Mode::Throughput => "throughput",
            #[cfg(feature = "server")]
            Mode::Serving => "serving",
        }
    }
}

fn count(max: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=max)
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    args.check()?;
    #[cfg(feature = "server")]
    if args.mode == Mode::Serving {
        return serving::run(args, console);
    }
    let model = args.model.as_deref().context("--model is missing")?;
    let files = ModelFiles::open(model, console)?;
    let bench = Bench { args, files: &files, rows: RowHistogram::default() };
    let mut points = Vec::new();
    for source in args.sources(context_max(&files.config), console)? {
        for concurrency in args.concurrencies() {
            let point = bench.measure(&source, *concurrency, console)?;
            if !args.json {
                console.print(&point.text())?;
            }
            points.push(point);
        }
    }
    if let Some(path) = &args.trace_shapes {
        bench.rows.write(path)?;
    }
    if args.json {
        let last = points.last().context("nothing was measured")?;
        let (backend, seed) = (last.backend, args.seed);
        return console.print_json(&Report { model, backend, seed, last, points: &points });
    }
    if points.len() > 1 { console.print(&overview(&points)) } else { Ok(()) }
}

impl Args {
    /// Refuses options of other modes.
    fn check(&self) -> anyhow::Result<()> {
        let options = [
            ("--requests", self.requests.is_some(), STREAMS),
            ("--trace", self.trace.is_some(), STREAMS),
            ("--shared-prefix-tokens", self.shared_prefix_tokens.is_some(), STREAMS),
            ("--no-prefix-cache", self.no_prefix_cache, &[Mode::Throughput][..]),
            ("--rounds", self.rounds.is_some(), &[Mode::Latency][..]),
            ("--num-pages", self.num_pages.is_some(), ENGINE),
            ("--max-batch-tokens", self.max_batch_tokens.is_some(), ENGINE),
            ("--chunk-tokens", self.chunk_tokens.is_some(), ENGINE),
            ("--trace-shapes", self.trace_shapes.is_some(), ENGINE),
            ("--kernels", self.kernels, ENGINE),
        ];
        #[cfg(feature = "server")]
        let options = {
            let only = &[Mode::Serving][..];
            let given = self.serving.given().map(|(name, is_given)| (name, is_given, only));
            options.into_iter().chain(given)
        };
        for (name, is_given, modes) in options {
            if is_given && !modes.contains(&self.mode) {
                let modes: Vec<&str> = modes.iter().map(|mode| mode.name()).collect();
                let modes = modes.join(" or ");
                bail!("{name} has a meaning with --mode {modes} only; leave it out, or add that");
            }
        }
        Ok(())
    }

    fn concurrencies(&self) -> &[usize] {
        match self.mode {
            _ if !self.concurrency.is_empty() => &self.concurrency,
            Mode::Latency => &CONCURRENCY_LATENCY,
            _ => &CONCURRENCY_STREAM,
        }
    }

    /// Where lengths come from: what is asked for, or the defaults that the context holds.
    fn sources(
        &self,
        context_max: usize,
        console: &mut Console<'_>,
    ) -> anyhow::Result<Vec<Source>> {
        if let Some(path) = &self.trace {
            return Ok(vec![Source::trace(path, context_max)?]);
        }
        if !self.prompt_tokens.is_empty() || !self.max_tokens.is_empty() {
            let pairs = pairs(&self.prompt_tokens, &self.max_tokens)?;
            pairs.iter().try_for_each(|lengths| lengths.check(context_max))?;
            return Ok(pairs.into_iter().map(Source::Fixed).collect());
        }
        if STREAMS.contains(&self.mode) {
            return Ok(vec![Source::Chat]);
        }
        let mut sources = Vec::new();
        for (prompt_tokens, max_tokens) in PAIRS {
            let lengths = Lengths { prompt_tokens, max_tokens };
            match lengths.check(context_max) {
                Ok(()) => sources.push(Source::Fixed(lengths)),
                Err(error) => console.report(&format!("left out: {error}\n")),
            }
        }
        ensure!(!sources.is_empty(), "give --prompt-tokens and --max-tokens that fit the context");
        Ok(sources)
    }

    /// Requests that are measured; before them come those of one warm-up batch for latency.
    fn num_requests(&self, source: &Source, concurrency: usize) -> usize {
        match (self.mode, source) {
            (Mode::Latency, _) => self.rounds.unwrap_or(ROUNDS) * concurrency,
            (_, Source::Trace(trace)) => self.requests.unwrap_or(trace.len()),
            _ => self.requests.unwrap_or(REQUESTS),
        }
    }

    /// An engine that has room for `concurrency` of the requests at once.
    fn options(
        &self,
        defaults: EngineOptions,
        workload: &Workload,
        concurrency: usize,
        page_size: usize,
    ) -> EngineOptions {
        let mut totals: Vec<usize> =
            workload.lengths.iter().map(|lengths| lengths.total()).collect();
        totals.sort_unstable_by(|a, b| b.cmp(a));
        let largest = totals.iter().take(concurrency);
        let num_needed: usize = largest.map(|total| num_pages(*total, page_size)).sum();
        let rows = match self.mode {
            Mode::Latency => {
                let prompts = workload.lengths.iter().take(concurrency);
                let rows: usize = prompts.map(|lengths| lengths.prompt_tokens).sum();
                rows.clamp(BATCH_TOKENS, BATCH_TOKENS_MAX)
            }
            _ => BATCH_TOKENS,
        };
        EngineOptions {
            max_sequences: concurrency,
            max_batch_tokens: self.max_batch_tokens.unwrap_or(rows.max(concurrency)),
            max_chunk_tokens: self.chunk_tokens,
            // NOTE: a request starts only where each that runs finds one more page.
            num_pages: Some(self.num_pages.unwrap_or(num_needed + concurrency)),
            prefix_cache: self.mode == Mode::Throughput && !self.no_prefix_cache,
            ..defaults
        }
    }
}

/// The lengths of two lists, of which a list of one is as long as the other.
fn pairs(prompt_tokens: &[usize], max_tokens: &[usize]) -> anyhow::Result<Vec<Lengths>> {
    let or_default = |list: &[usize]| if list.is_empty() { vec![TOKENS] } else { list.to_vec() };
    let (prompts, answers) = (or_default(prompt_tokens), or_default(max_tokens));
    let num_pairs = prompts.len().max(answers.len());
    ensure!(
        [prompts.len(), answers.len()].iter().all(|len| [1, num_pairs].contains(len)),
        "--prompt-tokens has {} values and --max-tokens {}; give as many of both, or one of one",
        prompts.len(),
        answers.len()
    );
    let pairs = prompts.iter().cycle().zip(answers.iter().cycle()).take(num_pairs);
    Ok(pairs
        .map(|(prompt, answer)| Lengths { prompt_tokens: *prompt, max_tokens: *answer })
        .collect())
}

/// A model, and what is asked of it.
struct Bench<'a> {
    args: &'a Args,
    files: &'a ModelFiles,
    /// Of all points.
    rows: RowHistogram,
}

impl Bench<'_> {
    /// Measures one point with an engine of its own.
    fn measure(
        &self,
        source: &Source,
        concurrency: usize,
        console: &mut Console<'_>,
    ) -> anyhow::Result<Point> {
        let Bench { args, files, ref rows } = *self;
        let mode = args.mode;
        let num_requests = args.num_requests(source, concurrency);
        let num_warm_up = if mode == Mode::Latency { concurrency } else { 0 };
        let workload = Workload {
            lengths: source.lengths(
                num_warm_up + num_requests,
                args.seed,
                context_max(&files.config),
            ),
            vocab_size: files.config.vocab_size,
            seed: args.seed,
            num_shared: args.shared_prefix_tokens.unwrap_or(0),
        };
        let len_max = workload.lengths.iter().map(|lengths| lengths.total()).max().unwrap_or(0);
        let defaults = files.options(&args.run, len_max, console);
        let page_size = console.kernels.page_size;
        let options = args.options(defaults, &workload, concurrency, page_size);
        let (mut engine, _) = files.load_with(&options, console)?;
        check_memory(engine.memory().kv_cache_bytes)?;

        let mut meter = Meter::new(console);
        let stage = format!("{}, {concurrency} at once", source.name());
        let mut measurement = Measurement::default();
        let mut load = Load { engine: &mut engine, workload: &workload, concurrency };
        load.run(0..num_warm_up, &mut Measurement::default(), &mut |_| {})?;
        let batch = if mode == Mode::Latency { concurrency } else { num_requests };
        for num_before in (0..num_requests).step_by(batch) {
            let first = num_warm_up + num_before;
            load.run(first..first + batch, &mut measurement, &mut |num_ended| {
                let template = "{msg} {wide_bar} {pos}/{len} requests, {eta} left";
                let num_ended = (num_before + num_ended) as u64;
                meter.set(&stage, template, num_ended, num_requests as u64);
            })?;
        }
        rows.merge(&engine.row_histogram());
        let setting = Setting { mode, source: source.name(), concurrency };
        let kernels = if args.kernels { engine.kernel_usage()? } else { Vec::new() };
        Ok(Point::new(setting, &measurement, &engine).with_kernels(kernels))
    }
}

/// Refuses a KV cache that would send the machine looking for memory in mid-measurement.
fn check_memory(kv_cache_bytes: usize) -> anyhow::Result<()> {
    let needed = kv_cache_bytes as u64;
    match memory::available_bytes() {
        Some(available) if available < needed => bail!(
            "the KV cache of {} does not fit the {} of memory that are free; lower --concurrency, \
             the lengths or --num-pages",
            human_bytes(needed),
            human_bytes(available)
        ),
        _ => Ok(()),
    }
}
