//! Round-to-nearest 4-bit quantization of one linear.
//!
//! For each group of `g` inputs of one output: max' = max(max, 0), min' = min(min, 0),
//! s = float16(max((max' − min') / 15, 1e-5)), z = clamp(round(−min' / s), 0, 15),
//! q = clamp(round(w / s) + z, 0, 15). Arithmetic is float32, rounding is half to even.

use half::f16;

use super::awq_format::{PACK, PackedLinear, pack};

/// A weight that cannot be quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BadWeight {
    pub output: usize,
    pub input: usize,
    pub value: f32,
}

/// Float16 scale and zero of one group. The scale is infinite when the group's range does not fit.
pub fn scale_and_zero(group: &[f32]) -> (f16, u8) {
    let (min, max) = group.iter().fold((0.0f32, 0.0f32), |(min, max), &w| (min.min(w), max.max(w)));
    let scale = f16::from_f32(((max - min) / 15.0).max(1e-5));
    let zero = (-min / scale.to_f32()).round_ties_even().clamp(0.0, 15.0);
    (scale, zero as u8)
}

/// The 4-bit value of one weight, for a scale and a zero that [`scale_and_zero`] gave.
pub fn quantized(weight: f32, scale: f32, zero: f32) -> u8 {
    ((weight / scale).round_ties_even() + zero).clamp(0.0, 15.0) as u8
}

/// Quantizes `[n, k]` weights on `num_threads` threads. `read_row` fills the weights of one
/// output.
pub fn quantize_linear(
    (n, k, group): (usize, usize, usize),
    num_threads: usize,
    read_row: &(dyn Fn(usize, &mut [f32]) + Sync),
) -> Result<PackedLinear, BadWeight> {
    let mut packed = PackedLinear::new(n, k, group);
    let groups = k / group;
    let num_blocks = n / PACK;
    let share = num_blocks.div_ceil(num_threads.max(1)).max(1);
    let words = packed.qweight.chunks_mut(share * k);
    let zeros = packed.qzeros.chunks_mut(share * groups);
    let scales = packed.scales.chunks_mut(share * groups * PACK);
    let outcomes: Vec<Result<(), BadWeight>> = std::thread::scope(|scope| {
        let threads: Vec<_> = words
            .zip(zeros)
            .zip(scales)
            .enumerate()
            .map(|(thread, ((words, zeros), scales))| {
                scope.spawn(move || {
                    let blocks = words
                        .chunks_exact_mut(k)
                        .zip(zeros.chunks_exact_mut(groups))
                        .zip(scales.chunks_exact_mut(groups * PACK));
                    let mut rows = vec![0.0; PACK * k];
                    for (i, ((words, zeros), scales)) in blocks.enumerate() {
                        let first = (thread * share + i) * PACK;
                        read_block(first, k, read_row, &mut rows)?;
                        quantize_block(&rows, group, words, zeros, scales)
                            .map_err(|bad| BadWeight { output: first + bad.output, ..bad })?;
                    }
                    Ok(())
                })
            })
            .collect();
        // A panic in a thread is passed on.
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    outcomes.into_iter().collect::<Result<(), BadWeight>>()?;
    Ok(packed)
}

fn read_block(
    first: usize,
    k: usize,
    read_row: &(dyn Fn(usize, &mut [f32]) + Sync),
    rows: &mut [f32],
) -> Result<(), BadWeight> {
    for (i, row) in rows.chunks_exact_mut(k).enumerate() {
        read_row(first + i, row);
        if let Some(input) = row.iter().position(|w| !w.is_finite()) {
            return Err(BadWeight { output: first + i, input, value: row[input] });
        }
    }
    Ok(())
}

/// Quantizes eight outputs: `rows` `[8, k]`, `words` `[k]`, `zeros` `[k / group]`, `scales`
/// `[k / group, 8]`.
fn quantize_block(
    rows: &[f32],
    group: usize,
    words: &mut [u32],
    zeros: &mut [u32],
    scales: &mut [f16],
) -> Result<(), BadWeight> {
    let k = words.len();
    let mut eight = vec![[0u8; PACK]; group];
    for (g, words) in words.chunks_exact_mut(group).enumerate() {
        let mut group_zeros = [0; PACK];
        for output in 0..PACK {
            let weights = &rows[output * k + g * group..][..group];
            let (scale, zero) = scale_and_zero(weights);
            if !scale.is_finite() {
                let value =
                    weights.iter().fold(0.0f32, |a, &w| if w.abs() > a.abs() { w } else { a });
                return Err(BadWeight { output, input: g * group, value });
            }
            scales[g * PACK + output] = scale;
            group_zeros[output] = zero;
            let (scale, zero) = (scale.to_f32(), f32::from(zero));
            for (values, &weight) in eight.iter_mut().zip(weights) {
                values[output] = quantized(weight, scale, zero);
            }
        }
        zeros[g] = pack(group_zeros);
        for (word, values) in words.iter_mut().zip(&eight) {
            *word = pack(*values);
        }
    }
    Ok(())
}
