//! Tiny models from end to end on emulated CUDA, against the reference backend.

pub(crate) mod device;

use std::ops::ControlFlow;
use std::path::PathBuf;

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::kv_cache::Namespace;
use bespoke::request::{Generation, Request, RequestOutput};
use bespoke::sampling::SamplingParams;
use bespoke::session::{SessionId, SessionTurn};
use bespoke_kernel_gen::spec::{ActivationType, KvDType};

use device::{Counters, Emulated};

fn model(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny").join(case)
}

fn options() -> EngineOptions {
    EngineOptions {
        max_context: Some(96),
        max_sequences: 6,
        max_batch_tokens: 96,
        num_pages: Some(24),
        hash_key: Some([7; 32]),
        ..EngineOptions::new(KernelTable::default())
    }
}

fn cuda(case: &str, options: &EngineOptions, seed: u64) -> (Engine, Counters) {
    let device = Emulated::new(seed);
    let counters = device.counters();
    (Engine::load_on(&model(case), device, options, &mut |_| {}).unwrap(), counters)
}

fn reference(case: &str) -> Engine {
    let options = EngineOptions { backend: BackendChoice::Reference, ..options() };
    Engine::load(&model(case), &options, &mut |_| {}).unwrap()
}

/// Token ids that every tiny model has.
fn prompt(len: usize, first: u32) -> Vec<u32> {
    (0..len as u32).map(|i| 3 + (first + i * 37 + i * i * 11) % 150).collect()
}

fn request(prompt_ids: Vec<u32>, max_tokens: usize) -> Request {
    Request { prompt_ids, max_tokens, ignore_eos: true, ..Request::default() }
}

fn run(engine: &mut Engine, request: Request) -> Generation {
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Logits of a prompt, `[len, vocab]`.
fn logits(engine: &mut Engine, ids: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    engine.logits(ids, &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

/// Logits agree as far as 16-bit rows let them, and so do greedy tokens wherever the runner-up is
/// further behind than logits may differ.
fn check(case: &str, kv_dtype: KvDType, allowed: f32) {
    let (mut engine, _) = cuda(case, &EngineOptions { kv_dtype, ..options() }, 1);
    let mut reference = reference(case);
    for len in [1, 7, 40] {
        let ids = prompt(len, len as u32);
        let expected = logits(&mut reference, &ids);
        let largest = expected.iter().fold(0.0_f32, |max, logit| max.max(logit.abs()));
        let found = logits(&mut engine, &ids);
        let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        let difference = differences.fold(0.0_f32, f32::max);
        assert!(difference <= allowed * largest, "{case}, {len} tokens: {difference} of {largest}");

        let wanted = run(
            &mut reference,
            Request {
                sampling: SamplingParams { num_top_logprobs: 2, ..SamplingParams::default() },
                ..request(ids.clone(), 8)
            },
        );
        let found = run(&mut engine, request(ids, 8));
        assert_eq!(found.output_ids.len(), 8);
        for (step, token) in wanted.output_ids.iter().enumerate() {
            let top = &wanted.top_logprobs[step];
            if found.output_ids[step] != *token {
                let margin = top[0].logprob - top[1].logprob;
                assert!(margin <= 2.0 * allowed * largest, "{case}, step {step}: margin {margin}");
                break;
            }
            let difference = (found.logprobs[step] - wanted.logprobs[step]).abs();
            assert!(difference <= 2.0 * allowed * largest, "{case}, step {step}: {difference}");
        }
    }
    assert!(engine.is_idle());
    engine.check().unwrap();
}

/// Rows of a GPU have 16 bits anyway.
#[test]
fn bf16_activations_are_refused() {
    let options = EngineOptions { activation: ActivationType::Bf16, ..options() };
    let loaded = Engine::load_on(&model("llama-gqa2"), Emulated::new(1), &options, &mut |_| {});
    let Err(error) = loaded else { panic!("a GPU rounds no rows") };
    assert!(error.to_string().contains("`--backend cpu`"), "{error}");
}

#[test]
fn grouped_queries() {
    check("llama-gqa2", KvDType::F16, 0.01);
}

#[test]
fn awq_weights() {
    check("llama-awq-g32", KvDType::F16, 0.01);
}

#[test]
fn awq_and_dense_weights() {
    check("llama-awq-mixed", KvDType::F16, 0.01);
}

#[test]
fn biases_and_many_queries() {
    check("qwen2-gqa7", KvDType::F16, 0.01);
}

#[test]
fn query_norms() {
    check("qwen3-qknorm", KvDType::F16, 0.01);
}

#[test]
fn sliding_window() {
    check("mistral-sliding", KvDType::F16, 0.01);
}

#[test]
fn int8_kv_cache() {
    check("llama-gqa2", KvDType::I8, 0.03);
}

/// Sequences of different lengths at once, prompts in chunks: what comes out is bit for bit what
/// each gives alone, with recorded steps and without.
#[test]
fn batches_change_nothing() {
    let case = "llama-awq-g32";
    let requests = || (0..5).map(|i| request(prompt(3 + 17 * i, i as u32), 6));
    let (mut alone, _) = cuda(case, &options(), 2);
    let expected: Vec<Generation> = requests().map(|request| run(&mut alone, request)).collect();
    for cuda_graphs in [true, false] {
        let options = EngineOptions {
            max_batch_tokens: 24,
            max_chunk_tokens: Some(10),
            cuda_graphs,
            prefix_cache: false,
            ..options()
        };
        let (mut engine, counters) = cuda(case, &options, 3);
        // Batches of one, two and four rows are recorded at load.
        let num_recorded = if cuda_graphs { 3 } else { 0 };
        assert_eq!(counters.num_replays(), num_recorded);
        let ids: Vec<_> = requests().map(|request| engine.add_request(request).unwrap()).collect();
        let mut outputs: Vec<RequestOutput> = Vec::new();
        while !engine.is_idle() {
            engine.step(&mut outputs).unwrap();
            engine.check().unwrap();
        }
        for (id, expected) in ids.iter().zip(&expected) {
            let of_request: Vec<_> = outputs.iter().filter(|output| output.id == *id).collect();
            let tokens: Vec<_> = of_request.iter().filter_map(|output| output.token).collect();
            let logprobs: Vec<_> = of_request.iter().map(|output| output.logprob).collect();
            assert_eq!(tokens, expected.output_ids, "graphs: {cuda_graphs}");
            assert_eq!(logprobs, expected.logprobs, "graphs: {cuda_graphs}");
        }
        assert_eq!(counters.num_replays() > num_recorded, cuda_graphs);
    }
}

/// Greedy rows send their statistics to the host and nothing else.
#[test]
fn greedy_logits_stay_on_the_device() {
    let (mut engine, counters) = cuda("llama-gqa2", &options(), 4);
    run(&mut engine, request(prompt(5, 1), 7));
    assert_eq!(counters.bytes_down(), 7 * 12);
    assert!(counters.num_launches() > 0);
    let vocab_size = engine.shape().vocab_size as u64;
    let sampling = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
    run(&mut engine, Request { sampling, ..request(prompt(5, 1), 1) });
    assert_eq!(counters.bytes_down(), 8 * 12 + 4 * vocab_size);
}

/// Choices share their prompt's pages until they write into them, and draw what each draws alone.
#[test]
fn choices_copy_pages() {
    let sampling = SamplingParams { temperature: 1.0, seed: 5, ..SamplingParams::default() };
    let of = |num_choices| Request {
        sampling: sampling.clone(),
        num_choices,
        ..request(prompt(20, 2), 6)
    };
    let (mut engine, _) = cuda("llama-gqa2", &options(), 5);
    let together = engine.generate_choices(of(3), &mut |_| ControlFlow::Continue(())).unwrap();
    let alone = run(&mut engine, of(1));
    assert_eq!(together[0].output_ids, alone.output_ids);
    assert!(together[1].output_ids != together[2].output_ids, "three draws");
    for (idx, choice) in together.iter().enumerate().skip(1) {
        let seed = bespoke::sampling::choice_seed(5, idx);
        let sampling = SamplingParams { seed, ..sampling.clone() };
        let alone = run(&mut engine, Request { sampling, ..of(1) });
        assert_eq!(choice.output_ids, alone.output_ids, "choice {idx}");
    }
}

/// A session goes on from its file as it does without.
#[test]
fn sessions_survive_in_files() {
    let case = "llama-gqa2";
    let dir = std::env::temp_dir().join(format!("bespoke-emulator-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let id = SessionId::new(Namespace::default(), "talk").unwrap();
    let turn = |ids| Request { session: Some(SessionTurn::of(id.clone())), ..request(ids, 5) };
    let (mut engine, _) = cuda(case, &options(), 6);
    let first = Request {
        session: Some(SessionTurn { start: true, ..SessionTurn::of(id.clone()) }),
        ..request(prompt(37, 3), 5)
    };
    run(&mut engine, first);
    engine.save_session(&id, &dir).unwrap();
    let expected = run(&mut engine, turn(prompt(4, 9)));

    let (mut other, counters) = cuda(case, &options(), 7);
    let path = std::fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
    assert_eq!(other.load_session(&path).unwrap(), id);
    let before = counters.num_launches();
    let found = run(&mut other, turn(prompt(4, 9)));
    assert_eq!((found.output_ids, found.logprobs), (expected.output_ids, expected.logprobs));
    assert!(counters.num_launches() > before);
    std::fs::remove_dir_all(&dir).unwrap();
}

/// Steps without logits read nothing back: the next one must not overwrite what a copy to the
/// device is still reading.
#[test]
fn prompts_in_chunks_wait_for_copies() {
    let options = EngineOptions { max_chunk_tokens: Some(10), ..options() };
    let (mut engine, _) = cuda("llama-gqa2", &options, 8);
    let found = run(&mut engine, request(prompt(60, 4), 2));
    let (mut whole, _) = cuda("llama-gqa2", &self::options(), 9);
    assert_eq!(found.output_ids, run(&mut whole, request(prompt(60, 4), 2)).output_ids);
}
