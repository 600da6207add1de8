//! The tiny models against Hugging Face transformers in float32.

use std::path::Path;

use bespoke::backend::cpu::is_available;
use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke_kernel_gen::spec::{ActivationType, PAGE_SIZES};
use bespoke_kernel_gen::target::Target;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::expected::{NUM_SEQUENCES, case_dir, check, float_options, read_expected};
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

/// The tiny model `llama-hd80-bias` with its weights rounded to bfloat16, in a folder.
pub(crate) fn bf16_model() -> tempfile::TempDir {
    let (from, to) = (case_dir("llama-hd80-bias"), tempfile::tempdir().unwrap());
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let config = config.replace("\"float32\"", "\"bfloat16\"");
    std::fs::write(to.path().join("config.json"), config).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let rounded = |bytes: &[u8]| -> Vec<u8> {
        let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect()
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .iter()
        .map(|(name, view)| (name.clone(), view.shape().to_vec(), rounded(view.data())))
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let path = to.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    to
}

/// Logits of the longest reference sequence.
fn bf16_logits(model: &Path, options: &EngineOptions) -> Vec<f32> {
    let mut engine = Engine::load(model, options, &mut |_| {}).unwrap();
    let ids = read_expected("llama-hd80-bias").swap_remove(NUM_SEQUENCES - 1).ids;
    let mut all = Vec::new();
    engine.logits(&ids, &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

fn root_mean_square(values: impl Iterator<Item = f32>) -> f64 {
    let squares: Vec<f64> = values.map(|value| f64::from(value).powi(2)).collect();
    (squares.iter().sum::<f64>() / squares.len() as f64).sqrt()
}

/// Rows that are rounded to bfloat16 are off by 2⁻⁹ of an element at most, and by about 2⁻¹⁰ on
/// average. Fourteen linears see such rows, seven a layer and the head last; their errors are
/// independent, so that logits are off by about √14 · 2⁻¹⁰ = 0.4 % of their size.
#[test]
fn bf16_activations_stay_close_to_float() {
    const RELATIVE: f64 = 0.01;
    let model = bf16_model();
    let with = |backend, target, activation| {
        let options = float_options(backend, bespoke_tests::bf16_kernels());
        let options = EngineOptions { target, activation, num_threads: Some(2), ..options };
        bf16_logits(model.path(), &options)
    };
    let (float, bf16) = (ActivationType::Float, ActivationType::Bf16);
    let expected = with(BackendChoice::Reference, None, float);
    let size = root_mean_square(expected.iter().copied());
    let error = |found: &[f32]| {
        assert_eq!(found.len(), expected.len());
        root_mean_square(found.iter().zip(&expected).map(|(a, b)| a - b)) / size
    };
    let targets = Target::ALL.into_iter().filter(|target| is_available(*target));
    let cpu = targets.map(|target| (BackendChoice::Cpu, Some(target)));
    for (backend, target) in [(BackendChoice::Reference, None)].into_iter().chain(cpu) {
        let exact = error(&with(backend, target, float));
        let rounded = error(&with(backend, target, bf16));
        assert!(exact < 1e-5, "{backend:?} {target:?}: {exact} with float activations");
        let is_rounded = (1e-4..RELATIVE).contains(&rounded);
        assert!(is_rounded, "{backend:?} {target:?}: {rounded} with bf16 activations");
    }
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
