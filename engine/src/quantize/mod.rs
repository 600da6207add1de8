//! Model folder → model folder with 4-bit linears, as an AWQ "gemm" checkpoint.
//!
//! [`rtn`] rounds every weight to the nearest step of its group. One tensor is in memory at a
//! time.

mod activations;
pub mod awq_format;
pub mod checkpoint;
mod gram;
mod grid;
mod group;
mod layer_builder;
pub mod layer_pass;
mod layer_runner;
mod linalg;
pub mod quantized_layer;
mod rounding;
pub mod rtn;
mod scales;
mod streams;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{GroupSize, LinearRole, check_group};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use self::awq_format::{PACK, PackedLinear};
use self::checkpoint::{Checkpoint, StoredTensor};
use crate::error::Error;
use crate::files::{self, IfExists, StagedDir};
use crate::progress::{Progress, Report, Unit};
use crate::safetensors_writer::{SafetensorsWriter, TensorSpec};

/// Bytes copied or written at a time.
const CHUNK: usize = 4 << 20;

/// The linears of a layer that are quantized; the head and the embedding stay as they are.
const ROLES: [LinearRole; 4] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down];

/// Files that go along with the weights, where they exist.
const COMPANIONS: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "source.json",
    "LICENSE",
    "README.md",
];

/// How to round.
#[derive(Clone, Copy, Debug)]
pub struct RtnOptions {
    pub group_size: GroupSize,
    pub if_exists: IfExists,
}

/// Quantizes the model in `model_dir` by rounding to nearest, into the new folder `out_dir`.
pub fn rtn(
    model_dir: &Path,
    out_dir: &Path,
    options: &RtnOptions,
    report: Report,
) -> Result<(), Error> {
    let group_size = options.group_size;
    let config = quantized_config(model_dir, group_size)?;
    let mut checkpoint = Checkpoint::open(model_dir)?;
    let linears = linears(&config.parsed, &checkpoint, model_dir, group_size)?;
    let staged = StagedDir::create(out_dir, options.if_exists)?;
    let dir = staged.path();
    write_tensors(&mut checkpoint, &linears, &dir.join("model.safetensors"), report)?;
    for name in COMPANIONS {
        let (from, to) = (model_dir.join(name), dir.join(name));
        if from.is_file() {
            fs::copy(&from, &to).map_err(|e| files::write_error(&to, 0, e))?;
        }
    }
    files::write_durable(&dir.join("config.json"), config.text.as_bytes())?;
    // What was written must be readable before it gets its name.
    Checkpoint::open(dir)?;
    staged.commit()
}

/// config.json of the quantized model.
struct QuantizedConfig {
    text: String,
    parsed: ModelConfig,
}

/// Adds `quantization_config`, and lets the generator refuse what it could not run.
fn quantized_config(model_dir: &Path, group_size: GroupSize) -> Result<QuantizedConfig, Error> {
    let path = model_dir.join("config.json");
    let original = ModelConfig::from_file(&path);
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let mut json: Json =
        serde_json::from_str(&text).map_err(|e| Error::model(&path, e.to_string()))?;
    let is_quantized = json.get("quantization_config").is_some_and(|value| !value.is_null());
    if is_quantized || model_dir.join("quant_config.json").exists() {
        return Err(Error::Request(format!(
            "{}: already quantized; give the original model",
            model_dir.display()
        )));
    }
    original?;
    json["quantization_config"] = json!({
        "quant_method": "awq",
        "bits": 4,
        "group_size": match group_size {
            GroupSize::Of(size) => json!(size),
            GroupSize::Channel => json!(-1),
        },
        "zero_point": true,
        "version": "gemm",
        "modules_to_not_convert": null,
    });
    let text = format!("{json:#}\n");
    let parsed = ModelConfig::parse(&text)?;
    parsed.shape("model")?;
    Ok(QuantizedConfig { text, parsed })
}

/// Outputs, inputs and weights in a group of a linear to be quantized.
type LinearSizes = (usize, usize, usize);

/// Module name → sizes of all linears, each found in the checkpoint.
fn linears(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    model_dir: &Path,
    group_size: GroupSize,
) -> Result<BTreeMap<String, LinearSizes>, Error> {
    let mut linears = BTreeMap::new();
    for layer_idx in 0..config.num_layers {
        let modules = ROLES.iter().flat_map(|&role| config.architecture.modules(role));
        for module in modules {
            let name = format!("model.layers.{layer_idx}.{module}");
            let Some(tensor) = checkpoint.tensors.get(&format!("{name}.weight")) else {
                return Err(Error::model(
                    model_dir,
                    format!("tensor '{name}.weight' is missing; is this the original model?"),
                ));
            };
            let path = checkpoint.path_of(tensor);
            let [n, k] = tensor.shape[..] else {
                return Err(Error::model(
                    path,
                    format!("tensor '{name}.weight' has shape {:?}, not two sizes", tensor.shape),
                ));
            };
            check_group(k, group_size)?;
            if n == 0 || n % PACK != 0 || k == 0 {
                return Err(Error::Unsupported(format!(
                    "'{name}' has {n} outputs, which is no multiple of {PACK}"
                )));
            }
            if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                return Err(Error::model(
                    path,
                    format!(
                        "'{name}.weight' is {:?}; F32, F16 and BF16 can be quantized",
                        tensor.dtype
                    ),
                ));
            }
            linears.insert(name, (n, k, group_size.of(k)));
        }
    }
    Ok(linears)
}

/// The tensors that take the place of each tensor of the checkpoint.
fn specs(checkpoint: &Checkpoint, linears: &BTreeMap<String, LinearSizes>) -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    for (name, tensor) in &checkpoint.tensors {
        let spec = |name: String, dtype, shape: Vec<usize>| TensorSpec { name, dtype, shape };
        match linear_of(name, linears) {
            Some((module, (n, k, group))) => {
                let words = n / PACK;
                specs.push(spec(format!("{module}.qweight"), Dtype::I32, vec![k, words]));
                specs.push(spec(format!("{module}.qzeros"), Dtype::I32, vec![k / group, words]));
                specs.push(spec(format!("{module}.scales"), Dtype::F16, vec![k / group, n]));
            }
            None => specs.push(spec(name.clone(), tensor.dtype, tensor.shape.clone())),
        }
    }
    specs
}

fn linear_of<'a>(
    tensor: &'a str,
    linears: &BTreeMap<String, LinearSizes>,
) -> Option<(&'a str, LinearSizes)> {
    let module = tensor.strip_suffix(".weight")?;
    linears.get(module).map(|&sizes| (module, sizes))
}

fn write_tensors(
    checkpoint: &mut Checkpoint,
    linears: &BTreeMap<String, LinearSizes>,
    path: &Path,
    report: Report,
) -> Result<(), Error> {
    let mut writer = SafetensorsWriter::create(path, specs(checkpoint, linears))?;
    let tensors: Vec<(String, StoredTensor)> =
        checkpoint.tensors.iter().map(|(name, t)| (name.clone(), t.clone())).collect();
    let total = tensors.len() as u64;
    for (idx, (name, tensor)) in tensors.iter().enumerate() {
        match linear_of(name, linears) {
            Some((module, sizes)) => {
                let packed = quantize(checkpoint, name, tensor, sizes)?;
                write_linear(&mut writer, module, &packed)?;
            }
            None => copy(checkpoint, name, tensor, &mut writer)?,
        }
        report(Progress { stage: "quantizing", done: idx as u64 + 1, total, unit: Unit::Tensors });
    }
    writer.finish()
}

fn quantize(
    checkpoint: &mut Checkpoint,
    name: &str,
    tensor: &StoredTensor,
    sizes: LinearSizes,
) -> Result<PackedLinear, Error> {
    // At most the size of the file, which was compared with it.
    let mut bytes = vec![0; tensor.num_bytes as usize];
    checkpoint.read_at(tensor, 0, &mut bytes)?;
    let row_bytes = bytes.len() / sizes.0;
    let read_row = |row: usize, out: &mut [f32]| {
        to_f32(tensor.dtype, &bytes[row * row_bytes..][..row_bytes], out);
    };
    let num_threads = thread::available_parallelism().map_or(1, |n| n.get());
    rtn::quantize_linear(sizes, num_threads, &read_row).map_err(|bad| {
        Error::model(
            checkpoint.path_of(tensor),
            format!(
                "tensor '{name}': the weight {} of output {} near input {} cannot be quantized",
                bad.value, bad.output, bad.input
            ),
        )
    })
}

/// Elements of a dtype that [`linears`] let through.
fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let (halves, _) = bytes.as_chunks::<2>();
    let (words, _) = bytes.as_chunks::<4>();
    match dtype {
        Dtype::F32 => fill(out, words, |w| f32::from_le_bytes(*w)),
        Dtype::BF16 => fill(out, halves, |h| bf16::from_le_bytes(*h).to_f32()),
        _ => fill(out, halves, |h| f16::from_le_bytes(*h).to_f32()),
    }
}

fn fill<T>(out: &mut [f32], from: &[T], convert: impl Fn(&T) -> f32) {
    for (out, element) in out.iter_mut().zip(from) {
        *out = convert(element);
    }
}

fn write_linear(
    writer: &mut SafetensorsWriter,
    module: &str,
    packed: &PackedLinear,
) -> Result<(), Error> {
    let rows_at_once = (CHUNK / (packed.n / 2)).max(1);
    for first in (0..packed.k).step_by(rows_at_once) {
        let rows = first..(first + rows_at_once).min(packed.k);
        writer.append(&format!("{module}.qweight"), &packed.qweight_rows(rows))?;
    }
    writer.append(&format!("{module}.qzeros"), &packed.qzeros_bytes())?;
    writer.append(&format!("{module}.scales"), &packed.scales_bytes())
}

fn copy(
    checkpoint: &mut Checkpoint,
    name: &str,
    tensor: &StoredTensor,
    writer: &mut SafetensorsWriter,
) -> Result<(), Error> {
    let mut buffer = vec![0; CHUNK.min(tensor.num_bytes as usize)];
    let mut from = 0;
    while from < tensor.num_bytes {
        let count = (tensor.num_bytes - from).min(CHUNK as u64) as usize;
        checkpoint.read_at(tensor, from, &mut buffer[..count])?;
        writer.append(name, &buffer[..count])?;
        from += count as u64;
    }
    Ok(())
}
