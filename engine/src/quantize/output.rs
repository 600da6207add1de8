//! The tensors of the quantized model: which there are, in which shard each lies, and how they are
//! written with no more than a layer in memory.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use bespoke_kernel_gen::model::ModelConfig;
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;

use super::awq_format::{PACK, PackedLinear};
use super::checkpoint::{Checkpoint, StoredTensor};
use super::quantized_layer::Factors;
use super::source::{Linear, Linears, SourceModel};
use crate::error::Error;
use crate::files;
use crate::model::weights::Weights;
use crate::progress::{Progress, Report, Unit};
use crate::safetensors_writer::{SafetensorsWriter, TensorSpec};

/// Largest shard unless told otherwise.
pub const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// Bytes copied or written at a time.
const CHUNK: usize = 4 << 20;

/// Files that go along with the weights, where they exist.
const COMPANIONS: [&str; 11] = [
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
];

/// What quantizing made of a model, layer by layer.
pub(super) trait QuantizedValues {
    /// The tensors of this layer are asked for next; `None`: those outside the layers.
    fn enter(&mut self, layer_idx: Option<usize>) -> Result<(), Error>;

    /// 4-bit weights of a module that has some.
    fn packed(
        &mut self,
        checkpoint: &mut Checkpoint,
        module: &str,
        linear: Linear,
    ) -> Result<Cow<'_, PackedLinear>, Error>;

    /// New numbers of a tensor that is no weight of a linear; `None` where it stays as it is.
    fn floats(&self, tensor: &str) -> Option<&[f32]>;

    /// What the float weights of a module are multiplied with; `None` where they stay as they are.
    fn factors(&self, module: &str) -> Option<&Factors>;
}

/// Where every tensor of the quantized model goes.
pub(super) struct OutputPlan<'a> {
    linears: &'a Linears,
    left_out: &'a BTreeSet<String>,
    /// Tensors of the checkpoint in the order in which they are written, shard by shard.
    shards: Vec<Vec<(String, StoredTensor)>>,
    /// Bytes of all tensors that are written.
    pub num_bytes: u64,
}

impl<'a> OutputPlan<'a> {
    /// `left_out`: linears that keep float weights. A shard has at most `shard_bytes_max` bytes of
    /// tensors, or the tensors that take one tensor's place.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        linears: &'a Linears,
        left_out: &'a BTreeSet<String>,
        shard_bytes_max: u64,
    ) -> OutputPlan<'a> {
        let mut plan = OutputPlan { linears, left_out, shards: vec![Vec::new()], num_bytes: 0 };
        let mut tensors: Vec<(&String, &StoredTensor)> = checkpoint.tensors.iter().collect();
        tensors.sort_by_key(|(name, _)| (layer_of(name), *name));
        let mut shard_bytes = 0u64;
        for (name, tensor) in tensors {
            let specs = plan.specs(name, tensor);
            let bytes: u64 = specs.iter().filter_map(TensorSpec::num_bytes).sum();
            if shard_bytes > 0 && shard_bytes.saturating_add(bytes) > shard_bytes_max {
                plan.shards.push(Vec::new());
                shard_bytes = 0;
            }
            shard_bytes += bytes;
            plan.num_bytes += bytes;
            if let Some(shard) = plan.shards.last_mut() {
                shard.push((name.clone(), tensor.clone()));
            }
        }
        plan
    }

    /// The tensors that take the place of one of the checkpoint's.
    fn specs(&self, name: &str, tensor: &StoredTensor) -> Vec<TensorSpec> {
        let spec = |name: String, dtype, shape: Vec<usize>| TensorSpec { name, dtype, shape };
        match self.packed(name) {
            Some((module, Linear { n, k, group, .. })) => vec![
                spec(format!("{module}.qweight"), Dtype::I32, vec![k, n / PACK]),
                spec(format!("{module}.qzeros"), Dtype::I32, vec![k / group, n / PACK]),
                spec(format!("{module}.scales"), Dtype::F16, vec![k / group, n]),
            ],
            None => vec![spec(name.to_owned(), tensor.dtype, tensor.shape.clone())],
        }
    }

    /// Module and sizes of a weight that is quantized.
    fn packed<'n>(&self, name: &'n str) -> Option<(&'n str, Linear)> {
        let module = name.strip_suffix(".weight")?;
        let linear = self.linears.get(module)?;
        (!self.left_out.contains(module)).then_some((module, *linear))
    }

    /// Writes all tensors into `dir`, with an index where there are several files.
    pub(super) fn write(
        &self,
        checkpoint: &mut Checkpoint,
        values: &mut dyn QuantizedValues,
        dir: &Path,
        stage: &'static str,
        report: Report,
    ) -> Result<(), Error> {
        let total: usize = self.shards.iter().map(Vec::len).sum();
        let mut done = 0;
        let mut layer = None;
        let mut weight_map = BTreeMap::new();
        values.enter(layer)?;
        for (idx, shard) in self.shards.iter().enumerate() {
            let name = self.file_name(idx);
            let specs: Vec<TensorSpec> =
                shard.iter().flat_map(|(tensor, stored)| self.specs(tensor, stored)).collect();
            weight_map.extend(specs.iter().map(|spec| (spec.name.clone(), name.clone())));
            let mut writer = SafetensorsWriter::create(&dir.join(&name), specs)?;
            for (tensor, stored) in shard {
                if layer_of(tensor) != layer {
                    layer = layer_of(tensor);
                    values.enter(layer)?;
                }
                self.write_tensor(checkpoint, values, (tensor, stored), &mut writer)?;
                done += 1;
                report(Progress { stage, done, total: total as u64, unit: Unit::Tensors });
            }
            writer.finish()?;
        }
        if self.shards.len() == 1 {
            return Ok(());
        }
        let index = json!({"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map});
        let path = dir.join("model.safetensors.index.json");
        files::write_durable(&path, format!("{index:#}\n").as_bytes())
    }

    fn write_tensor(
        &self,
        checkpoint: &mut Checkpoint,
        values: &mut dyn QuantizedValues,
        (name, tensor): (&str, &StoredTensor),
        writer: &mut SafetensorsWriter,
    ) -> Result<(), Error> {
        if let Some((module, linear)) = self.packed(name) {
            return write_linear(writer, module, &*values.packed(checkpoint, module, linear)?);
        }
        if let Some(floats) = values.floats(name) {
            let bytes = from_f32(tensor.dtype, floats);
            return writer.append(name, &bytes);
        }
        let module = name.strip_suffix(".weight").filter(|name| self.linears.contains_key(*name));
        match module.and_then(|module| values.factors(module)) {
            Some(factors) => fold(checkpoint, (name, tensor), factors, writer),
            None => copy(checkpoint, name, tensor, writer),
        }
    }

    fn file_name(&self, shard_idx: usize) -> String {
        match self.shards.len() {
            1 => "model.safetensors".to_owned(),
            num => format!("model-{:05}-of-{num:05}.safetensors", shard_idx + 1),
        }
    }
}

/// Writes the configuration, copies tokenizer and the like, and checks the folder as the engine
/// does when it loads it.
pub(super) fn finish(model: &SourceModel, config_text: &str, dir: &Path) -> Result<(), Error> {
    for name in COMPANIONS {
        copy_file(&model.dir.join(name), &dir.join(name))?;
    }
    files::write_durable(&dir.join("config.json"), config_text.as_bytes())?;
    let config = ModelConfig::from_file(&dir.join("config.json"))?;
    let shape = config.shape("model")?;
    Weights::open(dir, &config, &shape)?;
    Ok(())
}

/// Copies one file where there is one.
pub(super) fn copy_file(from: &Path, to: &Path) -> Result<(), Error> {
    if from.is_file() {
        fs::copy(from, to).map_err(|e| files::write_error(to, 0, e))?;
    }
    Ok(())
}

/// `model.layers.<idx>.…`; `None` for what lies outside the layers.
fn layer_of(tensor: &str) -> Option<usize> {
    tensor.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
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

/// Copies the weights of a linear, `[n, k]`, each multiplied by the factors of its output and its
/// input.
fn fold(
    checkpoint: &mut Checkpoint,
    (name, tensor): (&str, &StoredTensor),
    factors: &Factors,
    writer: &mut SafetensorsWriter,
) -> Result<(), Error> {
    let (n, k) = (factors.output.len(), factors.input.len());
    assert_eq!(tensor.shape, [n, k], "factors of '{name}'");
    let row_bytes = tensor.num_bytes as usize / n;
    let mut bytes = vec![0; row_bytes];
    let mut row = vec![0.0; k];
    for (n, output) in factors.output.iter().enumerate() {
        checkpoint.read_at(tensor, (n * row_bytes) as u64, &mut bytes)?;
        to_f32(tensor.dtype, &bytes, &mut row);
        for (weight, input) in row.iter_mut().zip(&factors.input) {
            *weight *= input * output;
        }
        let folded = from_f32(tensor.dtype, &row);
        to_f32(tensor.dtype, &folded, &mut row);
        if let Some(k) = row.iter().position(|weight| !weight.is_finite()) {
            return Err(Error::model(
                checkpoint.path_of(tensor),
                format!(
                    "tensor '{name}': the weight of output {n} and input {k} becomes {} with the \
                     layer's factors; leave the layer out with --skip",
                    row[k]
                ),
            ));
        }
        writer.append(name, &folded)?;
    }
    Ok(())
}

/// Elements of a float tensor.
pub(super) fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
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

fn from_f32(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::BF16 => {
            values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
        }
        _ => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
    }
}
