//! compressed-tensors checkpoints with packed 4-bit weights.

use super::{SUPPORTED, check_bits, not_supported, parse_group_size, parse_patterns, refuse_given};
use crate::error::Error;
use crate::model::fields::{Fields, show};
use crate::model::{AwqConfig, Packing};
use crate::spec::GroupSize;

const FORMAT: &str = "pack-quantized";
const GROUP: &str = "quantization_config.config_groups.*.";
const WEIGHTS: &str = "quantization_config.config_groups.*.weights.";

pub(super) fn parse(fields: &Fields<'_>) -> Result<AwqConfig, Error> {
    check_text(fields, "format", FORMAT, None)?;
    refuse_given(fields, &["kv_cache_scheme"])?;
    if let Some(sparsity) =
        fields.object("sparsity_config", "quantization_config.sparsity_config.")?
        && sparsity.iter().next().is_some()
    {
        check_text(&sparsity, "format", "dense", None)?;
    }
    let place = "quantization_config.transform_config.";
    if let Some(transform) = fields.object("transform_config", place)? {
        refuse_given(&transform, &["config_groups"])?;
    }
    let weights = parse_weights(&parse_group(fields)?)?;
    Ok(AwqConfig { modules_to_not_convert: parse_patterns(fields, "ignore")?, ..weights })
}

/// The only one of `config_groups`.
fn parse_group<'a>(fields: &Fields<'a>) -> Result<Fields<'a>, Error> {
    let name = "config_groups";
    let groups = fields.object(name, "quantization_config.config_groups.")?;
    let mut all = groups.iter().flat_map(Fields::iter);
    let (Some((group, value)), None) = (all.next(), all.next()) else {
        let num = groups.iter().flat_map(Fields::iter).count();
        let message = format!("{num} given; supported is one group for all linears");
        return Err(fields.error(name, message));
    };
    let Some(map) = value.as_object() else {
        let message = format!("{} given, an object expected", show(value));
        return Err(fields.error(&format!("{name}.{}", shortened(group)), message));
    };
    let group = Fields::new(map, GROUP);
    refuse_given(&group, &["input_activations", "output_activations"])?;
    check_text(&group, "format", FORMAT, Some(FORMAT))?;
    let targets = group.texts("targets", 16)?.unwrap_or_default();
    if targets != ["Linear"] {
        let shown = targets.first().map_or("none".to_owned(), |target| show(&(*target).into()));
        let message = format!("{shown} given; supported is \"Linear\" alone");
        return Err(group.error("targets", message));
    }
    Ok(group)
}

fn parse_weights(group: &Fields<'_>) -> Result<AwqConfig, Error> {
    let Some(weights) = group.object("weights", WEIGHTS)? else {
        return Err(group.error("weights", format!("missing; {SUPPORTED}")));
    };
    check_bits(&weights, "num_bits", None)?;
    check_text(&weights, "type", "int", Some("int"))?;
    check_text(&weights, "zp_dtype", "torch.int8", Some("torch.int8"))?;
    refuse_given(&weights, &["dynamic", "block_structure"])?;
    Ok(AwqConfig {
        group_size: parse_strategy(&weights)?,
        zero_point: !weights.flag("symmetric")?.unwrap_or(true),
        modules_to_not_convert: Vec::new(),
        packing: Packing::CompressedTensors { act_order: parse_act_order(&weights)? },
    })
}

/// Without a strategy, the group size tells it.
fn parse_strategy(weights: &Fields<'_>) -> Result<GroupSize, Error> {
    let group_size = parse_group_size(weights, "group_size")?;
    let is_given = weights.get("group_size").is_some();
    match weights.text("strategy")? {
        Some("channel") if !is_given || group_size == GroupSize::Channel => Ok(GroupSize::Channel),
        Some("group") if is_given && group_size != GroupSize::Channel => Ok(group_size),
        None if is_given => Ok(group_size),
        Some(name @ ("channel" | "group")) => {
            let message = format!("{group_size} does not agree with the strategy {name}");
            let message = if is_given { message } else { "missing".to_owned() };
            Err(weights.error("group_size", message))
        }
        other => {
            let shown = show(&other.unwrap_or_default().into());
            let message = format!("{shown} is not supported; supported are group and channel");
            Err(weights.error("strategy", message))
        }
    }
}

/// Whether inputs may belong to groups out of order; the tensors tell if they do.
fn parse_act_order(weights: &Fields<'_>) -> Result<bool, Error> {
    let name = "actorder";
    match weights.get(name) {
        None => Ok(false),
        Some(value) => match (value.as_bool(), value.as_str()) {
            (Some(flag), _) => Ok(flag),
            // NOTE: columns of a static order are back in their places.
            (_, Some("weight" | "static")) => Ok(false),
            (_, Some("group" | "dynamic")) => Ok(true),
            _ => {
                let shown = show(value);
                let message = format!("{shown} given, supported are weight, static and group");
                Err(weights.error(name, message))
            }
        },
    }
}

fn check_text(
    fields: &Fields<'_>,
    name: &str,
    expected: &str,
    default: Option<&str>,
) -> Result<(), Error> {
    let text = fields.text(name)?.or(default).unwrap_or_default();
    if text == expected { Ok(()) } else { Err(not_supported(fields, name, text)) }
}

/// A name of the file, short enough for a message.
fn shortened(name: &str) -> String {
    name.chars().take(60).collect()
}
