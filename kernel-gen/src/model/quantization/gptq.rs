//! GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

use super::{SUPPORTED, check_bits, not_supported, parse_group_size, parse_patterns, refuse_given};
use crate::error::Error;
use crate::model::fields::Fields;
use crate::model::{AwqConfig, Packing};

/// Other layouts, other weights for some modules, a quantized head, adapters and rotations.
const REFUSED: [&str; 6] = [
    "is_marlin_format",
    "dynamic",
    "modules_in_block_to_quantize",
    "lm_head",
    "adapter",
    "rotation",
];

pub(super) fn parse(fields: &Fields<'_>) -> Result<AwqConfig, Error> {
    check_bits(fields, "bits", None)?;
    refuse_given(fields, &REFUSED)?;
    let words = fields.text("pack_dtype")?.unwrap_or("int32");
    if words != "int32" {
        return Err(not_supported(fields, "pack_dtype", words));
    }
    // NOTE: `sym` says how zeros were chosen; they are stored either way.
    fields.flag("sym")?;
    Ok(AwqConfig {
        group_size: parse_group_size(fields, "group_size")?,
        zero_point: true,
        modules_to_not_convert: parse_patterns(fields, "modules_to_not_convert")?,
        packing: Packing::Gptq {
            zero_offset: parse_zero_offset(fields)?,
            act_order: fields.flag("desc_act")?.unwrap_or(false),
        },
    })
}

/// What zeros lack in the file.
fn parse_zero_offset(fields: &Fields<'_>) -> Result<u8, Error> {
    let mut formats = Vec::new();
    for name in ["checkpoint_format", "format"] {
        match fields.text(name)? {
            None => {}
            Some("gptq") => formats.push(1),
            Some("gptq_v2") => formats.push(0),
            Some(other) => return Err(not_supported(fields, name, other)),
        }
    }
    match formats[..] {
        [] => Ok(1),
        [offset] => Ok(offset),
        [first, second] if first == second => Ok(first),
        _ => {
            let message = format!("does not agree with checkpoint_format; {SUPPORTED}");
            Err(fields.error("format", message))
        }
    }
}
