//! The tiny models against Hugging Face transformers in float32.

use std::ops::ControlFlow;
use std::path::PathBuf;

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::request::Request;
use bespoke_kernel_gen::spec::{ActivationType, KvDType, PAGE_SIZES};
use safetensors::SafeTensors;

use super::golden_dir;

/// Largest difference of a logit: the reference was computed in float32 in another order.
const ABSOLUTE: f32 = 2e-3;
/// Largest difference relative to the largest logit of the sequence.
const RELATIVE: f32 = 1e-3;
const NUM_SEQUENCES: usize = 4;

/// One reference sequence.
struct Expected {
    ids: Vec<u32>,
    /// `[rows, vocab]` of the last `rows` positions
    logits: Vec<f32>,
    greedy: Vec<u32>,
}

fn case_dir(case: &str) -> PathBuf {
    golden_dir().join("tiny").join(case)
}

fn read_expected(case: &str) -> Vec<Expected> {
    let bytes = std::fs::read(case_dir(case).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: String| -> Vec<[u8; 4]> {
        let data = file.tensor(&name).unwrap().data();
        data.chunks_exact(4).map(|bytes| bytes.try_into().unwrap()).collect()
    };
    let ids = |name| words(name).into_iter().map(u32::from_le_bytes).collect();
    (0..NUM_SEQUENCES)
        .map(|i| Expected {
            ids: ids(format!("input_ids.{i}")),
            logits: words(format!("logits.{i}")).into_iter().map(f32::from_le_bytes).collect(),
            greedy: ids(format!("greedy.{i}")),
        })
        .collect()
}

/// Options under which a backend computes in float32 throughout.
fn float_options(backend: BackendChoice, kernels: KernelTable) -> EngineOptions {
    EngineOptions {
        backend,
        kv_dtype: KvDType::F32,
        activation: ActivationType::Float,
        max_context: Some(96),
        ..EngineOptions::new(kernels)
    }
}

fn check(case: &str, options: &EngineOptions) {
    let mut engine = Engine::load(&case_dir(case), options, &mut |_| {}).unwrap();
    let vocab_size = engine.shape().vocab_size;
    for expected in read_expected(case) {
        let len = expected.ids.len();
        let largest = expected.logits.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
        let allowed = ABSOLUTE.min(RELATIVE * largest);
        let first = len - expected.logits.len() / vocab_size;
        let mut next = first;
        engine
            .logits_of(&expected.ids, first..len, &mut |position, logits| {
                assert_eq!(position, next);
                next += 1;
                let expected = &expected.logits[(position - first) * vocab_size..][..vocab_size];
                for (token, (found, expected)) in logits.iter().zip(expected).enumerate() {
                    assert!(
                        (found - expected).abs() <= allowed,
                        "{case}, length {len}, position {position}, token {token}: found {found}, \
                         expected {expected} within {allowed}"
                    );
                }
            })
            .unwrap();
        assert_eq!(next, len);
        if case == "llama-rope-dynamic" {
            // The reference changes the base with every token, a KV cache cannot.
            continue;
        }
        let request = Request {
            prompt_ids: expected.ids,
            max_tokens: expected.greedy.len(),
            ignore_eos: true,
            ..Request::default()
        };
        let generation = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(generation.output_ids, expected.greedy, "{case}, length {len}");
    }
    assert!(engine.is_idle());
}

fn check_reference(case: &str) {
    check(case, &float_options(BackendChoice::Reference, KernelTable::default()));
}

/// The instruction set that the tests' kernels were built for.
fn check_cpu(case: &str) {
    let options = float_options(BackendChoice::Cpu, bespoke_tests::tiny_kernels());
    check(case, &EngineOptions { num_threads: Some(2), ..options });
}

/// Every page size gives the reference's tokens, on kernels and on the reference backend.
#[test]
fn pages_of_every_size() {
    for page_size in PAGE_SIZES {
        for backend in [BackendChoice::Cpu, BackendChoice::Reference] {
            let kernels = bespoke_tests::tiny_kernels_with_pages(page_size);
            assert_eq!(kernels.page_size, page_size);
            check("llama-gqa2", &float_options(backend, kernels));
        }
    }
}

macro_rules! tiny_models {
    ($($test:ident: $case:literal,)*) => {
        /// The cases that have a test each.
        const CASES: &[&str] = &[$($case),*];

        mod reference {
            $(#[test]
            fn $test() {
                super::check_reference($case);
            })*
        }

        mod cpu {
            $(#[test]
            fn $test() {
                super::check_cpu($case);
            })*
        }
    };
}

tiny_models! {
    internlm2_fused: "internlm2-fused",
    llama3_rope: "llama3-rope",
    llama_awq_g128: "llama-awq-g128",
    llama_awq_g32: "llama-awq-g32",
    llama_awq_g64: "llama-awq-g64",
    llama_awq_gchannel: "llama-awq-gchannel",
    llama_awq_mixed: "llama-awq-mixed",
    llama_gqa2: "llama-gqa2",
    llama_hd80_bias: "llama-hd80-bias",
    llama_mha_tied: "llama-mha-tied",
    llama_mqa_hd24: "llama-mqa-hd24",
    llama_rope_dynamic: "llama-rope-dynamic",
    llama_rope_linear: "llama-rope-linear",
    llama_rope_yarn: "llama-rope-yarn",
    mistral_sliding: "mistral-sliding",
    phi3_fused: "phi3-fused",
    qwen2_gqa7: "qwen2-gqa7",
    qwen3_qknorm: "qwen3-qknorm",
}

/// Mixture-of-experts models, refused by a field of their config.
const REFUSED: &[&str] = &["mixtral-moe", "qwen3-moe"];

#[test]
fn mixture_of_experts_is_refused_by_name() {
    let options = float_options(BackendChoice::Reference, KernelTable::default());
    for case in REFUSED {
        let error = match Engine::load(&case_dir(case), &options, &mut |_| {}) {
            Ok(_) => panic!("{case} was loaded"),
            Err(error) => error.to_string(),
        };
        let named = ["num_local_experts", "num_experts", "architectures", "model_type"];
        assert!(named.iter().any(|field| error.contains(field)), "{case}: {error}");
    }
}

#[test]
fn every_tiny_model_has_a_test() {
    let mut found: Vec<String> = std::fs::read_dir(golden_dir().join("tiny"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut tested: Vec<&str> = CASES.iter().chain(REFUSED).copied().collect();
    tested.sort_unstable();
    assert_eq!(found, tested);
}
