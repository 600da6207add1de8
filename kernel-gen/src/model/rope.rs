//! RoPE fields of `config.json`, with the meaning Hugging Face transformers gives them.

use super::fields::{Fields, show};
use super::{Architecture, CONTEXT_MAX, RopeScaling};
use crate::error::Error;

const SUPPORTED: &str = "supported are default, linear, dynamic, llama3 and yarn";

/// Everything the rotary embedding depends on but the head size.
pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) scaling: RopeScaling,
    pub(super) partial_rotary_factor: f64,
}

/// Reads `rope_theta`, `partial_rotary_factor` and `rope_scaling`, or the newer `rope_parameters`
/// that holds all three.
pub(super) fn parse(
    config: &Fields<'_>,
    architecture: Architecture,
    max_position: usize,
) -> Result<Rope, Error> {
    let scaling = config.object("rope_scaling", "rope_scaling.")?;
    let parameters = config.object("rope_parameters", "rope_parameters.")?;
    let number = |name, min, max, default| -> Result<f64, Error> {
        let nested = match &parameters {
            Some(parameters) => parameters.number_or_none(name, min, max)?,
            None => None,
        };
        let outer = config.number_or_none(name, min, max)?;
        Ok(nested.or(outer).unwrap_or(default))
    };
    let scaling = match parameters.as_ref().or(scaling.as_ref()) {
        Some(fields) => parse_scaling(fields, architecture, max_position)?,
        None => RopeScaling::Default,
    };
    // NOTE: yarn divides by the logarithm of theta, so 1 is not a theta.
    let theta = number("rope_theta", 1.0001, 1e15, 10_000.0)?;
    let partial_rotary_factor = number("partial_rotary_factor", 1e-3, 1.0, 1.0)?;
    Ok(Rope { theta, scaling, partial_rotary_factor })
}

fn parse_scaling(
    fields: &Fields<'_>,
    architecture: Architecture,
    max_position: usize,
) -> Result<RopeScaling, Error> {
    if let Some((name, value)) = fields.iter().find(|(_, value)| value.is_object()) {
        let message = format!("{} given; one rope for all layers is supported", show(value));
        return Err(fields.error(name, message));
    }
    let (key, kind) = match (fields.text("rope_type")?, fields.text("type")?) {
        (Some(kind), _) => ("rope_type", kind),
        (None, Some(kind)) => ("type", kind),
        (None, None) => ("rope_type", "default"),
    };
    // NOTE: Phi-3 writes "su" and "yarn" for what is called longrope everywhere else.
    let longrope =
        matches!(kind, "su" | "longrope") || (architecture == Architecture::Phi3 && kind == "yarn");
    if longrope {
        return Err(
            fields.error(key, format!("longrope (\"{kind}\") is not supported; {SUPPORTED}"))
        );
    }
    let factor = || fields.number("factor", 1.0, 65_536.0);
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "dynamic" => {
            Ok(RopeScaling::Dynamic { factor: factor()?, original_max_position: max_position })
        }
        "llama3" => parse_llama3(fields, factor()?),
        "yarn" => parse_yarn(fields, factor()?, max_position),
        other => {
            let shown = show(&other.into());
            Err(fields.error(key, format!("{shown} is not supported; {SUPPORTED}")))
        }
    }
}

fn parse_llama3(fields: &Fields<'_>, factor: f64) -> Result<RopeScaling, Error> {
    let low_freq_factor = fields.number("low_freq_factor", 1e-3, 65_536.0)?;
    let high_freq_factor = fields.number("high_freq_factor", 1e-3, 65_536.0)?;
    if high_freq_factor <= low_freq_factor {
        let message =
            format!("{high_freq_factor} must be greater than low_freq_factor {low_freq_factor}");
        return Err(fields.error("high_freq_factor", message));
    }
    let original_max_position = fields.size("original_max_position_embeddings", CONTEXT_MAX)?;
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position })
}

fn parse_yarn(fields: &Fields<'_>, factor: f64, max_position: usize) -> Result<RopeScaling, Error> {
    let original = fields.size_or_none("original_max_position_embeddings", CONTEXT_MAX)?;
    // NOTE: zero stands for "not given" in all of these, as in transformers.
    let given = |name| -> Result<Option<f64>, Error> {
        Ok(fields.number_or_none(name, 0.0, 65_536.0)?.filter(|value| *value != 0.0))
    };
    let attention_factor = match fields.number_or_none("attention_factor", 0.0, 65_536.0)? {
        Some(attention_factor) => attention_factor,
        None => yarn_attention_factor(factor, given("mscale")?, given("mscale_all_dim")?),
    };
    let beta_fast = given("beta_fast")?.unwrap_or(32.0);
    let beta_slow = given("beta_slow")?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        let message = format!("{beta_fast} must not be less than beta_slow {beta_slow}");
        return Err(fields.error("beta_fast", message));
    }
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position: original.unwrap_or(max_position),
        beta_fast,
        beta_slow,
        attention_factor,
        truncate: fields.flag("truncate")?.unwrap_or(true),
    })
}

/// Section 3.4 of the YaRN paper, with DeepSeek's two extra scales.
fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let temperature =
        |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all)) => temperature(mscale) / temperature(all),
        _ => temperature(1.0),
    }
}
