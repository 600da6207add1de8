//! What the metadata says about a model: family, sizes, rotary embedding.

use std::io::{Read, Seek};

use serde_json::{Value as Json, json};

use super::dequantize::{BlockFormat, dequantize};
use super::reader::{Gguf, Value};
use crate::error::Error;

const LAYERS_MAX: u64 = 1 << 10;
const WIDTH_MAX: u64 = 1 << 18;
const VOCAB_MAX: u64 = 1 << 21;
const CONTEXT_MAX: u64 = 1 << 24;

/// A model architecture that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// Llama, Mistral and SmolLM2. Rows of q and k are stored in rotary pairs.
    Llama,
    /// The same sizes and arithmetic as Llama, so it is written as one.
    InternLm2,
    Qwen2,
    Qwen3,
    Phi3,
}

const FAMILIES: [(&str, Family); 5] = [
    ("llama", Family::Llama),
    ("internlm2", Family::InternLm2),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("phi3", Family::Phi3),
];

impl Family {
    /// `architectures` and `model_type` of config.json.
    pub(super) fn class(self) -> (&'static str, &'static str) {
        match self {
            Family::Llama | Family::InternLm2 => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Family::Phi3 => ("Phi3ForCausalLM", "phi3"),
        }
    }

    /// Whether rows `2j` and `2j + 1` of a head are stored for `j` and `j + head_dim / 2`.
    pub(super) fn has_rotary_pairs(self) -> bool {
        matches!(self, Family::Llama | Family::InternLm2)
    }
}

/// All sizes of the model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sizes {
    pub(super) family: Family,
    pub(super) num_layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) rotary_dim: usize,
    pub(super) vocab: usize,
    pub(super) context: usize,
    pub(super) sliding_window: Option<usize>,
    pub(super) norm_eps: f64,
    pub(super) rope_theta: f64,
}

/// Typed look-ups under the architecture's prefix.
pub(super) struct Metadata<'a, R> {
    pub(super) gguf: &'a Gguf<R>,
    pub(super) prefix: String,
}

impl<R: Read + Seek> Metadata<'_, R> {
    fn get(&self, key: &str) -> (String, Option<&Value>) {
        let key = format!("{}.{key}", self.prefix);
        let value = self.gguf.metadata.get(&key);
        (key, value)
    }

    /// An integer from 1 to `max`.
    fn count(&self, key: &str, max: u64) -> Result<Option<usize>, Error> {
        let (key, value) = self.get(key);
        let number = match value {
            None => return Ok(None),
            Some(Value::Integer(number)) => *number,
            // Some files give one value a layer; layers that differ cannot be expressed.
            Some(Value::Integers(all)) if all.windows(2).all(|w| w[0] == w[1]) => {
                all.first().copied().unwrap_or(0).into()
            }
            Some(other) => {
                let text = format!("{other:?}");
                return Err(self.gguf.error(format!("{key} is {text:.80}, not one integer")));
            }
        };
        match u64::try_from(number) {
            Ok(n) if (1..=max).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.gguf.error(format!("{key} is {number}, not from 1 to {max}"))),
        }
    }

    fn required(&self, key: &str, max: u64) -> Result<usize, Error> {
        self.count(key, max)?.ok_or_else(|| {
            self.gguf.error(format!("metadata key '{}.{key}' is missing", self.prefix))
        })
    }

    /// A positive finite number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        let (key, value) = self.get(key);
        let number = match value {
            None => return Ok(None),
            Some(Value::Float(number)) => *number,
            Some(Value::Integer(number)) => *number as f64,
            Some(other) => return Err(self.gguf.error(format!("{key} is {other:?}, no number"))),
        };
        if number.is_finite() && number > 0.0 {
            Ok(Some(number))
        } else {
            Err(self.gguf.error(format!("{key} is {number}, not above 0")))
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.get(key).1 {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }
}

/// The family named by `general.architecture`.
fn family<R: Read + Seek>(gguf: &Gguf<R>) -> Result<(Family, String), Error> {
    let Some(Value::String(name)) = gguf.metadata.get("general.architecture") else {
        return Err(gguf.error("metadata key 'general.architecture' is missing"));
    };
    match FAMILIES.iter().find(|row| row.0 == name) {
        Some(row) => Ok((row.1, name.clone())),
        None => {
            let known: Vec<_> = FAMILIES.iter().map(|row| row.0).collect();
            Err(Error::Unsupported(format!(
                "{}: architecture '{name:.60}' cannot be imported; known are {}",
                gguf.path.display(),
                known.join(", ")
            )))
        }
    }
}

/// Reads and cross-checks all sizes; returns them with the metadata prefix.
pub(super) fn sizes<R: Read + Seek>(gguf: &Gguf<R>) -> Result<(Sizes, Metadata<'_, R>), Error> {
    let (family, prefix) = family(gguf)?;
    let meta = Metadata { gguf, prefix };
    if let Some(experts) = meta.count("expert_count", u64::MAX).unwrap_or(Some(1)) {
        return Err(Error::Unsupported(format!(
            "{}: {}.expert_count is {experts}; mixture-of-experts models cannot be imported",
            gguf.path.display(),
            meta.prefix
        )));
    }
    let hidden = meta.required("embedding_length", WIDTH_MAX)?;
    let num_heads = meta.required("attention.head_count", WIDTH_MAX)?;
    let num_kv_heads = meta.count("attention.head_count_kv", WIDTH_MAX)?.unwrap_or(num_heads);
    let head_dim = match meta.count("attention.key_length", WIDTH_MAX)? {
        Some(dim) => dim,
        None if hidden % num_heads == 0 => hidden / num_heads,
        None => {
            return Err(gguf.error(format!("{num_heads} heads do not divide the width {hidden}")));
        }
    };
    let value_dim = meta.count("attention.value_length", WIDTH_MAX)?.unwrap_or(head_dim);
    let rotary_dim = meta.count("rope.dimension_count", WIDTH_MAX)?.unwrap_or(head_dim);
    if value_dim != head_dim || num_heads % num_kv_heads != 0 || head_dim % 2 != 0 {
        return Err(gguf.error(format!(
            "{num_heads} query heads of {head_dim} and {num_kv_heads} KV heads of {value_dim} do \
             not go together"
        )));
    }
    let partial = rotary_dim != head_dim;
    if rotary_dim > head_dim || rotary_dim % 2 != 0 || (partial && family != Family::Phi3) {
        return Err(gguf.error(format!(
            "{}.rope.dimension_count is {rotary_dim} for heads of {head_dim}",
            meta.prefix
        )));
    }
    let norm_eps = meta.number("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
        gguf.error(format!("'{}.attention.layer_norm_rms_epsilon' is missing", meta.prefix))
    })?;
    let sizes = Sizes {
        family,
        num_layers: meta.required("block_count", LAYERS_MAX)?,
        hidden,
        intermediate: meta.required("feed_forward_length", WIDTH_MAX)?,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        vocab: vocab_size(gguf)?,
        context: meta.required("context_length", CONTEXT_MAX)?,
        sliding_window: sliding_window(&meta)?,
        norm_eps,
        rope_theta: meta.number("rope.freq_base")?.unwrap_or(10_000.0),
    };
    Ok((sizes, meta))
}

/// The rows of the embedding table, which may be more than there are tokens.
fn vocab_size<R: Read + Seek>(gguf: &Gguf<R>) -> Result<usize, Error> {
    let rows = gguf.tensors.get("token_embd.weight").and_then(|t| t.dims.get(1)).copied();
    match rows {
        Some(rows) if rows <= VOCAB_MAX => Ok(rows as usize),
        Some(rows) => Err(gguf.error(format!("a vocabulary of {rows}, above {VOCAB_MAX}"))),
        None => Err(gguf.error("tensor 'token_embd.weight' is missing or has one dimension")),
    }
}

/// A window of 0, or one as long as the context, is none.
fn sliding_window<R: Read + Seek>(meta: &Metadata<R>) -> Result<Option<usize>, Error> {
    if let (_, Some(Value::Integer(0))) = meta.get("attention.sliding_window") {
        return Ok(None);
    }
    meta.count("attention.sliding_window", u64::from(u32::MAX))
}

/// `rope_scaling` of config.json.
pub(super) fn rope_scaling<R: Read + Seek>(
    meta: &Metadata<R>,
    sizes: &Sizes,
) -> Result<Json, Error> {
    let kind =
        meta.text("rope.scaling.type").unwrap_or(match meta.number("rope.scale_linear")? {
            Some(_) => "linear",
            None => "none",
        });
    let factor = match meta.number("rope.scaling.factor")? {
        Some(factor) => factor,
        None => meta.number("rope.scale_linear")?.unwrap_or(1.0),
    };
    match kind {
        "none" => Ok(Json::Null),
        "linear" => Ok(json!({"rope_type": "linear", "type": "linear", "factor": factor})),
        "yarn" => yarn_scaling(meta, sizes, factor),
        _ => Err(Error::Unsupported(format!(
            "{}: {}.rope.scaling.type '{kind:.60}' cannot be imported; none, linear and yarn can",
            meta.gguf.path.display(),
            meta.prefix
        ))),
    }
}

fn yarn_scaling<R: Read + Seek>(
    meta: &Metadata<R>,
    sizes: &Sizes,
    factor: f64,
) -> Result<Json, Error> {
    let original = meta
        .count("rope.scaling.original_context_length", CONTEXT_MAX)?
        .unwrap_or(((sizes.context as f64 / factor) as usize).max(1));
    let mut scaling = json!({
        "rope_type": "yarn",
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    });
    for (key, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
        if let Some(value) = meta.number(&format!("rope.scaling.{key}"))? {
            scaling[name] = json!(value);
        }
    }
    // NOTE: the GGUF factor multiplies YaRN's own; config.json holds their product.
    if let Some(attn_factor) = meta.number("rope.scaling.attn_factor")?
        && attn_factor != 1.0
    {
        scaling["attention_factor"] = json!(attn_factor * (0.1 * factor.ln() + 1.0));
    }
    Ok(scaling)
}

/// Llama 3.1 and later store their scaling as one divisor a frequency, in `rope_freqs.weight`.
/// The settings are found from the largest divisor and checked against all the others.
pub(super) fn llama3_scaling<R: Read + Seek>(
    gguf: &mut Gguf<R>,
    sizes: &Sizes,
) -> Result<Option<Json>, Error> {
    let Some(info) = gguf.tensors.get("rope_freqs.weight").cloned() else { return Ok(None) };
    let count = sizes.rotary_dim / 2;
    if info.format != BlockFormat::F32 || info.dims != [count as u64] {
        return Err(gguf.error(format!(
            "tensor 'rope_freqs.weight' is {} of shape {:?}, not F32 of [{count}]",
            info.format.name(),
            info.dims
        )));
    }
    let mut bytes = vec![0; count * 4];
    gguf.read_at(info.offset, &mut bytes)?;
    let mut divisors = vec![0.0; count];
    dequantize(BlockFormat::F32, &bytes, &mut divisors);
    let factor = divisors.iter().copied().fold(1.0, f32::max);
    if factor == 1.0 && divisors.iter().all(|&d| d == 1.0) {
        return Ok(None);
    }
    let original = 8192.0;
    let agrees = divisors.iter().enumerate().all(|(i, &divisor)| {
        let exponent = 2.0 * i as f64 / sizes.rotary_dim as f64;
        let wavelength = std::f64::consts::TAU * sizes.rope_theta.powf(exponent);
        let expected = llama3_divisor(wavelength, f64::from(factor), original);
        (f64::from(divisor) / expected - 1.0).abs() < 1e-3
    });
    if !agrees {
        return Err(Error::Unsupported(format!(
            "{}: the frequencies in 'rope_freqs.weight' are not those of Llama 3 scaling with \
             factor {factor} and an original context of {original}",
            gguf.path.display()
        )));
    }
    Ok(Some(json!({
        "rope_type": "llama3",
        "type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original as usize,
    })))
}

/// What Llama 3 scaling divides the frequency of this wavelength by (low 1, high 4).
fn llama3_divisor(wavelength: f64, factor: f64, original: f64) -> f64 {
    if wavelength < original / 4.0 {
        1.0
    } else if wavelength > original {
        factor
    } else {
        let smooth = (original / wavelength - 1.0) / 3.0;
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}
