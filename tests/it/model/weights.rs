//! Tensors against the config: names, types, shapes, values.

use bespoke::engine::Engine;
use bespoke_kernel_gen::model::ModelConfig;
use serde_json::json;

use super::folder::{Folder, assert_refused, load, open};
use super::formats::{Compressed, Gptq, compressed, gptq};

/// Every tensor of the models whose names differ.
const CASES: &[&str] = &[
    "llama-hd80-bias",
    "qwen3-qknorm",
    "phi3-fused",
    "internlm2-fused",
    "llama-awq-g64",
    "llama-awq-mixed",
    "qwen2-gqa7",
];

/// The cases, and quantized models as other programs write them.
fn folders() -> Vec<Folder> {
    let awq = Folder::read("llama-awq-g64");
    let mut all: Vec<Folder> = CASES.iter().map(|case| Folder::read(case)).collect();
    all.push(gptq(&awq, Gptq { zero_offset: 1, has_g_idx: true }));
    all.push(compressed(&awq, Compressed { symmetric: false, dtype: "F16", has_g_idx: true }));
    all
}

#[test]
fn every_missing_tensor_is_named() {
    for folder in folders() {
        for tensor in &folder.tensors {
            let mut folder = folder.clone();
            folder.remove(&tensor.name);
            assert_refused(open(folder.write().path()), &["missing", &tensor.name]);
        }
    }
}

#[test]
fn every_renamed_tensor_is_named() {
    let folder = Folder::read("llama-gqa2");
    for tensor in &folder.tensors {
        let mut folder = folder.clone();
        let copy = format!("{}.copy", tensor.name);
        let mut second = tensor.clone();
        second.name = copy.clone();
        folder.tensors.push(second);
        assert_refused(open(folder.write().path()), &["does not ask for", &copy]);
    }
}

#[test]
fn every_wrong_type_is_named() {
    for folder in folders() {
        for idx in 0..folder.tensors.len() {
            let mut folder = folder.clone();
            let is_awq = folder.config.get("quantization_config");
            let is_awq = is_awq.is_some_and(|config| config["quant_method"] == "awq");
            let tensor = &mut folder.tensors[idx];
            let (found, expected) = match tensor.dtype.as_str() {
                "I32" => ("F32", "I32"),
                "I64" => ("F64", "I64 or I32"),
                "F16" if is_awq => ("BF16", "F16"),
                "F16" => ("I16", "F32 or F16 or BF16"),
                _ => ("I32", "F32 or F16 or BF16"),
            };
            tensor.dtype = found.to_owned();
            let name = tensor.name.clone();
            assert_refused(open(folder.write().path()), &[&name, found, expected]);
        }
    }
}

#[test]
fn every_wrong_shape_is_named() {
    for folder in folders() {
        for idx in 0..folder.tensors.len() {
            let mut folder = folder.clone();
            let tensor = &mut folder.tensors[idx];
            let expected = format!("{:?}", tensor.shape);
            tensor.shape.push(1);
            let found = format!("{:?}", tensor.shape);
            let name = tensor.name.clone();
            assert_refused(open(folder.write().path()), &[&name, &found, &expected]);
        }
    }
}

#[test]
fn config_and_weights_of_other_sizes_are_refused() {
    let mut folder = Folder::read("llama-gqa2");
    folder.config["num_hidden_layers"] = json!(3);
    assert_refused(open(folder.write().path()), &["missing", "model.layers.2."]);
    folder.config["num_hidden_layers"] = json!(1);
    assert_refused(open(folder.write().path()), &["does not ask for", "model.layers.1."]);
    folder.config["num_hidden_layers"] = json!(2);
    folder.config["vocab_size"] = json!(513);
    let words = ["model.embed_tokens.weight", "[512, 64]", "[513, 64]"];
    assert_refused(open(folder.write().path()), &words);
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let mut folder = Folder::read("llama-gqa2");
    let norm = folder.tensor("model.layers.1.input_layernorm.weight");
    norm.bytes[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
    let words = ["model.layers.1.input_layernorm.weight", "not finite", "element 3"];
    assert_refused(load(&folder).map(|_| ()), &words);

    let mut folder = Folder::read("llama-awq-g64");
    let scales = folder.tensor("model.layers.0.mlp.up_proj.scales");
    scales.bytes[4..6].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    let words = ["model.layers.0.mlp.up_proj.scales", "not finite", "element 2"];
    assert_refused(load(&folder).map(|_| ()), &words);
}

#[test]
fn harmless_extra_tensors_are_passed_over() {
    let mut folder = Folder::read("llama-mha-tied");
    let mut head = folder.tensor("model.embed_tokens.weight").clone();
    head.name = "lm_head.weight".to_owned();
    folder.tensors.push(head);
    let mut frequencies = folder.tensor("model.norm.weight").clone();
    frequencies.name = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    folder.tensors.push(frequencies);
    open(folder.write().path()).unwrap();
}

#[test]
fn symmetric_awq_needs_no_zeros() {
    let mut folder = Folder::read("llama-awq-g64");
    folder.tensors.retain(|tensor| !tensor.name.ends_with("qzeros"));
    assert_refused(open(folder.write().path()), &["missing", "qzeros"]);
    folder.config["quantization_config"]["zero_point"] = json!(false);
    let mut symmetric = load(&folder).unwrap();

    // Every zero an 8 in the file must give the same logits.
    let mut folder = Folder::read("llama-awq-g64");
    for tensor in &mut folder.tensors {
        if tensor.name.ends_with("qzeros") {
            tensor.bytes.fill(0x88);
        }
    }
    let mut explicit = load(&folder).unwrap();
    let logits = |engine: &mut Engine| {
        let mut all = Vec::new();
        engine.logits(&[1, 2, 3], &mut |_, row| all.extend_from_slice(row)).unwrap();
        all
    };
    assert_eq!(logits(&mut symmetric), logits(&mut explicit));
}

#[test]
fn narrower_weights_are_widened() {
    let mut folder = Folder::read("llama-gqa2");
    let mut rounded = folder.clone();
    for (narrow, wide) in folder.tensors.iter_mut().zip(&mut rounded.tensors) {
        let values = wide.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let bf16: Vec<half::bf16> = values.map(half::bf16::from_f32).collect();
        narrow.dtype = "BF16".to_owned();
        narrow.bytes = bf16.iter().flat_map(|value| value.to_le_bytes()).collect();
        wide.bytes = bf16.iter().flat_map(|value| value.to_f32().to_le_bytes()).collect();
    }
    let logits = |folder: &Folder| {
        let mut all = Vec::new();
        let mut engine = load(folder).unwrap();
        engine.logits(&[1, 2, 3], &mut |_, row| all.extend_from_slice(row)).unwrap();
        all
    };
    assert_eq!(logits(&folder), logits(&rounded));
}

#[test]
fn a_group_size_that_does_not_divide_is_refused_with_both_numbers() {
    let mut folder = Folder::read("llama-awq-g64");
    folder.config["quantization_config"]["group_size"] = json!(80);
    let config = serde_json::to_string(&folder.config).unwrap();
    let error = ModelConfig::parse(&config).and_then(|config| config.shape("test")).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("80") && message.contains("128"), "{message}");
}
