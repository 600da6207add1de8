//! `quantization_config`: checkpoints with 4-bit weights, and refusals of everything else.

mod awq;
mod compressed;
mod gptq;

use super::fields::{Fields, show};
use super::{AwqConfig, Packing};
use crate::error::Error;
use crate::spec::GroupSize;

const SUPPORTED: &str = "supported are 4 bits by quant_method awq (version gemm), gptq, and \
                         compressed-tensors (format pack-quantized)";
const PATTERNS_MAX: usize = 4096;

pub(super) fn parse(config: &Fields<'_>) -> Result<Option<AwqConfig>, Error> {
    let Some(fields) = config.object("quantization_config", "quantization_config.")? else {
        return Ok(None);
    };
    let method = fields.text("quant_method")?.unwrap_or("");
    match method.to_ascii_lowercase().as_str() {
        "awq" => awq::parse(&fields),
        "gptq" => gptq::parse(&fields),
        "compressed-tensors" => compressed::parse(&fields),
        _ => Err(not_supported(&fields, "quant_method", method)),
    }
    .map(Some)
}

impl AwqConfig {
    /// The entry of `modules_to_not_convert` that leaves `module` out, by its name in the model.
    pub fn left_out_by(&self, module: &str) -> Option<&str> {
        let names = |pattern: &&String| match self.packing {
            Packing::Awq | Packing::Gptq { .. } => names_module(pattern, module),
            Packing::CompressedTensors { .. } => pattern.as_str() == module,
        };
        self.modules_to_not_convert.iter().find(names).map(String::as_str)
    }
}

fn not_supported(fields: &Fields<'_>, name: &str, text: &str) -> Error {
    let shown = show(&text.into());
    fields.error(name, format!("{shown} is not supported; {SUPPORTED}"))
}

fn check_bits(fields: &Fields<'_>, name: &str, default: Option<usize>) -> Result<(), Error> {
    let bits = match fields.size_or_none(name, 64)?.or(default) {
        Some(bits) => bits,
        None => fields.size(name, 64)?,
    };
    match bits {
        4 => Ok(()),
        _ => Err(fields.error(name, format!("{bits} is not supported; {SUPPORTED}"))),
    }
}

/// Refuses fields that say anything: what they ask for would change the weights' values.
fn refuse_given(fields: &Fields<'_>, names: &[&str]) -> Result<(), Error> {
    for name in names {
        let Some(value) = fields.get(name) else { continue };
        let is_empty = value.as_bool() == Some(false)
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(serde_json::Map::is_empty);
        if !is_empty {
            let message = format!("{} given, which is not supported; {SUPPORTED}", show(value));
            return Err(fields.error(name, message));
        }
    }
    Ok(())
}

fn parse_group_size(fields: &Fields<'_>, key: &str) -> Result<GroupSize, Error> {
    let Some(value) = fields.get(key) else { return Ok(GroupSize::Of(128)) };
    match value.as_i64() {
        Some(-1) => Ok(GroupSize::Channel),
        Some(group) if (8..=65_536).contains(&group) && group % 8 == 0 => {
            Ok(GroupSize::Of(group as usize))
        }
        _ => {
            let expected = "a multiple of 8 up to 65536, or -1 for one group a channel";
            Err(fields.error(key, format!("{} given, {expected} expected", show(value))))
        }
    }
}

/// Names of modules that stay as they are.
fn parse_patterns(fields: &Fields<'_>, name: &str) -> Result<Vec<String>, Error> {
    let patterns = fields.texts(name, PATTERNS_MAX)?.unwrap_or_default();
    for pattern in &patterns {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if pattern.is_empty() || !pattern.chars().all(plain) {
            let shown = show(&(*pattern).into());
            return Err(fields.error(name, format!("{shown} is not a plain module name")));
        }
    }
    Ok(patterns.into_iter().map(str::to_string).collect())
}

/// Whether `pattern` names `module` or something it lies in: the pattern's dotted parts appear in
/// the module's name, side by side.
fn names_module(pattern: &str, module: &str) -> bool {
    let pattern = pattern.trim_matches('.');
    let at_start = |at: usize| at == 0 || module.as_bytes()[at - 1] == b'.';
    let at_end = |end: usize| end == module.len() || module.as_bytes()[end] == b'.';
    !pattern.is_empty()
        && module.match_indices(pattern).any(|(at, found)| at_start(at) && at_end(at + found.len()))
}
