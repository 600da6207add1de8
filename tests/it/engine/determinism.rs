//! The same tokens and the same bits of their log-probabilities whoever shares the batch.
//!
//! Requests run alone first, one after the other, in an engine of their own. Then they run again in
//! random company, in chunks of every size, with pages found in the cache or not, preempted or not,
//! in sessions, as several answers, through a handle, on one thread and on two. Nothing may differ.

mod inverse;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::handle::{EngineHandle, Event, HandleLimits, Submission};
use bespoke::import::environment;
use bespoke::kernels::{KernelTable, generated};
use bespoke::kv_cache::Namespace;
use bespoke::request::{Generation, Request, RequestId};
use bespoke::sampling::{SamplingParams, choice_seed};
use bespoke::session::{SessionId, SessionTurn};
use bespoke_kernel_gen::spec::{ActivationType, KvDType};

use crate::golden::golden_dir;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// A model, how it runs, and how long its requests are.
struct Setup {
    dir: PathBuf,
    options: EngineOptions,
    num_requests: usize,
    prompt_len_max: usize,
    max_tokens: usize,
}

/// A request and what it gives alone.
struct Case {
    request: Request,
    alone: Generation,
}

impl Setup {
    fn load(&self, options: EngineOptions) -> Engine {
        Engine::load(&self.dir, &options, &mut |_| {}).unwrap()
    }

    /// The longest request takes so many pages.
    fn num_pages(&self) -> usize {
        (self.prompt_len_max + self.max_tokens).div_ceil(32)
    }

    /// Requests of all kinds; every third begins as the one before.
    fn requests(&self, vocab_size: usize) -> Vec<Request> {
        let mut random = Random(11);
        let mut requests: Vec<Request> = Vec::new();
        for idx in 0..self.num_requests {
            let lens = [1, 31, 32, 33, 64, self.prompt_len_max];
            let len = match random.below(2) {
                0 => lens[random.below(lens.len())].min(self.prompt_len_max),
                _ => 1 + random.below(self.prompt_len_max),
            };
            let mut prompt_ids: Vec<u32> =
                (0..len).map(|_| random.below(vocab_size) as u32).collect();
            if idx % 3 == 2 {
                let earlier = &requests[idx - 1].prompt_ids;
                let num_shared = earlier.len().min(len);
                prompt_ids[..num_shared].copy_from_slice(&earlier[..num_shared]);
            }
            requests.push(Request {
                prompt_ids,
                max_tokens: 1 + random.below(self.max_tokens),
                sampling: sampling(idx),
                ignore_eos: true,
                ..Request::default()
            });
        }
        requests
    }

    fn cases(&self) -> Vec<Case> {
        let options = EngineOptions { max_sequences: 1, prefix_cache: false, ..self.options };
        let mut engine = self.load(options);
        let requests = self.requests(engine.shape().vocab_size);
        let run = |request: Request| {
            let alone = generate(&mut engine, request.clone());
            Case { request, alone }
        };
        requests.into_iter().map(run).collect()
    }

    /// Runs everything that may not change a bit.
    fn check(&self) -> Result<(), String> {
        let cases = self.cases();
        let pages = |count: usize| Some(self.num_pages() * count);
        let base = EngineOptions { max_sequences: 64, num_pages: pages(64), ..self.options };
        for (name, options) in [
            ("64 at once", base),
            ("without prefixes", EngineOptions { prefix_cache: false, ..base }),
            ("chunks of 1", EngineOptions { max_chunk_tokens: Some(1), ..base }),
            ("chunks of 16", EngineOptions { max_chunk_tokens: Some(16), ..base }),
            ("chunks of 64", EngineOptions { max_chunk_tokens: Some(64), ..base }),
            ("64 rows", EngineOptions { max_batch_tokens: 64, ..base }),
            ("two threads", EngineOptions { num_threads: Some(2), ..base }),
        ] {
            check_company(&mut self.load(options), &cases, name)?;
        }
        let few = EngineOptions { num_pages: pages(1).map(|num| num + 2), ..base };
        let mut engine = self.load(few);
        check_company(&mut engine, &cases, "few pages")?;
        assert!(engine.status().num_preemptions > 0, "nothing was preempted");
        check_sessions(&mut self.load(base), &cases)?;
        check_choices(&mut self.load(base), &cases)?;
        self.check_handle(base, cases)
    }

    /// Through a handle, several at once.
    fn check_handle(&self, options: EngineOptions, cases: Vec<Case>) -> Result<(), String> {
        let dir = self.dir.clone();
        let load = move || Engine::load(&dir, &options, &mut |_| {});
        let handle = EngineHandle::start(load, HandleLimits::default()).unwrap();
        let submit = |case: &Case| match handle.submit(case.request.clone()).unwrap() {
            Submission::Accepted(stream) => stream,
            other => panic!("{other:?}", other = other.map(|_| ())),
        };
        let streams: Vec<_> = cases.iter().map(submit).collect();
        for (case_idx, (case, stream)) in cases.iter().zip(streams).enumerate() {
            let mut generation = Generation::default();
            for event in stream {
                match event {
                    Event::Output(output) => generation.push(&output),
                    last => assert_eq!(last, Event::Finished),
                }
            }
            compare(&generation, &case.alone, "streamed", case_idx)?;
        }
        Ok(())
    }
}

/// Greedy, seeded, and with parameters that look back.
fn sampling(idx: usize) -> SamplingParams {
    let seeded = SamplingParams { temperature: 0.9, seed: idx as u64, ..SamplingParams::default() };
    match idx % 4 {
        0 | 1 => SamplingParams::default(),
        2 => SamplingParams { top_k: 40, top_p: 0.95, num_top_logprobs: 3, ..seeded },
        _ => SamplingParams { repetition_penalty: 1.1, frequency_penalty: 0.5, ..seeded },
    }
}

fn generate(engine: &mut Engine, request: Request) -> Generation {
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn compare(found: &Generation, alone: &Generation, how: &str, idx: usize) -> Result<(), String> {
    let bits = |generation: &Generation| -> Vec<u32> {
        let tops = generation.top_logprobs.iter().flatten().map(|top| top.logprob);
        let logprobs = generation.logprobs.iter().copied();
        logprobs.chain(tops).map(f32::to_bits).collect()
    };
    match found == alone && bits(found) == bits(alone) {
        true => Ok(()),
        false => Err(format!("request {idx}, {how}: found {found:?}, alone {alone:?}")),
    }
}

/// Every request twice, in random order, a few more after each step.
fn check_company(engine: &mut Engine, cases: &[Case], how: &str) -> Result<(), String> {
    let mut random = Random(3);
    let mut waiting: Vec<usize> = (0..cases.len()).chain(0..cases.len()).collect();
    let mut running: BTreeMap<RequestId, (usize, Generation)> = BTreeMap::new();
    let mut outputs = Vec::new();
    while !(waiting.is_empty() && engine.is_idle()) {
        for _ in 0..random.below(16).min(waiting.len()) {
            let case_idx = waiting.swap_remove(random.below(waiting.len()));
            let id = engine.add_request(cases[case_idx].request.clone()).unwrap();
            running.insert(id, (case_idx, Generation::default()));
        }
        outputs.clear();
        engine.step(&mut outputs).unwrap();
        for output in &outputs {
            let (case_idx, generation) = running.get_mut(&output.id).unwrap();
            generation.push(output);
            if output.finish_reason.is_some() {
                compare(generation, &cases[*case_idx].alone, how, *case_idx)?;
            }
        }
    }
    Ok(())
}

/// A conversation gives what its whole history as one prompt gives.
fn check_sessions(engine: &mut Engine, cases: &[Case]) -> Result<(), String> {
    let id = SessionId::new(Namespace(0), "talk").unwrap();
    for pair in cases.windows(2).step_by(2) {
        let turn = |request: &Request, start: bool| Request {
            session: Some(SessionTurn { start, ..SessionTurn::of(id.clone()) }),
            ..request.clone()
        };
        generate(engine, turn(&pair[0].request, true));
        let mut history = engine.session_tokens(&id).unwrap().to_vec();
        history.extend_from_slice(&pair[1].request.prompt_ids);
        if history.len() + pair[1].request.max_tokens > engine.max_context() {
            continue;
        }
        let found = generate(engine, turn(&pair[1].request, false));
        // In a namespace of its own, so that nothing of the session is found.
        let namespace = Namespace(1 + history.len() as u64);
        let whole = Request { prompt_ids: history, namespace, ..pair[1].request.clone() };
        compare(&found, &generate(engine, whole), "in a session", 0)?;
    }
    Ok(())
}

/// Several answers are those of several requests.
fn check_choices(engine: &mut Engine, cases: &[Case]) -> Result<(), String> {
    let sampled = cases.iter().filter(|case| case.request.sampling.temperature > 0.0);
    for case in sampled.take(4) {
        let request = Request { num_choices: 3, ..case.request.clone() };
        let seed = request.sampling.seed;
        let choices = engine.generate_choices(request, &mut |_| ControlFlow::Continue(())).unwrap();
        for (choice_idx, choice) in choices.iter().enumerate() {
            let mut request = case.request.clone();
            request.sampling.seed = choice_seed(seed, choice_idx);
            request.namespace = Namespace(1 + choice_idx as u64);
            compare(choice, &generate(engine, request), "one of several answers", choice_idx)?;
        }
    }
    Ok(())
}

fn tiny(case: &str, kernels: KernelTable, kv_dtype: KvDType) -> Setup {
    Setup {
        dir: golden_dir().join("tiny").join(case),
        options: EngineOptions {
            backend: BackendChoice::Cpu,
            kv_dtype,
            activation: ActivationType::Int8,
            num_threads: Some(1),
            max_context: Some(256),
            ..EngineOptions::new(kernels)
        },
        num_requests: 48,
        prompt_len_max: 90,
        max_tokens: 60,
    }
}

#[track_caller]
fn check_tiny(case: &str, kv_dtype: KvDType) {
    if let Err(message) = tiny(case, bespoke_tests::tiny_kernels(), kv_dtype).check() {
        panic!("{case}: {message}");
    }
}

#[test]
fn dense_weights_in_any_company() {
    check_tiny("llama-gqa2", KvDType::F32);
}

#[test]
fn int4_weights_in_any_company() {
    check_tiny("llama-awq-g32", KvDType::F16);
    check_tiny("llama-awq-g64", KvDType::I8);
}

#[test]
fn int4_and_dense_weights_in_any_company() {
    check_tiny("llama-awq-mixed", KvDType::F16);
}

#[test]
fn odd_heads_windows_and_norms_in_any_company() {
    check_tiny("llama-mqa-hd24", KvDType::I8);
    check_tiny("mistral-sliding", KvDType::F16);
    check_tiny("qwen3-qknorm", KvDType::I8);
}

#[test]
fn moving_rotary_bases_in_any_company() {
    check_tiny("llama-rope-dynamic", KvDType::F16);
}

/// A model of the cache that the quick start leaves.
pub(crate) fn cached_model(name: &str) -> Option<PathBuf> {
    let dir = environment::cache().unwrap().models_dir().join(name);
    let is_there = |dir: &Path| dir.join("config.json").is_file();
    if is_there(&dir) {
        return Some(dir);
    }
    let required = std::env::var("BESPOKE_REQUIRE_MODEL").is_ok_and(|value| value == "1");
    assert!(!required, "BESPOKE_REQUIRE_MODEL is 1, but {} holds no model", dir.display());
    println!("skipped: no model {name}");
    None
}

#[test]
fn smollm2_in_any_company() {
    let Some(dir) = cached_model("smollm2-135m-awq-g64") else { return };
    let setup = Setup {
        dir,
        options: EngineOptions {
            num_threads: Some(1),
            max_context: Some(512),
            ..EngineOptions::new(generated::table())
        },
        num_requests: 16,
        prompt_len_max: 100,
        max_tokens: 60,
    };
    setup.check().unwrap();
}
