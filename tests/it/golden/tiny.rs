//! The tiny models against Hugging Face transformers in float32.

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke_kernel_gen::spec::PAGE_SIZES;

use super::expected::{case_dir, check, float_options};
use super::golden_dir;

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
