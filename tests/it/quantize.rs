//! Round-to-nearest quantization of whole folders, against a naive computation.

mod awq;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bespoke::files::IfExists;
use bespoke::quantize::awq_format::{pack, unpack};
use bespoke::quantize::{RtnOptions, rtn};
use bespoke::safetensors_writer::{SafetensorsWriter, TensorSpec};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::GroupSize;
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 96;

/// Name, shape and values of each tensor.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A Llama of two layers with weights that are fixed and irregular.
fn model() -> Tensors {
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let seed = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31) + u64::from(byte));
        let value = |i: u64| {
            let bits = (seed + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            (bits as f32 / 8_388_608.0 - 1.0) * 0.1
        };
        let count = shape.iter().product::<usize>() as u64;
        tensors.insert(name, (shape.to_vec(), (0..count).map(value).collect()));
    };
    add("model.embed_tokens.weight".to_owned(), &[32, HIDDEN]);
    add("model.norm.weight".to_owned(), &[HIDDEN]);
    for layer in 0..2 {
        let name = |module: &str| format!("model.layers.{layer}.{module}.weight");
        add(name("input_layernorm"), &[HIDDEN]);
        add(name("post_attention_layernorm"), &[HIDDEN]);
        add(name("self_attn.q_proj"), &[64, HIDDEN]);
        add(name("self_attn.k_proj"), &[32, HIDDEN]);
        add(name("self_attn.v_proj"), &[32, HIDDEN]);
        add(name("self_attn.o_proj"), &[HIDDEN, 64]);
        add(name("mlp.gate_proj"), &[INTERMEDIATE, HIDDEN]);
        add(name("mlp.up_proj"), &[INTERMEDIATE, HIDDEN]);
        add(name("mlp.down_proj"), &[HIDDEN, INTERMEDIATE]);
    }
    tensors
}

fn config() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "torch_dtype": "float32", "bos_token_id": 1,
        "eos_token_id": 2,
    })
}

fn encode(dtype: Dtype, value: f32) -> Vec<u8> {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let (halves, _) = bytes.as_chunks::<2>();
    let (words, _) = bytes.as_chunks::<4>();
    match dtype {
        Dtype::F16 => halves.iter().map(|h| f16::from_le_bytes(*h).to_f32()).collect(),
        Dtype::BF16 => halves.iter().map(|h| bf16::from_le_bytes(*h).to_f32()).collect(),
        _ => words.iter().map(|w| f32::from_le_bytes(*w)).collect(),
    }
}

fn write_file(path: &Path, tensors: &Tensors, dtype: Dtype) {
    let spec = |(name, (shape, _)): (&String, &(Vec<usize>, Vec<f32>))| TensorSpec {
        name: name.clone(),
        dtype,
        shape: shape.clone(),
    };
    let specs = tensors.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(path, specs).expect("a writer");
    for (name, (_, values)) in tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|&value| encode(dtype, value)).collect();
        writer.append(name, &bytes).expect("room");
    }
    writer.finish().expect("a whole file");
}

fn write_model(dir: &Path, tensors: &Tensors, dtype: Dtype) {
    fs::create_dir_all(dir).expect("a folder");
    fs::write(dir.join("config.json"), config().to_string()).expect("a file");
    fs::write(dir.join("tokenizer.json"), "{\"any\": 1}").expect("a file");
    write_file(&dir.join("model.safetensors"), tensors, dtype);
}

/// Zero, scale and 4-bit values of one group, one line of the rule after the other.
fn naive_group(weights: &[f32]) -> (f32, f32, Vec<f32>) {
    let max = weights.iter().fold(0.0f32, |max, &w| if w > max { w } else { max });
    let min = weights.iter().fold(0.0f32, |min, &w| if w < min { w } else { min });
    let step = (max - min) / 15.0;
    let scale = f16::from_f32(if step < 1e-5 { 1e-5 } else { step }).to_f32();
    let limit = |x: f32| x.clamp(0.0, 15.0);
    let zero = limit((-min / scale).round_ties_even());
    let values = weights.iter().map(|w| limit((w / scale).round_ties_even() + zero)).collect();
    (zero, scale, values)
}

/// Compares every quantized tensor of `out` with the naive computation on `tensors`.
fn check_folder(out: &Path, tensors: &Tensors, dtype: Dtype, group_size: GroupSize) {
    let bytes = fs::read(out.join("model.safetensors")).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("a sound file");
    let mut num_linears = 0;
    for (name, (shape, values)) in tensors {
        let values: Vec<f32> =
            values.iter().flat_map(|&v| decode(dtype, &encode(dtype, v))).collect();
        if !name.contains("_proj") {
            let copied = file.tensor(name).expect(name);
            assert_eq!((copied.dtype(), copied.shape()), (dtype, &shape[..]), "{name}");
            assert_eq!(decode(dtype, copied.data()), values, "{name}");
            continue;
        }
        num_linears += 1;
        assert!(file.tensor(name).is_err(), "{name} is replaced");
        let module = name.strip_suffix(".weight").expect("a weight");
        let (n, k) = (shape[0], shape[1]);
        let group = group_size.of(k);
        let part = |part: &str, shape: [usize; 2]| {
            let tensor = file.tensor(&format!("{module}.{part}")).expect(part);
            assert_eq!(tensor.shape(), shape, "{module}.{part}");
            tensor.data().to_vec()
        };
        let nibbles = |bytes: Vec<u8>| -> Vec<u8> {
            let (words, _) = bytes.as_chunks::<4>();
            words.iter().flat_map(|word| unpack(u32::from_le_bytes(*word))).collect()
        };
        let qweight = nibbles(part("qweight", [k, n / 8]));
        let qzeros = nibbles(part("qzeros", [k / group, n / 8]));
        let scales = decode(Dtype::F16, &part("scales", [k / group, n]));
        for output in 0..n {
            for g in 0..k / group {
                let from = output * k + g * group;
                let (zero, scale, expected) = naive_group(&values[from..from + group]);
                assert_eq!(f32::from(qzeros[g * n + output]), zero, "{module} {output} {g}");
                assert_eq!(scales[g * n + output], scale, "{module} {output} {g}");
                for (i, value) in expected.into_iter().enumerate() {
                    let found = qweight[(g * group + i) * n + output];
                    assert_eq!(f32::from(found), value, "{module} {output} {g} {i}");
                }
            }
        }
    }
    assert_eq!(num_linears, 14);
}

#[test]
fn folders_have_the_values_of_the_rule() {
    let groups = [GroupSize::Of(8), GroupSize::Of(32), GroupSize::Channel];
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::BF16];
    for (group_size, dtype) in groups.into_iter().zip(dtypes) {
        let work = TempDir::new().expect("a folder");
        let (dir, out) = (work.path().join("model"), work.path().join("quantized"));
        write_model(&dir, &model(), dtype);
        let mut last = (0, 0);
        rtn(&dir, &out, &RtnOptions::new(group_size), &mut |p| last = (p.done, p.total))
            .expect("a folder");
        assert!(last.0 == last.1 && last.1 > 0, "progress reaches its end: {last:?}");
        check_folder(&out, &model(), dtype, group_size);
        let config = ModelConfig::from_file(&out.join("config.json")).expect("a sound config");
        assert_eq!(config.quantization.expect("a quantization").group_size, group_size);
        assert_eq!(fs::read(out.join("tokenizer.json")).expect("copied"), b"{\"any\": 1}");
        assert_eq!(fs::read_dir(work.path()).expect("a folder").count(), 2);
    }
}

#[test]
fn shards_give_the_same_as_one_file() {
    let work = TempDir::new().expect("a folder");
    let (dir, out) = (work.path().join("model"), work.path().join("quantized"));
    write_model(&dir, &model(), Dtype::F32);
    fs::remove_file(dir.join("model.safetensors")).expect("a file");
    let mut map = serde_json::Map::new();
    for shard in 0..3usize {
        let name = format!("model-{shard}.safetensors");
        let part: Tensors = model()
            .into_iter()
            .enumerate()
            .filter(|(i, _)| i % 3 == shard)
            .map(|(_, t)| t)
            .collect();
        map.extend(part.keys().map(|tensor| (tensor.clone(), json!(name))));
        write_file(&dir.join(&name), &part, Dtype::F32);
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(dir.join("model.safetensors.index.json"), index).expect("a file");
    rtn(&dir, &out, &RtnOptions::new(GroupSize::Of(16)), &mut |_| ()).expect("a folder");
    check_folder(&out, &model(), Dtype::F32, GroupSize::Of(16));
    assert!(!out.join("model.safetensors.index.json").exists());
    fs::remove_file(dir.join("model-1.safetensors")).expect("a file");
    let again = rtn(&dir, &work.path().join("b"), &RtnOptions::new(GroupSize::Of(16)), &mut |_| ());
    assert!(again.expect_err("a shard is missing").to_string().contains("model-1.safetensors"));
}

#[test]
fn a_group_that_does_not_divide_is_refused_with_both_numbers() {
    let work = TempDir::new().expect("a folder");
    let (dir, out) = (work.path().join("model"), work.path().join("quantized"));
    write_model(&dir, &model(), Dtype::F32);
    for (group, k) in [(128, "64"), (64, "96"), (40, "64")] {
        let error = rtn(&dir, &out, &RtnOptions::new(GroupSize::Of(group)), &mut |_| ())
            .expect_err("it does not divide")
            .to_string();
        assert!(error.contains(&group.to_string()) && error.contains(k), "{error}");
    }
    assert_eq!(fs::read_dir(work.path()).expect("a folder").count(), 1, "nothing was written");
}

#[test]
fn folders_that_are_there_are_kept_unless_told() {
    let work = TempDir::new().expect("a folder");
    let (dir, out) = (work.path().join("model"), work.path().join("quantized"));
    write_model(&dir, &model(), Dtype::F32);
    fs::create_dir(&out).expect("a folder");
    fs::write(out.join("mine"), "keep").expect("a file");
    let mut options = RtnOptions::new(GroupSize::Of(32));
    let error = rtn(&dir, &out, &options, &mut |_| ()).expect_err("it is there").to_string();
    assert!(error.contains("already exists"), "{error}");
    assert_eq!(fs::read(out.join("mine")).expect("kept"), b"keep");
    options.if_exists = IfExists::Replace;
    rtn(&dir, &out, &options, &mut |_| ()).expect("a folder");
    check_folder(&out, &model(), Dtype::F32, GroupSize::Of(32));
    assert!(!out.join("mine").exists());
    let error = rtn(&out, &work.path().join("b"), &options, &mut |_| ()).expect_err("twice");
    assert!(error.to_string().contains("already quantized"), "{error}");
    assert_eq!(fs::read_dir(work.path()).expect("a folder").count(), 2);
}

#[test]
fn unsound_models_are_refused_and_leave_nothing() {
    let name = "model.layers.1.mlp.down_proj.weight";
    let change_value = |value: f32| {
        let mut tensors = model();
        tensors.get_mut(name).expect("a tensor").1[100] = value;
        tensors
    };
    let mut missing = model();
    missing.remove(name);
    let mut vector = model();
    vector.get_mut(name).expect("a tensor").0 = vec![HIDDEN * INTERMEDIATE];
    let cases =
        [change_value(f32::NAN), change_value(f32::INFINITY), change_value(3e6), missing, vector];
    for tensors in cases {
        let work = TempDir::new().expect("a folder");
        let (dir, out) = (work.path().join("model"), work.path().join("quantized"));
        write_model(&dir, &tensors, Dtype::F32);
        let error =
            rtn(&dir, &out, &RtnOptions::new(GroupSize::Of(32)), &mut |_| ()).expect_err("unsound");
        assert!(error.to_string().contains("model.layers.1.mlp.down_proj"), "{error}");
        assert_eq!(fs::read_dir(work.path()).expect("a folder").count(), 1, "{error}");
    }
}

#[test]
fn damaged_files_are_refused() {
    let work = TempDir::new().expect("a folder");
    let (dir, out) = (work.path().join("model"), work.path().join("quantized"));
    write_model(&dir, &model(), Dtype::F32);
    let path = dir.join("model.safetensors");
    let whole = fs::read(&path).expect("weights");
    let with_header = |header: &str| {
        let len = (header.len() as u64).to_le_bytes();
        [&len[..], header.as_bytes(), &[0; 8]].concat()
    };
    let entry = |name: &str, shape: &str, span: &str| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":{span}}}")
    };
    let (a, b) = (entry("a", "[1]", "[0,4]"), entry("b", "[1]", "[2,6]"));
    let cases = [
        Vec::new(),
        whole[..7].to_vec(),
        whole[..500].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(),
        with_header("[]"),
        with_header(&format!("{{{a},{a}}}")),
        with_header(&format!("{{{a},{b}}}")),
        with_header(&format!("{{{}}}", entry("a", "[18446744073709551615,4]", "[0,4]"))),
        with_header(&format!("{{{}}}", entry("a", "[1]", "[4,0]"))),
        with_header(&format!("{{{}}}", entry("a", "[1]", "[8,12]"))),
        with_header(&format!("{{{}}}", entry("a\\u0000", "[1]", "[0,4]"))),
    ];
    for bytes in cases {
        fs::write(&path, &bytes).expect("a file");
        let error =
            rtn(&dir, &out, &RtnOptions::new(GroupSize::Of(32)), &mut |_| ()).expect_err("damaged");
        assert!(error.to_string().contains("damaged"), "{error}");
        assert!(!out.exists());
    }
}

proptest! {
    #[test]
    fn words_unpack_to_what_was_packed(values in prop::array::uniform8(0u8..16)) {
        prop_assert_eq!(unpack(pack(values)), values);
    }

    /// A weight inside the group's range is at most half a step off, and half a step more where
    /// the zero had to be rounded.
    #[test]
    fn rounding_is_to_the_nearest_step(
        weights in prop::collection::vec(-50.0f32..50.0, 1..64),
    ) {
        let (scale, zero) = rtn::scale_and_zero(&weights);
        let (scale, zero) = (scale.to_f32(), f32::from(zero));
        for &weight in &weights {
            let q = rtn::quantized(weight, scale, zero);
            let error = ((f32::from(q) - zero) * scale - weight).abs();
            prop_assert!(error <= scale * 1.01, "{weight} became {q}, {error} off at {scale}");
        }
    }
}
