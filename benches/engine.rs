//! Groups `decode` and `prefill`: whole models, where they are in the model cache.
//!
//! `cargo run --release -- quickstart` puts them there. What a step must move and compute follows
//! from the model's linears and its KV cache; the share relates it to the machine's limits.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench reports to its terminal")]

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use bespoke::Error;
use bespoke::backend::cpu::best_target;
use bespoke::backend::cpu::work::Work;
use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::import::{cache, environment};
use bespoke::kernels::{KernelTable, generated};
use bespoke::request::Request;
use bespoke_benches::Bench;
use bespoke_benches::case::kv_page_bytes;
use bespoke_benches::report::Samples;
use bespoke_kernel_gen::spec::{LinearRole, ModelShape};
use criterion::{BenchmarkId, Criterion, Throughput};

/// Names in the model cache, as the quick start gives them.
const MODELS: [&str; 2] = ["smollm2-135m-awq-g64", "smollm2-135m"];

/// Tokens before the first decoded one, and decoded tokens of one call.
const DECODE_CONTEXT: usize = 128;
const DECODE_TOKENS: usize = 64;
const PREFILL_TOKENS: usize = 512;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    if let Err(error) = bench_models(&mut criterion) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
    criterion.final_summary();
}

fn bench_models(criterion: &mut Criterion) -> Result<(), Error> {
    let cache = environment::cache()?;
    let mut bench = Bench::new()?;
    for model in MODELS {
        let dir = cache.models_dir().join(model);
        match cache::is_model_dir(&dir) {
            true => bench_model(criterion, &mut bench, model, &dir)?,
            false => println!("skipped: no model {model} (cargo run --release -- quickstart)"),
        }
    }
    bench.finish("engine.md")
}

fn bench_model(
    criterion: &mut Criterion,
    bench: &mut Bench,
    model: &str,
    dir: &Path,
) -> Result<(), Error> {
    let options = EngineOptions {
        max_context: Some(PREFILL_TOKENS + DECODE_TOKENS),
        ..EngineOptions::new(generated::table())
    };
    let mut engine = Engine::load(dir, &options, &mut |_| {})?;
    let shape = engine.shape().clone();
    // Each decoded token sees the ones before it.
    let mean_context = DECODE_CONTEXT + DECODE_TOKENS / 2;
    let step = step_work(&options, &shape, 1, mean_context)?;
    let decode = Work {
        memory_bytes: step.memory_bytes * DECODE_TOKENS,
        dot_ops: step.dot_ops * DECODE_TOKENS,
        bf16_ops: step.bf16_ops * DECODE_TOKENS,
        fma_ops: step.fma_ops * DECODE_TOKENS,
        ..step
    };
    let mut call = || run(&mut engine, DECODE_CONTEXT, DECODE_TOKENS + 1).1;
    bench_call(criterion, bench, "decode", (model, DECODE_TOKENS), decode, &mut call);
    // A row of a prompt sees half of it on average.
    let prefill = step_work(&options, &shape, PREFILL_TOKENS, PREFILL_TOKENS / 2)?;
    let mut call = || run(&mut engine, PREFILL_TOKENS, 1).0;
    bench_call(criterion, bench, "prefill", (model, PREFILL_TOKENS), prefill, &mut call);
    Ok(())
}

fn bench_call(
    criterion: &mut Criterion,
    bench: &mut Bench,
    group_name: &str,
    (model, num_tokens): (&str, usize),
    work: Work,
    call: &mut dyn FnMut() -> Duration,
) {
    let mut samples = Samples::default();
    let mut group = criterion.benchmark_group(group_name);
    group.throughput(Throughput::Elements(num_tokens as u64));
    group.bench_function(BenchmarkId::new(model, num_tokens), |bencher| {
        bencher.iter_custom(|num_calls| {
            let times = (0..num_calls).map(|_| call());
            times.inspect(|time| samples.add(*time)).sum()
        });
    });
    group.finish();
    bench.record(group_name, model, num_tokens, work, samples);
}

/// Times from the start to the first token, and from there to the last.
fn run(engine: &mut Engine, num_prompt: usize, max_tokens: usize) -> (Duration, Duration) {
    let vocab = engine.shape().vocab_size as u32;
    let prompt_ids = (0..num_prompt as u32).map(|i| (i * 7919 + 17) % vocab).collect();
    let request = Request { prompt_ids, max_tokens, ignore_eos: true, ..Request::default() };
    let start = Instant::now();
    let mut first = None;
    let generation = engine.generate(request, &mut |_| {
        first.get_or_insert_with(Instant::now);
        ControlFlow::Continue(())
    });
    let generation = generation.expect("the request fits the engine it was made for");
    assert_eq!(generation.output_ids.len(), max_tokens, "the model stopped early");
    let first = first.unwrap_or(start);
    (first - start, first.elapsed())
}

/// What `rows` rows, each seeing `context` tokens, must move and compute; the head runs for one.
fn step_work(
    options: &EngineOptions,
    shape: &ModelShape,
    rows: usize,
    context: usize,
) -> Result<Work, Error> {
    let table: KernelTable = options.kernels;
    let target = best_target(&table).expect("a build holds kernels for every machine");
    let mut total = Work::default();
    let mut add = |work: Work, times: usize| {
        total.memory_bytes += work.memory_bytes * times;
        total.dot_ops += work.dot_ops * times;
        total.bf16_ops += work.bf16_ops * times;
        total.fma_ops += work.fma_ops * times;
    };
    let roles = [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down];
    for role in roles.into_iter().chain([LinearRole::Head]) {
        let spec = shape.linear_kernel(role, options.activation)?;
        let kernel = table.serving_kernel(&spec, 1, target);
        let kernel = kernel.expect("the engine was loaded with this table");
        match role {
            LinearRole::Head => add(Work::of(kernel, 1), 1),
            _ => add(Work::of(kernel, rows), shape.num_layers),
        }
    }
    let page_bytes =
        kv_page_bytes(options.kv_dtype, shape.num_kv_heads, shape.head_dim, shape.page_size);
    let attention = Work {
        // The KV cache of a prompt is read once for many rows.
        memory_bytes: context * page_bytes / shape.page_size,
        fma_ops: 4 * rows * context * shape.num_heads * shape.head_dim,
        ..Work::default()
    };
    add(attention, shape.num_layers);
    Ok(total)
}
