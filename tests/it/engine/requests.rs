//! Requests on a tiny model with the reference backend.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use bespoke::Error;
use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::{Kernel, KernelTable};
use bespoke::kv_cache::Namespace;
use bespoke::request::{FinishReason, Generation, Request, RequestOutput};
use bespoke::sampling::SamplingParams;
use bespoke::tokenizer::Tokenizer;
use bespoke_kernel_gen::spec::{ActivationType, KvDType};

use crate::tokenizer::byte_tokenizer;

fn options() -> EngineOptions {
    EngineOptions {
        backend: BackendChoice::Reference,
        ..EngineOptions::new(KernelTable::default())
    }
}

fn load_case(case: &str, options: &EngineOptions) -> Result<Engine, Error> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/tiny").join(case);
    Engine::load(&dir, options, &mut |_| {})
}

fn load(options: &EngineOptions) -> Engine {
    load_case("llama-gqa2", options).unwrap()
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 37 + 11) % 512).collect()
}

/// A request that samples, so that any change of a logit shows.
fn request(prompt_len: usize, max_tokens: usize) -> Request {
    let sampling = SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::default() };
    Request {
        prompt_ids: prompt(prompt_len),
        max_tokens,
        sampling,
        ignore_eos: true,
        ..Request::default()
    }
}

fn generate(engine: &mut Engine, request: Request) -> Generation {
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[track_caller]
fn assert_refused<T>(result: Result<T, Error>, words: &[&str]) {
    let Err(error) = result else { panic!("accepted") };
    assert!(matches!(error, Error::Request(_)), "{error:?}");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "'{word}' is missing in: {message}");
    }
}

#[test]
fn impossible_requests_are_refused_with_the_numbers() {
    let mut engine = load(&EngineOptions { max_context: Some(64), ..options() });
    assert_refused(engine.add_request(request(0, 1)), &["empty"]);
    assert_refused(engine.add_request(request(64, 1)), &["64 tokens", "context of 64"]);
    assert_refused(engine.add_request(request(5, 0)), &["max_tokens is 0"]);
    let mut outside = request(5, 1);
    outside.prompt_ids[3] = 512;
    assert_refused(engine.add_request(outside), &["512", "place 3"]);
    let mut cold = request(5, 1);
    cold.sampling.temperature = -1.0;
    assert_refused(engine.add_request(cold), &["temperature is -1"]);
    assert!(engine.is_idle());

    let sink = &mut |_: usize, _: &[f32]| panic!("a refused call gives no logits");
    assert_refused(engine.logits(&[], sink), &["empty"]);
    assert_refused(engine.logits(&prompt(65), sink), &["65", "64"]);
    assert_refused(engine.logits(&[1, 600], sink), &["600", "place 1"]);
}

#[test]
fn a_request_that_the_cache_can_never_hold_is_refused() {
    let options = EngineOptions { max_context: Some(256), num_pages: Some(2), ..options() };
    let mut engine = load(&options);
    assert_refused(engine.add_request(request(10, 60)), &["70 tokens", "3 pages", "has 2"]);
    assert_eq!(generate(&mut engine, request(10, 55)).output_ids.len(), 55);
    let result = engine.logits(&prompt(65), &mut |_, _| {});
    assert!(matches!(result, Err(Error::Resources(_))), "{result:?}");
    engine.logits(&prompt(64), &mut |_, _| {}).unwrap();
}

#[test]
fn impossible_options_are_refused() {
    let refuse = |options: EngineOptions, words: &[&str]| {
        assert_refused(load_case("llama-gqa2", &options), words);
    };
    refuse(EngineOptions { max_sequences: 0, ..options() }, &["max_sequences is 0"]);
    let few = EngineOptions { max_sequences: 9, max_batch_tokens: 8, ..options() };
    refuse(few, &["max_batch_tokens is 8", "9"]);
    refuse(EngineOptions { max_context: Some(1), ..options() }, &["max_context is 1"]);
    refuse(EngineOptions { max_context: Some(257), ..options() }, &["257", "256"]);
    refuse(EngineOptions { num_pages: Some(0), ..options() }, &["num_pages is 0"]);
    refuse(EngineOptions { num_pages: Some(1 << 40), ..options() }, &["pages"]);
}

#[test]
fn the_context_defaults_to_the_models_positions() {
    assert_eq!(load(&options()).max_context(), 256);
    // Dynamic scaling stretches 32 positions by its factor, 2.
    let engine = load_case("llama-rope-dynamic", &options()).unwrap();
    assert_eq!(engine.max_context(), 64);
}

#[test]
fn chunks_of_any_size_give_the_same_tokens() {
    let expected = generate(&mut load(&options()), request(70, 20));
    for max_batch_tokens in [1, 3, 16, 69, 71] {
        let options = EngineOptions { max_batch_tokens, max_sequences: 1, ..options() };
        let found = generate(&mut load(&options), request(70, 20));
        assert_eq!(found, expected, "{max_batch_tokens} tokens a step");
    }
}

#[test]
fn neighbours_do_not_change_the_tokens() {
    let lengths = [1, 31, 32, 33, 70, 5];
    let options =
        EngineOptions { max_batch_tokens: 40, max_sequences: 4, num_pages: Some(12), ..options() };
    let mut engine = load(&options);
    let expected: Vec<Generation> =
        lengths.iter().map(|len| generate(&mut engine, request(*len, 24))).collect();
    let ids: Vec<_> =
        lengths.iter().map(|len| engine.add_request(request(*len, 24)).unwrap()).collect();
    let mut outputs = Vec::new();
    while !engine.is_idle() {
        engine.step(&mut outputs).unwrap();
    }
    for (id, expected) in ids.iter().zip(&expected) {
        let of_request = || outputs.iter().filter(|output| output.id == *id);
        let tokens: Vec<u32> = of_request().filter_map(|output| output.token).collect();
        let logprobs: Vec<f32> = of_request().map(|output| output.logprob).collect();
        assert_eq!((tokens, logprobs), (expected.output_ids.clone(), expected.logprobs.clone()));
        let ends = of_request().filter(|output| output.finish_reason.is_some()).count();
        assert_eq!(ends, 1);
    }
}

/// Two sequences of 5 pages each in a cache of 7: the later one is preempted, and nobody sees it.
#[test]
fn sequences_that_do_not_fit_together_all_end() {
    let request = |seed| {
        let mut request = request(68, 70);
        request.sampling.seed = seed;
        request.prompt_ids[0] = seed as u32;
        request
    };
    let mut alone = load(&options());
    let expected: Vec<Generation> =
        (0..6).map(|seed| generate(&mut alone, request(seed))).collect();
    let mut engine = load(&EngineOptions { num_pages: Some(7), ..options() });
    for seed in 0..6 {
        engine.add_request(request(seed)).unwrap();
    }
    let mut found = vec![Generation::default(); 6];
    let mut outputs = Vec::new();
    while !engine.is_idle() {
        engine.step(&mut outputs).unwrap();
        engine.check().unwrap();
        outputs.drain(..).for_each(|output| found[output.id.0 as usize].push(&output));
    }
    assert_eq!(found, expected);
    assert!(engine.status().num_preemptions > 0);
    assert_eq!(engine.status().pages.active, 0);
}

#[test]
fn a_beginning_that_was_computed_is_found_in_its_namespace() {
    let options = EngineOptions { num_pages: Some(32), ..options() };
    let cached = |engine: &mut Engine, request: Request| {
        let mut num_cached = 0;
        engine
            .generate(request, &mut |output| {
                num_cached = output.num_cached;
                ControlFlow::Continue(())
            })
            .unwrap();
        num_cached
    };
    let mut engine = load(&options);
    assert_eq!(cached(&mut engine, request(100, 4)), 0);
    assert_eq!(cached(&mut engine, request(100, 4)), 96, "three full pages");
    assert_eq!(cached(&mut engine, request(96, 4)), 95, "a row is left to compute");
    assert_eq!(cached(&mut engine, request(70, 4)), 64);
    let mut other = request(100, 4);
    other.prompt_ids[40] += 1;
    assert_eq!(cached(&mut engine, other), 32, "up to the page that differs");
    let foreign = Request { namespace: Namespace(1), ..request(100, 4) };
    assert_eq!(cached(&mut engine, foreign), 0);
    let mut without = load(&EngineOptions { prefix_cache: false, ..options });
    assert_eq!(cached(&mut without, request(100, 4)), 0);
    assert_eq!(cached(&mut without, request(100, 4)), 0);
}

#[test]
fn stop_strings_end_an_answer_within_the_engine() {
    let mut engine = load(&options());
    let stopping = |stop: &str| Request { stop_strings: vec![stop.to_owned()], ..request(30, 60) };
    assert_refused(engine.add_request(stopping("x")), &["tokenizer"]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
    engine.set_tokenizer(Arc::new(Tokenizer::load(dir.path()).unwrap()));
    let long = generate(&mut engine, request(30, 60));
    let is_known = |id: &u32| *id < 259;
    assert!(long.output_ids.iter().all(is_known), "the rest of the vocabulary is padding");
    assert_refused(engine.add_request(stopping("")), &["0 bytes", "1 to 1024"]);
    let many = Request { stop_strings: vec!["x".to_owned(); 17], ..request(30, 60) };
    assert_refused(engine.add_request(many), &["17 stop strings", "16"]);
    // Ids are bytes in this tokenizer; any printable one will do.
    let is_printable = |id: &u32| (33..127).contains(id);
    let stop_at = long.output_ids.iter().position(is_printable).unwrap();
    let stop = char::from(long.output_ids[stop_at] as u8).to_string();
    let short = generate(&mut engine, stopping(&stop));
    assert_eq!(short.output_ids, long.output_ids[..=stop_at]);
    assert_eq!(short.finish_reason, Some(FinishReason::Stop));
}

#[test]
fn outputs_end_where_they_should() {
    let mut engine = load(&EngineOptions { max_context: Some(40), ..options() });
    let long = generate(&mut engine, request(30, 1000));
    assert_eq!((long.output_ids.len(), long.finish_reason), (10, Some(FinishReason::Length)));

    let stop_at = long.output_ids[4];
    let first = long.output_ids.iter().position(|id| *id == stop_at).unwrap();
    let mut stopping = request(30, 10);
    stopping.stop_token_ids = vec![stop_at];
    let short = generate(&mut engine, stopping);
    assert_eq!(short.output_ids, long.output_ids[..=first]);
    assert_eq!(short.finish_reason, Some(FinishReason::Stop));

    let mut num_seen = 0;
    let broken = engine
        .generate(request(30, 10), &mut |_: &RequestOutput| {
            num_seen += 1;
            if num_seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!(broken.output_ids, long.output_ids[..3]);
    assert!(engine.is_idle());
}

#[test]
fn a_cancelled_request_gives_its_pages_back() {
    let mut engine =
        load(&EngineOptions { max_context: Some(64), num_pages: Some(2), ..options() });
    let mut outputs = Vec::new();
    for num_steps in 0..4 {
        let running = engine.add_request(request(40, 20)).unwrap();
        let waiting = engine.add_request(request(40, 20)).unwrap();
        (0..num_steps).for_each(|_| engine.step(&mut outputs).unwrap());
        assert!(engine.cancel(waiting) && engine.cancel(running));
        assert!(!engine.cancel(running));
        assert!(engine.is_idle());
    }
    // The cache holds one sequence of 64 tokens: a leaked page would make this fail.
    engine.logits(&prompt(64), &mut |_, _| {}).unwrap();
}

#[test]
fn logprobs_are_those_of_the_logits() {
    let mut engine = load(&options());
    let generation = generate(&mut engine, request(9, 5));
    let ids = [prompt(9), generation.output_ids.clone()].concat();
    let mut logprobs = Vec::new();
    engine
        .logits_of(&ids, 8..13, &mut |position, logits| {
            let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            logprobs.push(f64::from(logits[ids[position + 1] as usize]) - sum.ln());
        })
        .unwrap();
    for (found, expected) in generation.logprobs.iter().zip(logprobs) {
        assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} {expected}");
    }
}

#[test]
fn memory_counts_weights_and_pages() {
    let engine = load(&EngineOptions { num_pages: Some(3), ..options() });
    let memory = engine.memory();
    // 2 layers, keys and values, 32 slots of 2 heads of 16 float32 values.
    assert_eq!(memory.kv_cache_bytes, 3 * 2 * 2 * 32 * 2 * 16 * 4);
    let per_layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160 + 2 * 64;
    assert_eq!(memory.weights_bytes, 4 * (2 * 512 * 64 + 64 + 2 * per_layer));
}

#[test]
fn a_binary_without_kernels_names_what_is_missing() {
    let options = EngineOptions { backend: BackendChoice::Auto, ..options() };
    let Err(error) = load_case("llama-gqa2", &options) else { panic!("loaded") };
    let Error::MissingKernels { symbols, .. } = error else { panic!("{error:?}") };
    assert!(!symbols.is_empty());
}

/// A table without one kernel: loading a model that needs it names it, and nothing else fails.
#[test]
fn a_kernel_taken_from_the_table_is_missed_by_name() {
    let table = bespoke_tests::tiny_kernels();
    let all = table.kernels;
    let mut num_missed = 0;
    for missing in all {
        let kernels: Vec<Kernel> =
            all.iter().filter(|kernel| kernel.symbol != missing.symbol).copied().collect();
        let options = EngineOptions {
            backend: BackendChoice::Cpu,
            kv_dtype: KvDType::F32,
            activation: ActivationType::Float,
            num_threads: Some(1),
            ..EngineOptions::new(KernelTable { kernels: kernels.leak(), ..table })
        };
        match load_case("llama-gqa2", &options) {
            Ok(_) => {}
            Err(Error::MissingKernels { symbols, .. }) => {
                assert_eq!(symbols, [missing.symbol]);
                num_missed += 1;
            }
            Err(error) => panic!("{}: {error}", missing.symbol),
        }
    }
    // Five linears in three row regimes; embed, norm, rope, two attentions, activation, sample.
    assert_eq!(num_missed, 5 * 3 + 7);
}
