//! SmolLM2-135M-Instruct, a real model, against llama.cpp in float32.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::import::environment;
use bespoke::kernels::{KernelTable, generated};
use bespoke::perplexity;
use bespoke::quantize::{self, RtnOptions};
use bespoke::request::{Request, RequestId, RequestOutput};
use bespoke::tokenizer::chat::{ChatOptions, parse_messages};
use bespoke::tokenizer::{SpecialTokens, Tokenizer};
use bespoke_kernel_gen::spec::{ActivationType, GroupSize, KvDType};
use serde_json::{Map, Value};

use super::golden_dir;

/// Steps with a smaller gap to the runner-up may go either way.
const MARGIN_MIN: f64 = 0.02;
/// Largest difference of a log-probability.
const LOGPROB: f64 = 0.02;

/// The model's folder in the model cache. Without it a test has nothing to check, which is a
/// failure where `BESPOKE_REQUIRE_MODEL` is 1.
pub(crate) fn model_dir() -> Option<PathBuf> {
    let dir = environment::cache().unwrap().models_dir().join("smollm2-135m");
    if dir.join("config.json").is_file() {
        return Some(dir);
    }
    let required = std::env::var("BESPOKE_REQUIRE_MODEL").is_ok_and(|value| value == "1");
    assert!(!required, "BESPOKE_REQUIRE_MODEL is 1, but {} holds no model", dir.display());
    println!("skipped: no model");
    None
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

/// Greedy continuations give llama.cpp's tokens up to the first near tie, and its probabilities.
fn check_greedy(options: &EngineOptions) {
    let Some(dir) = model_dir() else { return };
    let text = std::fs::read_to_string(golden_dir().join("smollm2-135m-greedy.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 13);
    let mut engine = Engine::load(&dir, options, &mut |_| {}).unwrap();
    let mut outputs = Vec::new();
    for case in cases {
        let request = Request {
            prompt_ids: ids(&case["prompt_ids"]),
            max_tokens: case["steps"].as_array().unwrap().len(),
            ..Request::default()
        };
        engine.add_request(request).unwrap();
    }
    while !engine.is_idle() {
        engine.step(&mut outputs).unwrap();
    }
    for (case_idx, case) in cases.iter().enumerate() {
        let of_case = outputs.iter().filter(|output| output.id == RequestId(case_idx as u64));
        check_case(case_idx, case["steps"].as_array().unwrap(), of_case);
    }
}

fn check_case<'a>(
    case_idx: usize,
    steps: &[Value],
    mut outputs: impl Iterator<Item = &'a RequestOutput>,
) {
    for (step_idx, step) in steps.iter().enumerate() {
        let place = format!("case {case_idx}, step {step_idx}");
        let output = outputs.next();
        let token = output.and_then(|output| output.token).map(u64::from);
        if token != step["id"].as_u64() {
            let margin = step["margin"].as_f64().unwrap();
            assert!(margin <= MARGIN_MIN, "{place}: found {token:?}, expected {step}");
            return;
        }
        let logprob = f64::from(output.map_or(f32::NAN, |output| output.logprob));
        let difference = (logprob - step["logprob"].as_f64().unwrap()).abs();
        assert!(difference <= LOGPROB, "{place}: log-probability {logprob}, expected {step}");
    }
    assert_eq!(outputs.next(), None, "case {case_idx}: more tokens than expected");
}

fn options(backend: BackendChoice, kernels: KernelTable) -> EngineOptions {
    EngineOptions {
        backend,
        kv_dtype: KvDType::F32,
        max_context: Some(256),
        ..EngineOptions::new(kernels)
    }
}

/// The imported tokenizer gives the ids of the reference, and the chat template its text.
#[test]
fn prompts_have_their_ids() {
    let Some(dir) = model_dir() else { return };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let text = std::fs::read_to_string(golden_dir().join("smollm2-135m-greedy.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let prompt = match &case["rendered"] {
            Value::String(rendered) => {
                let messages = parse_messages(&case["messages"].to_string()).unwrap();
                let template = tokenizer.chat_template().unwrap();
                let (tools, now) = (Value::Null, SystemTime::UNIX_EPOCH);
                let options =
                    ChatOptions { add_generation_prompt: true, tools, now, kwargs: Map::new() };
                let found = template.render(&messages, &options).unwrap();
                assert_eq!(&found, rendered);
                rendered
            }
            _ => case["text"].as_str().unwrap(),
        };
        let found = tokenizer.encode(prompt, SpecialTokens::Add).unwrap();
        assert_eq!(found, ids(&case["prompt_ids"]), "{prompt:?}");
    }
}

#[test]
fn greedy_reference() {
    check_greedy(&options(BackendChoice::Reference, KernelTable::default()));
}

#[test]
fn greedy_cpu() {
    check_greedy(&options(BackendChoice::Cpu, generated::table()));
}

/// Perplexity over the first `num_chunks_max` chunks of the evaluation text.
fn perplexity(dir: &Path, options: &EngineOptions, num_chunks_max: usize) -> f64 {
    const CTX: usize = 512;
    let text = std::fs::read_to_string(golden_dir().join("wikitext2-eval.txt")).unwrap();
    let tokenizer = Tokenizer::load(dir).unwrap();
    let mut ids = tokenizer.encode(&text, SpecialTokens::Omit).unwrap();
    ids.truncate(num_chunks_max.saturating_mul(CTX));
    let options = EngineOptions { max_context: Some(CTX), max_sequences: 1, ..*options };
    let mut engine = Engine::load(dir, &options, &mut |_| {}).unwrap();
    perplexity::measure(&mut engine, &ids, CTX, &mut |_, _, _| {}).unwrap().ppl
}

#[track_caller]
fn assert_near(found: f64, expected: f64, allowed: f64) {
    assert!((found - expected).abs() <= allowed, "{found}, expected {expected} ± {allowed}");
}

#[test]
fn perplexity_cpu() {
    let Some(dir) = model_dir() else { return };
    let options = EngineOptions::new(generated::table());
    assert_near(perplexity(&dir, &options, usize::MAX), 17.60, 0.05);
}

/// Smaller elements of the KV cache cost little: `allowed` is the loss of perplexity against
/// float16, `bytes` of a token and head, K and V together.
fn check_kv(kv_dtype: KvDType, allowed: f64, bytes: usize) {
    let Some(dir) = model_dir() else { return };
    let options = |kv_dtype| EngineOptions {
        kv_dtype,
        max_sequences: 1,
        ..EngineOptions::new(generated::table())
    };
    assert_near(perplexity(&dir, &options(kv_dtype), usize::MAX), 17.60, allowed);
    let engine = Engine::load(&dir, &options(kv_dtype), &mut |_| {}).unwrap();
    let shape = engine.shape();
    assert_eq!(shape.head_dim, 64);
    let num_slots = engine.max_context().next_multiple_of(shape.page_size);
    let num_heads = shape.num_layers * shape.num_kv_heads;
    assert_eq!(engine.memory().kv_cache_bytes, num_slots * num_heads * bytes);
}

#[test]
fn kv_cache_in_int8() {
    check_kv(KvDType::I8, 0.1, 2 * (64 + 4));
}

#[test]
fn kv_cache_in_int4() {
    check_kv(KvDType::I4, 0.6, 2 * (32 + 4));
}

/// The reference backend is too slow for the whole text; on a chunk it must agree with the kernels,
/// whose figure for the whole text is published.
#[test]
fn perplexity_reference() {
    let Some(dir) = model_dir() else { return };
    let reference = options(BackendChoice::Reference, KernelTable::default());
    let expected = perplexity(&dir, &options(BackendChoice::Cpu, generated::table()), 1);
    assert_near(perplexity(&dir, &reference, 1), expected, 1e-3 * expected);
}

/// Quantizes by rounding to nearest and measures with both kinds of activations.
fn check_rounded(group_size: usize, expected: f64) {
    let Some(dir) = model_dir() else { return };
    let folder = tempfile::tempdir().unwrap();
    let quantized = folder.path().join("quantized");
    let rtn_options = RtnOptions::new(GroupSize::Of(group_size));
    quantize::rtn(&dir, &quantized, &rtn_options, &mut |_| {}).unwrap();
    for (activation, allowed) in [(ActivationType::Float, 0.10), (ActivationType::Int8, 0.30)] {
        let options = EngineOptions { activation, ..EngineOptions::new(generated::table()) };
        assert_near(perplexity(&quantized, &options, usize::MAX), expected, allowed);
    }
}

#[test]
fn perplexity_rounded_in_groups_of_64() {
    check_rounded(64, 21.60);
}

#[test]
fn perplexity_rounded_in_groups_of_32() {
    check_rounded(32, 21.06);
}
