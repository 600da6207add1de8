//! Quantized checkpoints as other programs write them: the same numbers, bit for bit.

use bespoke::config::EngineOptions;
use half::{bf16, f16};
use serde_json::json;

use super::folder::{Folder, TestTensor, assert_refused, load, load_with, logits};

/// How a GPTQ checkpoint is written.
#[derive(Clone, Copy)]
pub(super) struct Gptq {
    /// 1 for checkpoint_format gptq, 0 for gptq_v2.
    pub(super) zero_offset: u8,
    pub(super) has_g_idx: bool,
}

/// How a compressed-tensors checkpoint is written.
#[derive(Clone, Copy)]
pub(super) struct Compressed {
    pub(super) symmetric: bool,
    /// Type of the scales.
    pub(super) dtype: &'static str,
    pub(super) has_g_idx: bool,
}

/// A module's numbers.
struct Module {
    name: String,
    n: usize,
    k: usize,
    num_groups: usize,
    /// `[k, n]`
    q: Vec<u8>,
    /// `[num_groups, n]`
    zeros: Vec<u8>,
    /// `[num_groups, n]`
    scales: Vec<f16>,
}

const CASES: [&str; 4] = ["llama-awq-g32", "llama-awq-g64", "llama-awq-g128", "llama-awq-gchannel"];

/// Nibble of the eight outputs of an AWQ word.
const AWQ_ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// `[rows, n]` of AWQ words `[rows, n / 8]`.
fn unpack(bytes: &[u8]) -> Vec<u8> {
    let nibble = |word: u32| AWQ_ORDER.map(|place| (word >> (4 * place) & 15) as u8);
    words(bytes).into_iter().flat_map(nibble).collect()
}

/// Words of eight values, the first lowest.
fn pack(num_words: usize, value: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let word = |idx| (0..8).fold(0, |word, p| word | u32::from(value(idx, p) & 15) << (4 * p));
    (0..num_words).flat_map(|idx| u32::to_le_bytes(word(idx))).collect()
}

/// The quantized modules of an AWQ folder, which lose their tensors.
fn take_modules(folder: &mut Folder) -> Vec<Module> {
    let names: Vec<String> = folder.tensors.iter().map(|tensor| tensor.name.clone()).collect();
    let names = names.iter().filter_map(|name| name.strip_suffix(".qweight"));
    names
        .map(|name| {
            let qweight = folder.remove(&format!("{name}.qweight"));
            let qzeros = folder.remove(&format!("{name}.qzeros"));
            let scales = folder.remove(&format!("{name}.scales"));
            let scale = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]);
            Module {
                name: name.to_owned(),
                n: scales.shape[1] as usize,
                k: qweight.shape[0] as usize,
                num_groups: scales.shape[0] as usize,
                q: unpack(&qweight.bytes),
                zeros: unpack(&qzeros.bytes),
                scales: scales.bytes.chunks_exact(2).map(scale).collect(),
            }
        })
        .collect()
}

fn tensor(name: &str, suffix: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) -> TestTensor {
    TestTensor {
        name: format!("{name}.{suffix}"),
        dtype: dtype.to_owned(),
        shape: shape.iter().map(|dim| *dim as u64).collect(),
        bytes,
    }
}

fn group_indices(module: &Module) -> Vec<u8> {
    let group = module.k / module.num_groups;
    (0..module.k).flat_map(|k| ((k / group) as i32).to_le_bytes()).collect()
}

/// An AWQ folder's model as AutoGPTQ or GPTQModel writes it.
pub(super) fn gptq(awq: &Folder, how: Gptq) -> Folder {
    let mut folder = awq.clone();
    for module in take_modules(&mut folder) {
        let Module { name, n, k, num_groups, q, zeros, scales } = &module;
        let (n, k, num_groups) = (*n, *k, *num_groups);
        let weights = pack(k / 8 * n, |idx, p| q[(idx / n * 8 + p) * n + idx % n]);
        let zeros = pack(num_groups * n / 8, |idx, p| zeros[idx * 8 + p] - how.zero_offset);
        let scales = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        folder.tensors.push(tensor(name, "qweight", "I32", &[k / 8, n], weights));
        folder.tensors.push(tensor(name, "qzeros", "I32", &[num_groups, n / 8], zeros));
        folder.tensors.push(tensor(name, "scales", "F16", &[num_groups, n], scales));
        if how.has_g_idx {
            folder.tensors.push(tensor(name, "g_idx", "I32", &[k], group_indices(&module)));
        }
    }
    let group_size = folder.config["quantization_config"]["group_size"].clone();
    folder.config["quantization_config"] = json!({
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": false,
        "desc_act": how.has_g_idx, "damp_percent": 0.01, "true_sequential": true,
        "checkpoint_format": if how.zero_offset == 1 { "gptq" } else { "gptq_v2" }
    });
    folder
}

/// An AWQ folder's model as compressed-tensors writes it.
pub(super) fn compressed(awq: &Folder, how: Compressed) -> Folder {
    let mut folder = awq.clone();
    for module in take_modules(&mut folder) {
        let Module { name, n, k, num_groups, q, zeros, scales } = &module;
        let (n, k, num_groups) = (*n, *k, *num_groups);
        let weights = pack(n * k / 8, |idx, p| q[(idx % (k / 8) * 8 + p) * n + idx / (k / 8)]);
        let transposed = (0..n * num_groups).map(|i| scales[i % num_groups * n + i / num_groups]);
        let scales = transposed.flat_map(|scale| match how.dtype {
            "BF16" => bf16::from_f32(scale.to_f32()).to_le_bytes().to_vec(),
            "F32" => scale.to_f32().to_le_bytes().to_vec(),
            _ => scale.to_le_bytes().to_vec(),
        });
        let shape = [n as i64, k as i64].map(i64::to_le_bytes).concat();
        folder.tensors.extend([
            tensor(name, "weight_packed", "I32", &[n, k / 8], weights),
            tensor(name, "weight_scale", how.dtype, &[n, num_groups], scales.collect()),
            tensor(name, "weight_shape", "I64", &[2], shape),
        ]);
        if !how.symmetric {
            let zeros = pack(n / 8 * num_groups, |idx, p| {
                zeros[idx % num_groups * n + idx / num_groups * 8 + p]
            });
            let shape = [n / 8, num_groups];
            folder.tensors.push(tensor(name, "weight_zero_point", "I32", &shape, zeros));
        }
        if how.has_g_idx {
            folder.tensors.push(tensor(name, "weight_g_idx", "I32", &[k], group_indices(&module)));
        }
    }
    let group_size = folder.config["quantization_config"]["group_size"].clone();
    let strategy = if group_size == -1 { "channel" } else { "group" };
    folder.config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": null,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null, "output_activations": null,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": how.symmetric, "strategy": strategy,
                "group_size": if strategy == "channel" { json!(null) } else { group_size },
                "dynamic": false, "actorder": if how.has_g_idx { "group" } else { "weight" }
            }
        }}
    });
    folder
}

/// Zeros of 1 and more, which GPTQ's first format can hold.
fn without_zeros_of_0(mut folder: Folder) -> Folder {
    for tensor in folder.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("qzeros")) {
        for byte in &mut tensor.bytes {
            *byte = (*byte & 15).max(1) | (*byte >> 4).max(1) << 4;
        }
    }
    folder
}

/// Scales that bfloat16 holds too.
fn with_short_scales(mut folder: Folder) -> Folder {
    for tensor in folder.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("scales")) {
        for scale in tensor.bytes.as_chunks_mut::<2>().0 {
            let short = bf16::from_f32(f16::from_le_bytes(*scale).to_f32()).to_f32();
            *scale = f16::from_f32(short).to_le_bytes();
        }
    }
    folder
}

#[track_caller]
fn assert_same(awq: &Folder, other: &Folder) {
    let expected = logits(&mut load(awq).unwrap());
    let found = logits(&mut load(other).unwrap());
    assert!(expected == found, "other logits");
}

#[test]
fn gptq_has_the_logits_of_awq() {
    for case in CASES {
        let awq = Folder::read(case);
        assert_same(&awq, &gptq(&awq, Gptq { zero_offset: 0, has_g_idx: false }));
        let awq = without_zeros_of_0(awq);
        assert_same(&awq, &gptq(&awq, Gptq { zero_offset: 1, has_g_idx: true }));
    }
}

#[test]
fn compressed_tensors_have_the_logits_of_awq() {
    for case in CASES {
        let awq = Folder::read(case);
        let how = Compressed { symmetric: false, dtype: "F16", has_g_idx: true };
        assert_same(&awq, &compressed(&awq, how));
        let mut awq = with_short_scales(awq);
        let how = Compressed { symmetric: false, dtype: "BF16", has_g_idx: false };
        assert_same(&awq, &compressed(&awq, how));
        for tensor in awq.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("qzeros")) {
            tensor.bytes.fill(0x88);
        }
        assert_same(&awq, &compressed(&awq, Compressed { symmetric: true, ..how }));
    }
}

/// The generated kernels are those of the AWQ model.
#[test]
fn generated_kernels_serve_all_formats() {
    let awq = without_zeros_of_0(Folder::read("llama-awq-g64"));
    let options = EngineOptions::new(bespoke_tests::tiny_kernels());
    let run = |folder: &Folder| logits(&mut load_with(folder, &options).unwrap());
    let expected = run(&awq);
    assert!(expected == run(&gptq(&awq, Gptq { zero_offset: 1, has_g_idx: false })));
    let how = Compressed { symmetric: false, dtype: "F32", has_g_idx: false };
    assert!(expected == run(&compressed(&awq, how)));
}

/// Modules that the other formats leave out are found by their names.
#[test]
fn mixed_models_load_from_all_formats() {
    let awq = Folder::read("llama-awq-mixed");
    let left_out = &awq.config["quantization_config"]["modules_to_not_convert"];
    let mut other = gptq(&awq, Gptq { zero_offset: 0, has_g_idx: false });
    other.config["quantization_config"]["modules_to_not_convert"] = left_out.clone();
    assert_same(&awq, &other);
    let how = Compressed { symmetric: false, dtype: "F16", has_g_idx: false };
    let mut other = compressed(&awq, how);
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        .map(|module| format!("model.layers.0.self_attn.{module}"));
    let mut ignored = vec!["lm_head", "model.layers.1.mlp.down_proj"];
    ignored.extend(attention.iter().map(String::as_str));
    other.config["quantization_config"]["ignore"] = json!(ignored);
    assert_same(&awq, &other);
}

const MODULE: &str = "model.layers.1.mlp.gate_proj";

#[test]
fn gptq_that_cannot_be_exact_is_refused() {
    let awq = without_zeros_of_0(Folder::read("llama-awq-g64"));
    let sound = gptq(&awq, Gptq { zero_offset: 1, has_g_idx: true });
    let refused = |change: &dyn Fn(&mut Folder), words: &[&str]| {
        let mut folder = sound.clone();
        change(&mut folder);
        assert_refused(load(&folder).map(|_| ()), words);
    };
    let name = |suffix: &str| format!("{MODULE}.{suffix}");
    refused(
        &|folder| folder.tensor(&name("g_idx")).bytes[4 * 70] = 0,
        &[&name("g_idx"), "puts input 70 into group 0", "groups of 64 inputs"],
    );
    refused(
        &|folder| folder.tensor(&name("g_idx")).bytes[4 * 70..][..4].fill(0xff),
        &["puts input 70 into group -1"],
    );
    refused(
        &|folder| folder.tensor(&name("qzeros")).bytes[9] |= 0xf0,
        &[&name("qzeros"), "a zero of 15 at element 2", "gptq_v2"],
    );
    let bias = |value: f32| {
        tensor(MODULE, "bias", "F16", &[384], f16::from_f32(value).to_le_bytes().repeat(384))
    };
    refused(
        &|folder| folder.tensors.push(bias(0.5)),
        &[&name("bias"), "is not 0 everywhere", "no such bias"],
    );
    let mut folder = sound.clone();
    folder.tensors.push(bias(0.0));
    assert_same(&awq, &folder);
}

#[test]
fn compressed_tensors_that_cannot_be_exact_are_refused() {
    let awq = Folder::read("llama-awq-g64");
    let how = Compressed { symmetric: false, dtype: "F32", has_g_idx: true };
    let sound = compressed(&awq, how);
    let name = |suffix: &str| format!("{MODULE}.{suffix}");
    let refused = |change: &dyn Fn(&mut Folder), words: &[&str]| {
        let mut folder = sound.clone();
        change(&mut folder);
        assert_refused(load(&folder).map(|_| ()), words);
    };
    refused(
        &|folder| {
            let bytes = &mut folder.tensor(&name("weight_scale")).bytes;
            bytes[12..16].copy_from_slice(&1e-6_f32.to_le_bytes());
        },
        &[&name("weight_scale"), "1e-6 at element 3", "float16"],
    );
    refused(
        &|folder| {
            let bytes = &mut folder.tensor(&name("weight_scale")).bytes;
            bytes[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
        },
        &[&name("weight_scale"), "not finite at element 3"],
    );
    refused(
        &|folder| folder.tensor(&name("weight_shape")).bytes[7] = 0x80,
        &[&name("weight_shape"), "128]", "[384, 128]"],
    );
    refused(
        &|folder| folder.tensor(&name("weight_g_idx")).bytes[0] = 9,
        &[&name("weight_g_idx"), "puts input 0 into group 9"],
    );
    let mut folder = compressed(&awq, Compressed { symmetric: true, ..how });
    let zeros = |value: u8| tensor(MODULE, "weight_zero_point", "I8", &[384, 2], vec![value; 768]);
    folder.tensors.push(zeros(0));
    load(&folder).unwrap();
    folder.remove(&name("weight_zero_point"));
    folder.tensors.push(zeros(1));
    let words = [&name("weight_zero_point"), "is not 0 everywhere", "symmetric"];
    assert_refused(load(&folder).map(|_| ()), &words);
}
