//! Rows of weights as blocks of GGML formats: the other direction of `import::gguf::dequantize`.

use half::{bf16, f16};

use crate::import::gguf::{BlockFormat, append_f16};
use crate::model::linear::{AwqView, LinearPart};

/// Weights of a block of the quantized formats here.
pub(super) const BLOCK: usize = 32;

/// What rounding the minima of Q4_1 did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rounding {
    /// Groups of quantized weights.
    pub num_groups: u64,
    /// Those whose `s · z` has more bits than float16.
    pub num_rounded: u64,
    /// Largest error of a minimum, and with it of a weight, in steps `s` of its group.
    pub error_max: f64,
}

/// Appends row `row` of `part` in `format`. Errors say what cannot be written.
pub(super) fn append_row(
    part: &LinearPart<'_>,
    row: usize,
    format: BlockFormat,
    rounding: &mut Rounding,
    out: &mut Vec<u8>,
) -> Result<(), String> {
    match part {
        LinearPart::Dense(view) => {
            let mut values = vec![0.0; view.k];
            view.row(row, &mut values);
            append_floats(&values, format, out)
        }
        LinearPart::Awq(view) if !view.group.is_multiple_of(BLOCK) => Err(format!(
            "groups of {} weights; GGUF's blocks take multiples of {BLOCK}",
            view.group
        )),
        LinearPart::Awq(view) if format == BlockFormat::Q4_1 => {
            append_q4_1(view, row, rounding, out)
        }
        LinearPart::Awq(view) => {
            append_q5_0(view, row, rounding, out);
            Ok(())
        }
    }
}

/// Appends `values` in a format of floats, or as Q8_0.
pub(super) fn append_floats(
    values: &[f32],
    format: BlockFormat,
    out: &mut Vec<u8>,
) -> Result<(), String> {
    match format {
        BlockFormat::F16 => append_f16(values, out).map_err(|(idx, value)| {
            format!("the value {value} at place {idx} of a row does not fit into float16")
        }),
        BlockFormat::BF16 => {
            let halves = values.iter().map(|value| bf16::from_f32(*value).to_le_bytes());
            out.extend(halves.flatten());
            Ok(())
        }
        BlockFormat::Q8_0 => append_q8_0(values, out),
        _ => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            Ok(())
        }
    }
}

/// Scale absmax / 127, then 32 signed bytes; halves round away from zero, as GGML's reference does.
fn append_q8_0(values: &[f32], out: &mut Vec<u8>) -> Result<(), String> {
    for block in values.chunks_exact(BLOCK) {
        let max = block.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        let scale = max / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let stored = f16::from_f32(scale);
        if !stored.is_finite() || block.iter().any(|value| !value.is_finite()) {
            return Err(format!("a block whose largest value is {max} does not fit into Q8_0"));
        }
        out.extend_from_slice(&stored.to_le_bytes());
        out.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
    }
    Ok(())
}

/// Scale s, minimum −s · z, then a byte for the values `i` and `i + 16`.
fn append_q4_1(
    view: &AwqView<'_>,
    row: usize,
    rounding: &mut Rounding,
    out: &mut Vec<u8>,
) -> Result<(), String> {
    for first in (0..view.k).step_by(BLOCK) {
        let group = first / view.group;
        let scale = view.scale(group, row);
        // 11 bits times 4 bits are exact in float32.
        let exact = 0.0 - scale.to_f32() * f32::from(view.zero(group, row));
        let minimum = f16::from_f32(exact);
        if !minimum.is_finite() {
            return Err(format!(
                "the minimum {exact} of a group does not fit into float16, which ends at 65504; \
                 Q5_0 holds it"
            ));
        }
        if first.is_multiple_of(view.group) {
            rounding.count(exact, minimum, scale);
        }
        out.extend_from_slice(&scale.to_le_bytes());
        out.extend_from_slice(&minimum.to_le_bytes());
        let q = |i: usize| view.q(first + i, row);
        out.extend((0..BLOCK / 2).map(|i| q(i) | q(i + 16) << 4));
    }
    Ok(())
}

/// Scale, a word with the fifth bits, then nibbles as in Q4_1, of `q − z + 16`.
fn append_q5_0(view: &AwqView<'_>, row: usize, rounding: &mut Rounding, out: &mut Vec<u8>) {
    for first in (0..view.k).step_by(BLOCK) {
        let group = first / view.group;
        rounding.num_groups += u64::from(first.is_multiple_of(view.group));
        let zero = view.zero(group, row);
        let values: [u8; BLOCK] = std::array::from_fn(|i| 16 + view.q(first + i, row) - zero);
        let fifths =
            values.iter().enumerate().fold(0, |bits, (i, value)| bits | u32::from(value >> 4) << i);
        out.extend_from_slice(&view.scale(group, row).to_le_bytes());
        out.extend_from_slice(&fifths.to_le_bytes());
        out.extend((0..BLOCK / 2).map(|i| values[i] & 15 | (values[i + 16] & 15) << 4));
    }
}

impl Rounding {
    fn count(&mut self, exact: f32, minimum: f16, scale: f16) {
        self.num_groups += 1;
        let error = f64::from(exact - minimum.to_f32()).abs();
        if error > 0.0 {
            self.num_rounded += 1;
            self.error_max = self.error_max.max(error / f64::from(scale.to_f32()).abs());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::gguf::dequantize;
    use crate::quantize::awq_format::{PACK, PackedLinear, pack};

    /// All 16 values with all 16 zeros, at scales with few and with many bits.
    fn linear() -> PackedLinear {
        let mut linear = PackedLinear::new(PACK, 1024, 64);
        let value = |k: usize, n: usize| ((k * 7 + n * 3) % 16) as u8;
        for k in 0..linear.k {
            linear.qweight[k] = pack(std::array::from_fn(|n| value(k, n)));
        }
        for group in 0..16 {
            linear.qzeros[group] = pack(std::array::from_fn(|n| ((group + n) % 16) as u8));
            for n in 0..PACK {
                let scale = if n == 0 { 0.25 } else { 0.01 + 0.001 * (group * 8 + n) as f32 };
                linear.scales[group * PACK + n] = f16::from_f32(scale);
            }
        }
        linear
    }

    /// What `format` gives back of all rows, and what they are.
    fn round_trip(format: BlockFormat) -> (Vec<f32>, Vec<f32>, Rounding) {
        let linear = linear();
        let (n, k, group) = (linear.n, linear.k, linear.group);
        let (qweight, qzeros) = (linear.qweight_rows(0..k), linear.qzeros_bytes());
        let scales = linear.scales_bytes();
        let qzeros = Some(qzeros.as_slice());
        let view = AwqView { n, k, group, qweight: &qweight, qzeros, scales: &scales };
        let (mut rounding, mut bytes) = (Rounding::default(), Vec::new());
        let mut expected = vec![0.0; n * k];
        for (row, values) in expected.chunks_exact_mut(k).enumerate() {
            let part = LinearPart::Awq(view);
            append_row(&part, row, format, &mut rounding, &mut bytes).unwrap();
            view.row(row, values);
        }
        let mut found = vec![0.0; n * k];
        dequantize(format, &bytes, &mut found);
        (found, expected, rounding)
    }

    #[test]
    fn q5_0_is_exact() {
        let (found, expected, rounding) = round_trip(BlockFormat::Q5_0);
        assert_eq!(found, expected);
        assert_eq!(rounding, Rounding { num_groups: 128, num_rounded: 0, error_max: 0.0 });
    }

    #[test]
    fn q4_1_is_off_by_what_it_says() {
        let (found, expected, rounding) = round_trip(BlockFormat::Q4_1);
        let linear = linear();
        let (mut error_max, mut num_wrong) = (0.0f64, 0u64);
        for (idx, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let (row, group) = (idx / linear.k, idx % linear.k / linear.group);
            let scale = linear.scales[group * PACK + row].to_f32();
            let error = f64::from((found - expected).abs() / scale);
            error_max = error_max.max(error);
            num_wrong += u64::from(idx % linear.group == 0 && error > 1e-5);
        }
        assert_eq!(rounding.num_groups, 128);
        assert_eq!(rounding.num_rounded, num_wrong, "groups with a wrong first value");
        assert!((error_max - rounding.error_max).abs() < 1e-5, "{error_max} {rounding:?}");
        // Of 15 in float16 at most half of the last of its 11 bits, at a scale of 2 at most.
        assert!(rounding.error_max > 0.0 && rounding.error_max <= 15.0 / 2048.0, "{rounding:?}");
        // A power of two is never rounded.
        assert_eq!(found[..linear.k], expected[..linear.k]);
    }

    #[test]
    fn q8_0_is_within_half_a_step() {
        let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.5) / 7.0).collect();
        let mut bytes = Vec::new();
        append_floats(&values, BlockFormat::Q8_0, &mut bytes).unwrap();
        let mut found = vec![0.0; 64];
        dequantize(BlockFormat::Q8_0, &bytes, &mut found);
        for (found, value) in found.iter().zip(&values) {
            assert!((found - value).abs() <= 4.5 / 127.0 * 0.51, "{value} became {found}");
        }
        let mut bytes = Vec::new();
        append_floats(&[0.0; BLOCK], BlockFormat::Q8_0, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 34]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |format, value| {
            let mut values = [0.5; BLOCK];
            values[3] = value;
            append_floats(&values, format, &mut Vec::new()).unwrap_err()
        };
        assert!(refusal(BlockFormat::F16, 1e6).contains("1000000 at place 3"));
        assert!(refusal(BlockFormat::Q8_0, 1e9).contains("1000000000"));
        assert!(refusal(BlockFormat::Q8_0, f32::NAN).contains("Q8_0"));
    }
}
