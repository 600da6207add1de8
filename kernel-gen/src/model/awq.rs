//! `quantization_config`: AWQ "gemm" checkpoints, and refusals of everything else.

use super::AwqConfig;
use super::fields::{Fields, show};
use crate::error::Error;
use crate::spec::GroupSize;

const SUPPORTED: &str = "supported is quant_method awq, version gemm, 4 bits";
const PATTERNS_MAX: usize = 2048;

pub(super) fn parse(config: &Fields<'_>) -> Result<Option<AwqConfig>, Error> {
    let Some(fields) = config.object("quantization_config", "quantization_config.")? else {
        return Ok(None);
    };
    let method = fields.text("quant_method")?.unwrap_or("");
    if !method.eq_ignore_ascii_case("awq") {
        let shown = show(&method.into());
        return Err(fields.error("quant_method", format!("{shown} is not supported; {SUPPORTED}")));
    }
    let version = fields.text("version")?.unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        let shown = show(&version.into());
        return Err(fields.error("version", format!("{shown} is not supported; {SUPPORTED}")));
    }
    let bits_key = if fields.get("bits").is_some() { "bits" } else { "w_bit" };
    let bits = fields.size_or_none(bits_key, 64)?.unwrap_or(4);
    if bits != 4 {
        return Err(fields.error(bits_key, format!("{bits} is not supported; {SUPPORTED}")));
    }
    Ok(Some(AwqConfig {
        group_size: parse_group_size(&fields)?,
        zero_point: fields.flag("zero_point")?.unwrap_or(true),
        modules_to_not_convert: parse_patterns(&fields)?,
    }))
}

fn parse_group_size(fields: &Fields<'_>) -> Result<GroupSize, Error> {
    let key = if fields.get("group_size").is_some() { "group_size" } else { "q_group_size" };
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

fn parse_patterns(fields: &Fields<'_>) -> Result<Vec<String>, Error> {
    let name = "modules_to_not_convert";
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
pub(super) fn names_module(pattern: &str, module: &str) -> bool {
    let pattern = pattern.trim_matches('.');
    let at_start = |at: usize| at == 0 || module.as_bytes()[at - 1] == b'.';
    let at_end = |end: usize| end == module.len() || module.as_bytes()[end] == b'.';
    !pattern.is_empty()
        && module.match_indices(pattern).any(|(at, found)| at_start(at) && at_end(at + found.len()))
}
