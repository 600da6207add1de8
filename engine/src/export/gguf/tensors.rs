//! Which tensor of the model folder becomes which GGUF tensor, and their writing.

use std::path::Path;

use bespoke_kernel_gen::model::{Architecture, ModelConfig, RopeScaling};
use bespoke_kernel_gen::spec::{LinearRole, ModelShape};
use safetensors::Dtype;

use super::blocks::{self, BLOCK, Rounding};
use super::writer::{GgufWriter, TensorEntry};
use super::{ExportOptions, HeadFormat, LinearFormat};
use crate::error::Error;
use crate::import::gguf::BlockFormat;
use crate::model::linear::{LinearPart, LinearSource};
use crate::model::safetensors::Checkpoint;
use crate::model::weights::{ModelWeights, Weights};

/// Bytes that are handed to the writer at once.
const CHUNK_BYTES: usize = 1 << 20;

/// All tensors, in the order in which they are written.
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
}

/// The tensors that come from one read.
pub(super) struct Part {
    source: Source,
    pub(super) tensors: Vec<Tensor>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    RopeFactors,
    Embedding,
    FinalNorm,
    Norms {
        layer_idx: usize,
    },
    /// For the head `layer_idx` says nothing.
    Linear {
        role: LinearRole,
        layer_idx: usize,
    },
}

const HEAD: Source = Source::Linear { role: LinearRole::Head, layer_idx: 0 };

/// One tensor of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) entry: TensorEntry,
    /// Its first output in the linear that it is a part of.
    first_row: usize,
    /// Rows of a head whose rotary pairs become neighbours.
    paired_rows: Option<usize>,
}

impl Plan {
    /// Lists the tensors with their formats; `dir` is a folder that the loader accepts.
    pub(super) fn new(
        dir: &Path,
        config: &ModelConfig,
        shape: &ModelShape,
        options: &ExportOptions,
    ) -> Result<Plan, Error> {
        let checkpoint = Checkpoint::open(dir)?;
        Planner { checkpoint, config, shape, options }.plan()
    }

    pub(super) fn num_tensors(&self) -> usize {
        self.parts.iter().map(|part| part.tensors.len()).sum()
    }

    pub(super) fn entries(&self) -> Vec<TensorEntry> {
        let tensors = self.parts.iter().flat_map(|part| &part.tensors);
        tensors.map(|tensor| tensor.entry.clone()).collect()
    }

    /// The formats of the layers' linears.
    pub(super) fn linear_formats(&self) -> impl Iterator<Item = BlockFormat> {
        let is_linear =
            |part: &&Part| matches!(part.source, Source::Linear { .. }) && part.source != HEAD;
        let tensors = self.parts.iter().filter(is_linear).flat_map(|part| &part.tensors);
        tensors.filter(|t| t.entry.shape.len() == 2).map(|tensor| tensor.entry.format)
    }
}

struct Planner<'a> {
    checkpoint: Checkpoint,
    config: &'a ModelConfig,
    shape: &'a ModelShape,
    options: &'a ExportOptions,
}

impl Planner<'_> {
    fn plan(&self) -> Result<Plan, Error> {
        let (config, shape) = (self.config, self.shape);
        let mut parts = Vec::new();
        let one = |source, tensor| Part { source, tensors: vec![tensor] };
        if matches!(config.rope_scaling, RopeScaling::Llama3 { .. }) {
            let factors = vector("rope_freqs.weight".to_owned(), config.rotary_dim / 2);
            parts.push(one(Source::RopeFactors, factors));
        }
        let sizes = [shape.vocab_size, shape.hidden_size];
        let embedding = match config.architecture {
            Architecture::InternLm2 => "model.tok_embeddings",
            _ => "model.embed_tokens",
        };
        let tensor = self.head("token_embd.weight", embedding, sizes)?;
        parts.push(one(Source::Embedding, tensor));
        // NOTE: llama.cpp's InternLM2 has a head of its own, always.
        if !config.tie_word_embeddings || config.architecture == Architecture::InternLm2 {
            let module = match config.tie_word_embeddings {
                true => embedding,
                false => config.architecture.modules(LinearRole::Head)[0],
            };
            parts.push(one(HEAD, self.head("output.weight", module, sizes)?));
        }
        let norm = vector("output_norm.weight".to_owned(), shape.hidden_size);
        parts.push(one(Source::FinalNorm, norm));
        for layer_idx in 0..shape.num_layers {
            parts
                .push(Part { source: Source::Norms { layer_idx }, tensors: self.norms(layer_idx) });
            for role in [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down] {
                let source = Source::Linear { role, layer_idx };
                parts.push(Part { source, tensors: self.linear(role, layer_idx)? });
            }
        }
        Ok(Plan { parts })
    }

    fn norms(&self, layer_idx: usize) -> Vec<Tensor> {
        let name = |part: &str| format!("blk.{layer_idx}.{part}.weight");
        let hidden = self.shape.hidden_size;
        let mut all = vec![vector(name("attn_norm"), hidden), vector(name("ffn_norm"), hidden)];
        if self.shape.qk_norm {
            let head_dim = self.shape.head_dim;
            all.push(vector(name("attn_q_norm"), head_dim));
            all.push(vector(name("attn_k_norm"), head_dim));
        }
        all
    }

    /// The embedding or the head.
    fn head(&self, name: &str, module: &str, sizes: [usize; 2]) -> Result<Tensor, Error> {
        let format = match self.options.head {
            HeadFormat::AsStored => self.format(module)?,
            HeadFormat::F16 => BlockFormat::F16,
            HeadFormat::Q8_0 => BlockFormat::Q8_0,
        };
        matrix(name.to_owned(), sizes, format)
    }

    /// The parts of a linear and their biases.
    fn linear(&self, role: LinearRole, layer_idx: usize) -> Result<Vec<Tensor>, Error> {
        let linear = self.shape.linear(role);
        let modules = self.config.architecture.modules(role);
        let mut all = Vec::new();
        let mut first_row = 0;
        for (idx, (name, num_rows, paired_rows)) in self.outputs(role).into_iter().enumerate() {
            // Fused modules are one for all outputs.
            let module = modules.get(idx).unwrap_or(&modules[0]);
            let format = self.format(&format!("model.layers.{layer_idx}.{module}"))?;
            let name = |part: &str| format!("blk.{layer_idx}.{name}.{part}");
            let one = matrix(name("weight"), [num_rows, linear.k], format)?;
            all.push(Tensor { first_row, paired_rows, ..one });
            if linear.bias {
                let one = vector(name("bias"), num_rows);
                all.push(Tensor { first_row, paired_rows, ..one });
            }
            first_row += num_rows;
        }
        Ok(all)
    }

    /// Name, number of outputs and rotary pairs of the tensors that make up a linear.
    fn outputs(&self, role: LinearRole) -> Vec<(&'static str, usize, Option<usize>)> {
        let shape = self.shape;
        let n = shape.linear(role).n;
        let is_phi3 = self.config.architecture == Architecture::Phi3;
        // Where llama.cpp rotates neighbours; elsewhere it rotates halves, as model folders do.
        let is_paired = matches!(
            self.config.architecture,
            Architecture::Llama | Architecture::Mistral | Architecture::InternLm2
        );
        let pairs = is_paired.then_some(shape.head_dim);
        let (q, kv) = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim);
        match role {
            LinearRole::Qkv if is_phi3 => vec![("attn_qkv", n, None)],
            LinearRole::Qkv => {
                vec![("attn_q", q, pairs), ("attn_k", kv, pairs), ("attn_v", kv, None)]
            }
            LinearRole::O => vec![("attn_output", n, None)],
            LinearRole::GateUp if is_phi3 => vec![("ffn_up", n, None)],
            LinearRole::GateUp => vec![("ffn_gate", n / 2, None), ("ffn_up", n / 2, None)],
            LinearRole::Down => vec![("ffn_down", n, None)],
            LinearRole::Head => vec![("output", n, None)],
        }
    }

    /// Floats as they are stored; what has no `weight` is quantized.
    fn format(&self, module: &str) -> Result<BlockFormat, Error> {
        let name = format!("{module}.weight");
        match self.checkpoint.get(&name).map(|tensor| tensor.dtype) {
            Some(Dtype::F32) => Ok(BlockFormat::F32),
            Some(Dtype::F16) => Ok(BlockFormat::F16),
            Some(Dtype::BF16) => Ok(BlockFormat::BF16),
            Some(other) => {
                let message = format!("tensor '{name}' has type {other}, not one of floats");
                Err(Error::model(self.checkpoint.dir(), message))
            }
            None => Ok(match self.options.linears {
                LinearFormat::Q4_1 => BlockFormat::Q4_1,
                LinearFormat::Q5_0 => BlockFormat::Q5_0,
            }),
        }
    }
}

/// Writes the tensors of `part`.
pub(super) fn write(
    part: &Part,
    config: &ModelConfig,
    weights: &Weights<'_>,
    writer: &mut GgufWriter,
    rounding: &mut Rounding,
) -> Result<(), Error> {
    match part.source {
        Source::RopeFactors => write_vectors(part, &[&rope_factors(config)], writer),
        Source::FinalNorm => write_vectors(part, &[&weights.final_norm()?], writer),
        Source::Norms { layer_idx } => {
            let norms = weights.norms(layer_idx)?;
            let mut values = vec![norms.attention.as_slice(), &norms.mlp];
            if let Some((q, k)) = &norms.qk {
                values.extend([q.as_slice(), k]);
            }
            write_vectors(part, &values, writer)
        }
        Source::Embedding => {
            let embedding = weights.embedding()?;
            let parts = vec![LinearPart::Dense(embedding.view())];
            let source = LinearSource { parts, row_map: None, bias: None };
            write_linear(part, &source, writer, rounding)
        }
        Source::Linear { role, layer_idx } => {
            let linear = weights.linear(role, layer_idx)?;
            write_linear(part, &linear.source(), writer, rounding)
        }
    }
}

/// Float32, as llama.cpp wants everything of one dimension.
fn write_vectors(part: &Part, values: &[&[f32]], writer: &mut GgufWriter) -> Result<(), Error> {
    for (tensor, values) in part.tensors.iter().zip(values) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.append(&tensor.entry.name, &bytes)?;
    }
    Ok(())
}

fn write_linear(
    part: &Part,
    source: &LinearSource<'_>,
    writer: &mut GgufWriter,
    rounding: &mut Rounding,
) -> Result<(), Error> {
    for tensor in &part.tensors {
        let TensorEntry { name, shape, format } = &tensor.entry;
        let mut bytes = Vec::new();
        for row in 0..shape[0] {
            let row = tensor.first_row + unpaired(row, tensor.paired_rows);
            match (&source.bias, shape.len()) {
                (Some(bias), 1) => bytes.extend_from_slice(&bias[row].to_le_bytes()),
                _ => {
                    let (part_idx, row) = source.locate(row);
                    let part = &source.parts[part_idx];
                    blocks::append_row(part, row, *format, rounding, &mut bytes)
                        .map_err(|reason| Error::Unsupported(format!("'{name}': {reason}")))?;
                }
            }
            if bytes.len() >= CHUNK_BYTES {
                writer.append(name, &bytes)?;
                bytes.clear();
            }
        }
        if !bytes.is_empty() {
            writer.append(name, &bytes)?;
        }
    }
    Ok(())
}

/// The row of the model folder that becomes `row`: the rotary pair `j` and `j + head_dim / 2` of a
/// head becomes the rows `2j` and `2j + 1`.
fn unpaired(row: usize, paired_rows: Option<usize>) -> usize {
    let Some(head_dim) = paired_rows else { return row };
    let (head, at) = (row / head_dim, row % head_dim);
    head * head_dim + at / 2 + at % 2 * (head_dim / 2)
}

/// What Llama 3 divides each frequency by.
fn rope_factors(config: &ModelConfig) -> Vec<f32> {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } =
        config.rope_scaling
    else {
        return Vec::new();
    };
    let original = original_max_position as f64;
    let divisor = |pair_idx: usize| {
        let exponent = 2.0 * pair_idx as f64 / config.rotary_dim as f64;
        let wavelength = std::f64::consts::TAU * config.rope_theta.powf(exponent);
        if wavelength < original / high_freq_factor {
            1.0
        } else if wavelength > original / low_freq_factor {
            factor
        } else {
            let range = high_freq_factor - low_freq_factor;
            let smooth = (original / wavelength - low_freq_factor) / range;
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..config.rotary_dim / 2).map(|pair_idx| divisor(pair_idx) as f32).collect()
}

fn vector(name: String, len: usize) -> Tensor {
    let entry = TensorEntry { name, shape: vec![len], format: BlockFormat::F32 };
    Tensor { entry, first_row: 0, paired_rows: None }
}

fn matrix(name: String, [n, k]: [usize; 2], format: BlockFormat) -> Result<Tensor, Error> {
    if !k.is_multiple_of(format.elements()) {
        return Err(Error::Unsupported(format!(
            "'{name}' has rows of {k} weights; {} takes multiples of {BLOCK}",
            format.name()
        )));
    }
    let entry = TensorEntry { name, shape: vec![n, k], format };
    Ok(Tensor { entry, first_row: 0, paired_rows: None })
}

#[cfg(test)]
mod tests {
    use super::unpaired;

    #[test]
    fn rotary_pairs_become_neighbours_within_each_head() {
        let order: Vec<usize> = (0..16).map(|row| unpaired(row, Some(8))).collect();
        assert_eq!(order, [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]);
        assert_eq!(unpaired(5, None), 5);
    }
}
