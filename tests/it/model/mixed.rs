//! Models that are quantized in some layers only.

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke_kernel_gen::spec::ActivationType;
use serde_json::json;

use super::folder::{Folder, assert_refused, load, load_with, logits, open};

/// Dense linears that hold what the quantized ones mean give the same logits.
#[test]
fn mixtures_have_the_logits_of_the_quantized_model() {
    let quantized = logits(&mut load(&Folder::read("llama-awq-g64")).unwrap());
    let mixed = logits(&mut load(&Folder::read("llama-awq-mixed")).unwrap());
    assert!(quantized == mixed);
}

/// With int8 rows before the quantized linears and float32 rows before the others, logits are as
/// close to the reference's as those of the model that is quantized throughout.
#[test]
fn each_linear_reads_rows_of_its_own_form() {
    let expected = logits(&mut load(&Folder::read("llama-awq-mixed")).unwrap());
    let error = |case| {
        let options = EngineOptions {
            backend: BackendChoice::Cpu,
            activation: ActivationType::Int8,
            ..EngineOptions::new(bespoke_tests::tiny_kernels())
        };
        let found = logits(&mut load_with(&Folder::read(case), &options).unwrap());
        let both = found.iter().zip(&expected);
        let differences = both.map(|(a, b)| f32::from_bits(*a) - f32::from_bits(*b));
        differences.map(|difference| f64::from(difference).powi(2)).sum::<f64>().sqrt()
    };
    let size = expected.iter().map(|logit| f64::from(f32::from_bits(*logit)).powi(2)).sum::<f64>();
    let (mixed, quantized) = (error("llama-awq-mixed"), error("llama-awq-g64"));
    assert!(mixed > 0.0, "the quantized linears read int8 rows");
    assert!(mixed <= quantized && quantized < 0.05 * size.sqrt(), "{mixed} and {quantized}");
}

#[test]
fn tensors_in_the_other_form_are_refused() {
    let sound = Folder::read("llama-awq-mixed");
    let refused = |names, words: &[&str]| {
        let mut folder = sound.clone();
        folder.config["quantization_config"]["modules_to_not_convert"] = names;
        assert_refused(open(folder.write().path()), words);
    };
    refused(
        json!(["model.layers.0.self_attn"]),
        &["missing", "model.layers.1.mlp.down_proj.qweight"],
    );
    refused(
        json!(["model.layers.0.self_attn", "down_proj"]),
        &["missing", "model.layers.0.mlp.down_proj.weight"],
    );
}
