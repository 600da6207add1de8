//! Which GGUF tensor becomes which tensor of the model folder, and the conversion to float16.

use std::collections::BTreeSet;
use std::io::{Read, Seek};
use std::path::Path;

use safetensors::Dtype;

use super::dequantize::{append_f16, dequantize};
use super::reader::Gguf;
use super::sizes::{Family, Sizes};
use crate::error::Error;
use crate::progress::{Progress, Report, Unit};
use crate::safetensors_writer::{SafetensorsWriter, TensorSpec};

/// Elements converted at a time, where the rows of a head are not more.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// Tensors whose content is in config.json.
const NOT_WEIGHTS: [&str; 1] = ["rope_freqs.weight"];

/// One tensor to convert.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conversion {
    pub(super) source: String,
    pub(super) target: String,
    /// As in the model folder: `[rows, columns]` or `[columns]`.
    pub(super) shape: Vec<usize>,
    /// Rows of a head whose rotary pairs are to be taken apart.
    pub(super) paired_rows: Option<usize>,
}

/// All conversions, and what they say about the model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conversions {
    pub(super) list: Vec<Conversion>,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
    pub(super) tied_head: bool,
}

/// A linear of a layer: GGUF name, model folder name, rows, columns, rotary pairs in the rows.
type LinearRow = (&'static str, &'static str, usize, usize, bool);

fn linears(sizes: &Sizes) -> Vec<LinearRow> {
    let q = sizes.num_heads * sizes.head_dim;
    let kv = sizes.num_kv_heads * sizes.head_dim;
    let (hidden, ff) = (sizes.hidden, sizes.intermediate);
    let paired = sizes.family.has_rotary_pairs();
    if sizes.family == Family::Phi3 {
        return vec![
            ("attn_qkv", "self_attn.qkv_proj", q + 2 * kv, hidden, false),
            ("attn_output", "self_attn.o_proj", hidden, q, false),
            ("ffn_up", "mlp.gate_up_proj", 2 * ff, hidden, false),
            ("ffn_down", "mlp.down_proj", hidden, ff, false),
        ];
    }
    vec![
        ("attn_q", "self_attn.q_proj", q, hidden, paired),
        ("attn_k", "self_attn.k_proj", kv, hidden, paired),
        ("attn_v", "self_attn.v_proj", kv, hidden, false),
        ("attn_output", "self_attn.o_proj", hidden, q, false),
        ("ffn_gate", "mlp.gate_proj", ff, hidden, false),
        ("ffn_up", "mlp.up_proj", ff, hidden, false),
        ("ffn_down", "mlp.down_proj", hidden, ff, false),
    ]
}

/// Lists what must be there for these sizes, and refuses a file that has less, more or other.
pub(super) fn conversions<R: Read + Seek>(
    gguf: &Gguf<R>,
    sizes: &Sizes,
) -> Result<Conversions, Error> {
    let has = |name: &str| gguf.tensors.contains_key(name);
    let attention_bias = has("blk.0.attn_q.bias");
    let mlp_bias = sizes.family == Family::Llama && has("blk.0.ffn_up.bias");
    let tied_head = !has("output.weight");
    let vector = |source: &str, target: &str, len: usize| Conversion {
        source: source.to_owned(),
        target: target.to_owned(),
        shape: vec![len],
        paired_rows: None,
    };
    let mut list = Vec::new();
    let embedding = [("token_embd.weight", "model.embed_tokens.weight")];
    let head = [("output.weight", "lm_head.weight")];
    for (source, target) in embedding.into_iter().chain(head.into_iter().filter(|_| !tied_head)) {
        let shape = vec![sizes.vocab, sizes.hidden];
        list.push(Conversion { shape, ..vector(source, target, 0) });
    }
    list.push(vector("output_norm.weight", "model.norm.weight", sizes.hidden));
    for layer in 0..sizes.num_layers {
        let source = |name: &str, part: &str| format!("blk.{layer}.{name}.{part}");
        let target = |name: &str, part: &str| format!("model.layers.{layer}.{name}.{part}");
        let mut norms = vec![
            ("attn_norm", "input_layernorm", sizes.hidden),
            ("ffn_norm", "post_attention_layernorm", sizes.hidden),
        ];
        if sizes.family == Family::Qwen3 {
            norms.push(("attn_q_norm", "self_attn.q_norm", sizes.head_dim));
            norms.push(("attn_k_norm", "self_attn.k_norm", sizes.head_dim));
        }
        for (from, to, len) in norms {
            list.push(vector(&source(from, "weight"), &target(to, "weight"), len));
        }
        for (from, to, rows, columns, paired) in linears(sizes) {
            let paired_rows = paired.then_some(sizes.head_dim);
            let one = vector(&source(from, "weight"), &target(to, "weight"), 0);
            list.push(Conversion { shape: vec![rows, columns], paired_rows, ..one });
            if has_bias(sizes.family, from, attention_bias, mlp_bias) {
                let one = vector(&source(from, "bias"), &target(to, "bias"), rows);
                list.push(Conversion { paired_rows, ..one });
            }
        }
    }
    check_tensors(gguf, &list)?;
    Ok(Conversions { list, attention_bias, mlp_bias, tied_head })
}

/// Qwen2 has biases on q, k and v alone; elsewhere the output projection has one with them.
fn has_bias(family: Family, linear: &str, attention_bias: bool, mlp_bias: bool) -> bool {
    match (family, linear) {
        (Family::Qwen2, "attn_q" | "attn_k" | "attn_v") => true,
        (Family::Llama | Family::InternLm2, _) if linear.starts_with("attn") => attention_bias,
        (Family::Llama, _) => mlp_bias,
        _ => false,
    }
}

fn check_tensors<R: Read + Seek>(gguf: &Gguf<R>, list: &[Conversion]) -> Result<(), Error> {
    for conversion in list {
        let Some(info) = gguf.tensors.get(&conversion.source) else {
            return Err(gguf.error(format!(
                "tensor '{}' of shape {:?} is missing",
                conversion.source, conversion.shape
            )));
        };
        let wanted: Vec<u64> = conversion.shape.iter().rev().map(|&d| d as u64).collect();
        // Trailing sizes of 1 mean nothing.
        let mut found = info.dims.clone();
        while found.len() > wanted.len() && found.last() == Some(&1) {
            found.pop();
        }
        if found != wanted {
            return Err(gguf.error(format!(
                "tensor '{}' has sizes {found:?}, but the metadata asks for {wanted:?}",
                conversion.source
            )));
        }
    }
    let planned: BTreeSet<&str> = list.iter().map(|c| c.source.as_str()).collect();
    let known =
        |name: &&String| !planned.contains(name.as_str()) && !NOT_WEIGHTS.contains(&name.as_str());
    match gguf.tensors.keys().find(known) {
        None => Ok(()),
        Some(name) => Err(Error::Unsupported(format!(
            "{}: tensor '{name}' is not part of this architecture as it is known here; importing \
             without it would change the model",
            gguf.path.display()
        ))),
    }
}

/// Writes all conversions into one float16 safetensors file.
pub(super) fn write_weights<R: Read + Seek>(
    gguf: &mut Gguf<R>,
    list: &[Conversion],
    path: &Path,
    report: Report,
) -> Result<(), Error> {
    let spec = |c: &Conversion| TensorSpec {
        name: c.target.clone(),
        dtype: Dtype::F16,
        shape: c.shape.clone(),
    };
    let mut writer = SafetensorsWriter::create(path, list.iter().map(spec).collect())?;
    let total = list.iter().map(|c| c.shape.iter().product::<usize>() as u64 * 2).sum();
    let mut done = 0;
    for conversion in list {
        convert(gguf, conversion, &mut writer, &mut |bytes| {
            done += bytes;
            report(Progress { stage: "converting weights", done, total, unit: Unit::Bytes });
        })?;
    }
    writer.finish()
}

/// Converts one tensor, some rows at a time.
fn convert<R: Read + Seek>(
    gguf: &mut Gguf<R>,
    conversion: &Conversion,
    writer: &mut SafetensorsWriter,
    wrote: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let info = gguf.tensors[&conversion.source].clone();
    // A vector whose elements pair up is handled as rows of one.
    let columns = match conversion.paired_rows {
        Some(_) if conversion.shape.len() == 1 => 1,
        _ => conversion.shape[conversion.shape.len() - 1],
    };
    let rows = conversion.shape.iter().product::<usize>() / columns;
    let unit = conversion.paired_rows.unwrap_or(1);
    let rows_at_once = (CHUNK_ELEMENTS / columns).max(1).next_multiple_of(unit).min(rows);
    let format = info.format;
    if format.elements() > 1 && columns % format.elements() != 0 {
        return Err(gguf.error(format!("tensor '{}' is quantized across rows", conversion.source)));
    }
    let row_bytes = columns / format.elements() * format.bytes();
    let (mut blocks, mut values) = (Vec::new(), Vec::new());
    let mut ordered = Vec::new();
    for first in (0..rows).step_by(rows_at_once) {
        let count = rows_at_once.min(rows - first);
        blocks.resize(count * row_bytes, 0);
        values.resize(count * columns, 0.0);
        gguf.read_at(info.offset + (first * row_bytes) as u64, &mut blocks)?;
        dequantize(format, &blocks, &mut values);
        if let Some(head_dim) = conversion.paired_rows {
            take_pairs_apart(&values, head_dim, columns, &mut ordered);
            std::mem::swap(&mut values, &mut ordered);
        }
        let mut bytes = Vec::new();
        append_f16(&values, &mut bytes).map_err(|(index, value)| {
            gguf.error(format!(
                "tensor '{}': the value {value} in row {} does not fit into float16, which ends \
                 at 65504",
                conversion.source,
                first + index / columns
            ))
        })?;
        writer.append(&conversion.target, &bytes)?;
        wrote(bytes.len() as u64);
    }
    Ok(())
}

/// Rows `2j` and `2j + 1` of each head become rows `j` and `j + head_dim / 2`: rotary pairs are
/// neighbours in GGUF, and half a head apart in a model folder.
fn take_pairs_apart(values: &[f32], head_dim: usize, columns: usize, out: &mut Vec<f32>) {
    out.clear();
    for head in values.chunks_exact(head_dim * columns) {
        for parity in 0..2 {
            for pair in 0..head_dim / 2 {
                let row = 2 * pair + parity;
                out.extend_from_slice(&head[row * columns..][..columns]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::take_pairs_apart;

    #[test]
    fn pairs_come_apart_within_each_head() {
        let values: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let mut out = Vec::new();
        take_pairs_apart(&values, 4, 2, &mut out);
        let rows: Vec<f32> = out.iter().step_by(2).map(|v| v / 2.0).collect();
        assert_eq!(rows, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}
