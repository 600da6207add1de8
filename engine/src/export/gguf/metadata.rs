//! The keys that say what model a file holds.

use std::path::Path;

use bespoke_kernel_gen::model::{Architecture, ModelConfig, RopeScaling};

use super::tensors::Plan;
use super::writer::{Entry, Meta};
use crate::error::Error;
use crate::import::gguf::BlockFormat;

/// The model's name, family, sizes and rotary embedding. What GGUF cannot say is an error, what
/// llama.cpp ignores a note.
pub(super) fn of_config(
    dir: &Path,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<Vec<Entry>, Error> {
    let prefix = family(config.architecture);
    let mut entries = vec![("general.architecture".to_owned(), Meta::Text(prefix.to_owned()))];
    if let Some(name) = dir.file_name().and_then(|name| name.to_str()) {
        entries.push(("general.name".to_owned(), Meta::Text(name.to_owned())));
    }
    let mut add = |key: &str, value: Meta| entries.push((format!("{prefix}.{key}"), value));
    for (key, size) in [
        ("block_count", config.num_layers),
        ("context_length", config.max_position),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.rotary_dim),
    ] {
        // The parser of config.json bounds all of these far below 2³².
        add(key, Meta::U32(size as u32));
    }
    add("attention.layer_norm_rms_epsilon", Meta::F32(config.rms_norm_eps));
    add("rope.freq_base", Meta::F32(config.rope_theta as f32));
    if let Some(window) = sliding_window(dir, config, notes)? {
        add("attention.sliding_window", Meta::U32(window as u32));
    }
    if config.rotary_dim != config.head_dim && config.architecture != Architecture::Phi3 {
        return Err(refusal(dir, "partial_rotary_factor", "rotates a part of each head"));
    }
    for (key, value) in rope_scaling(dir, &config.rope_scaling)? {
        add(&format!("rope.scaling.{key}"), value);
    }
    Ok(entries)
}

/// How most of the weights are stored, by llama.cpp's numbers.
pub(super) fn of_formats(plan: &Plan) -> Vec<Entry> {
    let is_quantized = |format: &BlockFormat| format.elements() > 1;
    let quantized = plan.linear_formats().find(is_quantized);
    let format = quantized.or_else(|| plan.linear_formats().next());
    let file_type = match format {
        Some(BlockFormat::F16) => 1,
        Some(BlockFormat::Q4_1) => 3,
        Some(BlockFormat::Q5_0) => 8,
        Some(BlockFormat::BF16) => 32,
        _ => 0,
    };
    vec![
        ("general.file_type".to_owned(), Meta::U32(file_type)),
        ("general.quantization_version".to_owned(), Meta::U32(2)),
    ]
}

/// llama.cpp's name; the prefix of the family's keys.
fn family(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::InternLm2 => "internlm2",
        Architecture::Phi3 => "phi3",
    }
}

fn sliding_window(
    dir: &Path,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<Option<usize>, Error> {
    let Some(window) = config.sliding_window else { return Ok(None) };
    match config.architecture {
        Architecture::Phi3 => {}
        Architecture::Mistral if window < config.max_position => notes.push(format!(
            "llama.cpp ignores this family's sliding window: beyond {window} tokens it computes \
             something else"
        )),
        Architecture::Mistral => {}
        _ => return Err(refusal(dir, "sliding_window", "has a sliding window")),
    }
    Ok(Some(window))
}

/// Keys below `rope.scaling`; Llama 3 has a tensor instead.
fn rope_scaling(dir: &Path, scaling: &RopeScaling) -> Result<Vec<(&'static str, Meta)>, Error> {
    let text = |text: &str| Meta::Text(text.to_owned());
    let number = |number: f64| Meta::F32(number as f32);
    match *scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => Ok(Vec::new()),
        RopeScaling::Linear { factor } => {
            Ok(vec![("type", text("linear")), ("factor", number(factor))])
        }
        RopeScaling::Dynamic { .. } => Err(refusal(dir, "rope_scaling", "is dynamic")),
        RopeScaling::Yarn { truncate: false, .. } => {
            Err(refusal(dir, "rope_scaling.truncate", "is yarn without rounding of its limits"))
        }
        RopeScaling::Yarn {
            factor,
            original_max_position,
            beta_fast,
            beta_slow,
            attention_factor,
            ..
        } => {
            let mut entries = vec![
                ("type", text("yarn")),
                ("factor", number(factor)),
                ("original_context_length", Meta::U32(original_max_position as u32)),
                ("yarn_beta_fast", number(beta_fast)),
                ("yarn_beta_slow", number(beta_slow)),
            ];
            // NOTE: the GGUF factor multiplies YaRN's own.
            let relative = attention_factor / (0.1 * factor.ln() + 1.0);
            if (relative - 1.0).abs() > 1e-6 {
                entries.push(("attn_factor", number(relative)));
            }
            Ok(entries)
        }
    }
}

fn refusal(dir: &Path, field: &str, what: &str) -> Error {
    Error::Unsupported(format!(
        "{}: {field}: this model {what}, which GGUF cannot say of its family; it cannot be \
         exported",
        dir.join("config.json").display()
    ))
}
