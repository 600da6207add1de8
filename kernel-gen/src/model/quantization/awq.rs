//! AWQ "gemm" checkpoints.

use super::{check_bits, not_supported, parse_group_size, parse_patterns};
use crate::error::Error;
use crate::model::fields::Fields;
use crate::model::{AwqConfig, Packing};

pub(super) fn parse(fields: &Fields<'_>) -> Result<AwqConfig, Error> {
    let version = fields.text("version")?.unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(not_supported(fields, "version", version));
    }
    // NOTE: the second name of each is that of the first programs.
    let either = |name, other| if fields.get(name).is_some() { name } else { other };
    check_bits(fields, either("bits", "w_bit"), Some(4))?;
    Ok(AwqConfig {
        group_size: parse_group_size(fields, either("group_size", "q_group_size"))?,
        zero_point: fields.flag("zero_point")?.unwrap_or(true),
        modules_to_not_convert: parse_patterns(fields, "modules_to_not_convert")?,
        packing: Packing::Awq,
    })
}
