//! `config.json` → `ModelConfig`, and refusals of what cannot run.

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::fields::{Fields, show};
use super::{Architecture, CONTEXT_MAX, ModelConfig, RopeScaling, quantization, rope};
use crate::error::Error;
use crate::spec::DType;

const FILE_BYTES_MAX: u64 = 4 << 20;
const LAYERS_MAX: usize = 1024;
const HIDDEN_MAX: usize = 1 << 17;
const INTERMEDIATE_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 21;
const HEADS_MAX: usize = 1 << 12;
const HEAD_DIM_MAX: usize = 1 << 10;

const SUPPORTED: &str =
    "supported are llama, mistral, qwen2, qwen3, internlm2 and phi3 causal language models";

/// Fields that only mixture-of-experts models have.
const EXPERT_FIELDS: [&str; 8] = [
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "moe_num_experts",
    "decoder_sparse_step",
];

/// `model_type`, class name in `architectures`.
const ARCHITECTURES: [(&str, &str, Architecture); 6] = [
    ("llama", "LlamaForCausalLM", Architecture::Llama),
    ("mistral", "MistralForCausalLM", Architecture::Mistral),
    ("qwen2", "Qwen2ForCausalLM", Architecture::Qwen2),
    ("qwen3", "Qwen3ForCausalLM", Architecture::Qwen3),
    ("internlm2", "InternLM2ForCausalLM", Architecture::InternLm2),
    ("phi3", "Phi3ForCausalLM", Architecture::Phi3),
];

pub(super) fn read(path: &Path) -> Result<String, Error> {
    let shown = path.display().to_string();
    let io = |source| Error::Io { path: shown.clone(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(io)?;
    // NOTE: one byte over the limit tells a file that is too long.
    let bytes = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(io)?;
    if bytes as u64 > FILE_BYTES_MAX {
        let message = format!("more than {FILE_BYTES_MAX} bytes, too long for a config.json");
        return Err(Error::Source { position: shown, message });
    }
    Ok(text)
}

pub(super) fn parse(json: &str) -> Result<ModelConfig, Error> {
    let value: Value = serde_json::from_str(json).map_err(|error| Error::Source {
        position: format!("config.json:{}:{}", error.line(), error.column()),
        message: format!("not JSON: {error}"),
    })?;
    let Value::Object(map) = &value else {
        let message = format!("{} given, an object expected", show(&value));
        return Err(Error::Source { position: "config.json:1:1".to_string(), message });
    };
    let config = Fields::new(map, "");
    refuse_experts(&config)?;
    let architecture = parse_architecture(&config)?;
    refuse_activation(&config)?;
    parse_config(&config, architecture)
}

fn parse_config(config: &Fields<'_>, architecture: Architecture) -> Result<ModelConfig, Error> {
    let vocab_size = config.size("vocab_size", VOCAB_MAX)?;
    let hidden_size = config.size("hidden_size", HIDDEN_MAX)?;
    let num_layers = config.size("num_hidden_layers", LAYERS_MAX)?;
    let max_position = config.size_or_none("max_position_embeddings", CONTEXT_MAX)?.unwrap_or(2048);
    let (num_heads, num_kv_heads) = parse_heads(config, architecture)?;
    let head_dim = parse_head_dim(config, hidden_size, num_heads)?;
    let rope = rope::parse(config, architecture, max_position)?;
    let rotary_dim = parse_rotary_dim(config, head_dim, &rope)?;
    let bias = parse_bias(config, architecture)?;
    let quantization = quantization::parse(config)?;
    Ok(ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size: config.size("intermediate_size", INTERMEDIATE_MAX)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        rms_norm_eps: config.number_or_none("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6) as f32,
        rope_theta: rope.theta,
        rope_scaling: rope.scaling,
        max_position,
        sliding_window: parse_window(config, architecture, num_layers)?,
        qk_norm: architecture == Architecture::Qwen3,
        qkv_bias: bias.qkv,
        o_bias: bias.o,
        mlp_bias: bias.mlp,
        tie_word_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(false),
        dtype: parse_dtype(config)?,
        quantization,
        bos_token_id: config.tokens("bos_token_id", vocab_size)?.first().copied(),
        eos_token_ids: config.tokens("eos_token_id", vocab_size)?,
    })
}

fn refuse_experts(config: &Fields<'_>) -> Result<(), Error> {
    for name in EXPERT_FIELDS {
        let Some(value) = config.get(name) else { continue };
        if value.as_u64() != Some(0) {
            let message = format!(
                "{} given; mixture of experts is not supported, use a dense model",
                show(value)
            );
            return Err(config.error(name, message));
        }
    }
    Ok(())
}

fn refuse_activation(config: &Fields<'_>) -> Result<(), Error> {
    match config.text("hidden_act")? {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => {
            let shown = show(&other.into());
            Err(config.error("hidden_act", format!("{shown} is not supported; supported is silu")))
        }
    }
}

/// `model_type` and `architectures` say the same, or one of them says it alone.
fn parse_architecture(config: &Fields<'_>) -> Result<Architecture, Error> {
    let refuse = |field, value: &str| {
        let shown = show(&value.into());
        Err(config.error(field, format!("{shown} is not supported; {SUPPORTED}")))
    };
    let by_type = match config.text("model_type")? {
        None => None,
        Some(name) => match ARCHITECTURES.iter().find(|row| row.0 == name) {
            Some(row) => Some(row.2),
            None => return refuse("model_type", name),
        },
    };
    let classes = config.texts("architectures", 16)?.unwrap_or_default();
    let by_class = match classes.first() {
        None => None,
        // NOTE: the first conversions of Llama spelled the class this way.
        Some(&"LLaMAForCausalLM") => Some(Architecture::Llama),
        Some(name) => match ARCHITECTURES.iter().find(|row| row.1 == *name) {
            Some(row) => Some(row.2),
            None => return refuse("architectures", name),
        },
    };
    match (by_type, by_class) {
        (Some(by_type), Some(by_class)) if by_type != by_class => Err(config.error(
            "architectures",
            format!("{by_class:?} does not agree with model_type {by_type:?}"),
        )),
        (Some(architecture), _) | (None, Some(architecture)) => Ok(architecture),
        (None, None) => Err(config.error("model_type", format!("missing; {SUPPORTED}"))),
    }
}

/// Numbers of query and KV heads.
fn parse_heads(config: &Fields<'_>, architecture: Architecture) -> Result<(usize, usize), Error> {
    let num_heads = config.size("num_attention_heads", HEADS_MAX)?;
    let name = "num_key_value_heads";
    let num_kv_heads = match config.size_or_none(name, HEADS_MAX)? {
        Some(num_kv_heads) => num_kv_heads,
        // NOTE: Mistral's own default is 8, not the number of query heads.
        None if architecture == Architecture::Mistral => config.size(name, HEADS_MAX)?,
        None => num_heads,
    };
    if !num_heads.is_multiple_of(num_kv_heads) {
        let message = format!("{num_kv_heads} does not divide num_attention_heads {num_heads}");
        return Err(config.error(name, message));
    }
    Ok((num_heads, num_kv_heads))
}

fn parse_head_dim(
    config: &Fields<'_>,
    hidden_size: usize,
    num_heads: usize,
) -> Result<usize, Error> {
    let given = config.size_or_none("head_dim", HEAD_DIM_MAX)?;
    let head_dim = match given {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let message = format!(
                "{num_heads} does not divide hidden_size {hidden_size}, and there is no head_dim"
            );
            return Err(config.error("num_attention_heads", message));
        }
    };
    if !head_dim.is_multiple_of(8) || head_dim > HEAD_DIM_MAX {
        let origin = if given.is_some() { "" } else { " (hidden_size / num_attention_heads)" };
        let message = format!("{head_dim}{origin} is not a multiple of 8 up to {HEAD_DIM_MAX}");
        return Err(config.error("head_dim", message));
    }
    Ok(head_dim)
}

fn parse_rotary_dim(
    config: &Fields<'_>,
    head_dim: usize,
    rope: &rope::Rope,
) -> Result<usize, Error> {
    let rotary_dim = (head_dim as f64 * rope.partial_rotary_factor) as usize;
    // NOTE: dynamic scaling raises the base to the power d / (d − 2).
    let min = if matches!(rope.scaling, RopeScaling::Dynamic { .. }) { 4 } else { 2 };
    if !rotary_dim.is_multiple_of(2) || !(min..=head_dim).contains(&rotary_dim) {
        let message = format!(
            "{} of head_dim {head_dim} is {rotary_dim}; an even number from {min} to {head_dim} \
             expected",
            rope.partial_rotary_factor
        );
        return Err(config.error("partial_rotary_factor", message));
    }
    Ok(rotary_dim)
}

struct Bias {
    qkv: bool,
    o: bool,
    mlp: bool,
}

fn parse_bias(config: &Fields<'_>, architecture: Architecture) -> Result<Bias, Error> {
    let attention = config.flag("attention_bias")?.unwrap_or(false);
    let mlp = config.flag("mlp_bias")?.unwrap_or(false);
    let (takes_attention, takes_mlp) = match architecture {
        Architecture::Llama => (true, true),
        Architecture::Qwen3 => (true, false),
        _ => (false, false),
    };
    for (name, given, taken) in
        [("attention_bias", attention, takes_attention), ("mlp_bias", mlp, takes_mlp)]
    {
        if given && !taken {
            let message = format!("true given, but {architecture:?} models have no such bias");
            return Err(config.error(name, message));
        }
    }
    Ok(match architecture {
        Architecture::Qwen2 => Bias { qkv: true, o: false, mlp: false },
        Architecture::InternLm2 => {
            let bias = config.flag("bias")?.unwrap_or(false);
            Bias { qkv: bias, o: bias, mlp: false }
        }
        _ => Bias { qkv: attention, o: attention, mlp },
    })
}

/// One sliding window for all layers, or none.
fn parse_window(
    config: &Fields<'_>,
    architecture: Architecture,
    num_layers: usize,
) -> Result<Option<usize>, Error> {
    let is_qwen = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
    let used = !is_qwen || config.flag("use_sliding_window")?.unwrap_or(false);
    let may_slide = used && !matches!(architecture, Architecture::Llama | Architecture::InternLm2);
    let window = if may_slide { config.size_or_none("sliding_window", CONTEXT_MAX)? } else { None };
    let num_sliding = match config.texts("layer_types", LAYERS_MAX)? {
        Some(types) => count_sliding(config, &types, num_layers)?,
        // NOTE: the first max_window_layers layers of a Qwen see everything.
        None if is_qwen && window.is_some() => {
            let full = config.integer_or_none("max_window_layers", 0, CONTEXT_MAX)?.unwrap_or(28);
            num_layers.saturating_sub(full)
        }
        None if window.is_some() => num_layers,
        None => 0,
    };
    match (num_sliding, window) {
        (0, _) => Ok(None),
        (num, Some(window)) if num == num_layers => Ok(Some(window)),
        (num, Some(_)) => {
            let field = if config.get("layer_types").is_some() {
                "layer_types"
            } else {
                "max_window_layers"
            };
            let message = format!(
                "a sliding window in {num} of {num_layers} layers; supported is all or none"
            );
            Err(config.error(field, message))
        }
        (_, None) => {
            Err(config.error("sliding_window", "missing, but layer_types has sliding_attention"))
        }
    }
}

/// Number of layers with a sliding window in `layer_types`.
fn count_sliding(config: &Fields<'_>, types: &[&str], num_layers: usize) -> Result<usize, Error> {
    if types.len() != num_layers {
        let message = format!("{} given for {num_layers} layers", types.len());
        return Err(config.error("layer_types", message));
    }
    let allowed = ["full_attention", "sliding_attention"];
    if let Some(other) = types.iter().find(|name| !allowed.contains(name)) {
        let shown = show(&(*other).into());
        let message = format!("{shown} is not supported; supported are {}", allowed.join(", "));
        return Err(config.error("layer_types", message));
    }
    Ok(types.iter().filter(|name| **name == allowed[1]).count())
}

/// `dtype`, or `torch_dtype` as it was called before; float32 where neither is given.
fn parse_dtype(config: &Fields<'_>) -> Result<DType, Error> {
    let name = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let Some(text) = config.text(name)? else { return Ok(DType::F32) };
    match text.strip_prefix("torch.").unwrap_or(text) {
        "float32" | "float" => Ok(DType::F32),
        "float16" | "half" => Ok(DType::F16),
        "bfloat16" => Ok(DType::BF16),
        _ => {
            let message = format!(
                "{} is not supported; supported are float32, float16 and bfloat16",
                show(&text.into())
            );
            Err(config.error(name, message))
        }
    }
}
