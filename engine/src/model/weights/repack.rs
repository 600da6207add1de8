//! 4-bit weights of other programs in the AWQ "gemm" layout, nibble by nibble: no value changes.
//!
//! All layouts hold eight nibbles in an int32, the first in the lowest bits. AWQ's words hold eight
//! outputs of one input in an order of their own, and so do its words of zeros.

use half::f16;

use crate::model::linear::AWQ_NIBBLE;

/// Nibbles in a word, outputs and inputs in a block.
const PACK: usize = 8;
const ONE_IN_EACH_NIBBLE: u32 = 0x1111_1111;

/// A scale that float16 does not hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct InexactScale {
    /// Place in the tensor as it is stored.
    pub(super) idx: usize,
    pub(super) value: f32,
}

/// GPTQ `qweight` `[k / 8, n]`, whose words hold eight inputs of one output, as `[k, n / 8]`.
pub(super) fn gptq_weights(qweight: &[u8], n: usize, k: usize) -> Vec<u8> {
    let words = words_of(qweight);
    blocks(n, k, &|output, input| words[input / PACK * n + output])
}

/// compressed-tensors' `weight_packed` `[n, k / 8]`, whose words hold eight inputs of one output,
/// as `[k, n / 8]`.
pub(super) fn compressed_weights(packed: &[u8], n: usize, k: usize) -> Vec<u8> {
    let words = words_of(packed);
    blocks(n, k, &|output, input| words[output * (k / PACK) + input / PACK])
}

/// GPTQ `qzeros` `[groups, n / 8]`, outputs in order and each zero less `offset`, in AWQ's order.
///
/// # Errors
/// The place of a word with a nibble that the offset would carry out of.
pub(super) fn gptq_zeros(qzeros: &[u8], offset: u8) -> Result<Vec<u8>, usize> {
    let words = words_of(qzeros);
    let overflows = |word: &[u8; 4]| nibbles(u32::from_le_bytes(*word)).any(|z| z + offset > 15);
    if let Some(idx) = words.iter().position(overflows) {
        return Err(idx);
    }
    let added = u32::from(offset) * ONE_IN_EACH_NIBBLE;
    Ok(words.iter().flat_map(|word| ordered(u32::from_le_bytes(*word) + added)).collect())
}

/// compressed-tensors' `weight_zero_point` `[n / 8, groups]` as `[groups, n / 8]`.
pub(super) fn compressed_zeros(zeros: &[u8], n: usize, num_groups: usize) -> Vec<u8> {
    let words = words_of(zeros);
    let mut out = Vec::with_capacity(zeros.len());
    for group in 0..num_groups {
        for block in 0..n / PACK {
            out.extend(ordered(u32::from_le_bytes(words[block * num_groups + group])));
        }
    }
    out
}

/// Scales `[n, groups]` of two bytes each as `[groups, n]`.
pub(super) fn transposed_scales(scales: &[u8], n: usize, num_groups: usize) -> Vec<u8> {
    let elements = scales.as_chunks::<2>().0;
    let mut out = Vec::with_capacity(scales.len());
    for group in 0..num_groups {
        for output in 0..n {
            out.extend_from_slice(&elements[output * num_groups + group]);
        }
    }
    out
}

/// Scales in float16, if it holds each of them. What is not a number stays that, to be refused.
pub(super) fn exact_scales(scales: &[f32]) -> Result<Vec<u8>, InexactScale> {
    let mut out = Vec::with_capacity(2 * scales.len());
    for (idx, &value) in scales.iter().enumerate() {
        let rounded = f16::from_f32(value);
        if value.is_finite() && rounded.to_f32() != value {
            return Err(InexactScale { idx, value });
        }
        out.extend_from_slice(&rounded.to_le_bytes());
    }
    Ok(out)
}

fn words_of(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks::<4>().0
}

fn nibbles(word: u32) -> impl Iterator<Item = u8> {
    (0..PACK).map(move |place| (word >> (4 * place) & 15) as u8)
}

/// A word of eight outputs in order, in AWQ's order.
fn ordered(word: u32) -> [u8; 4] {
    let nibbles = AWQ_NIBBLE.iter().enumerate();
    let word = nibbles.fold(0, |out, (j, place)| out | (word >> (4 * j) & 15) << (4 * place));
    word.to_le_bytes()
}

/// AWQ words `[k, n / 8]` from words of eight inputs: `word(output, first input)`.
fn blocks(n: usize, k: usize, word: &dyn Fn(usize, usize) -> [u8; 4]) -> Vec<u8> {
    let per_input = n / PACK;
    let mut out = vec![0; k * per_input * 4];
    let rows = out.chunks_exact_mut((PACK * per_input * 4).max(1)).enumerate();
    for (row_idx, eight_inputs) in rows {
        for block in 0..per_input {
            let mut columns = [0; PACK];
            for (j, column) in columns.iter_mut().enumerate() {
                *column = u32::from_le_bytes(word(block * PACK + j, row_idx * PACK));
            }
            for place in 0..PACK {
                let mut packed = 0;
                for (column, nibble) in columns.iter().zip(AWQ_NIBBLE) {
                    packed |= (column >> (4 * place) & 15) << (4 * nibble);
                }
                let at = (place * per_input + block) * 4;
                eight_inputs[at..at + 4].copy_from_slice(&packed.to_le_bytes());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::linear::AwqView;

    const N: usize = 24;
    const K: usize = 32;

    /// Differs at every place.
    fn nibble(n: usize, k: usize) -> u8 {
        ((7 * n + 3 * k + n * k / 5) % 16) as u8
    }

    /// Words of eight values.
    fn packed(num_words: usize, value: impl Fn(usize, usize) -> u8) -> Vec<u8> {
        let word = |idx| (0..PACK).fold(0, |w, p| w | u32::from(value(idx, p)) << (4 * p));
        (0..num_words).flat_map(|idx| word(idx).to_le_bytes()).collect()
    }

    fn check(qweight: &[u8], qzeros: &[u8]) {
        let scales = vec![0; 2 * N * 4];
        let view = AwqView { n: N, k: K, group: 8, qweight, qzeros: Some(qzeros), scales: &scales };
        for n in 0..N {
            for k in 0..K {
                assert_eq!(view.q(k, n), nibble(n, k), "{n}, {k}");
            }
            for group in 0..4 {
                assert_eq!(view.zero(group, n), nibble(n, group).max(1), "{n}, {group}");
            }
        }
    }

    #[test]
    fn every_nibble_of_gptq_finds_its_place() {
        let qweight = packed(N * K / 8, |idx, p| nibble(idx % N, idx / N * 8 + p));
        let zero = |idx: usize, p| nibble(idx % (N / 8) * 8 + p, idx / (N / 8)).max(1);
        let direct = gptq_zeros(&packed(N / 8 * 4, zero), 0).unwrap();
        check(&gptq_weights(&qweight, N, K), &direct);
        let less_one = gptq_zeros(&packed(N / 8 * 4, |idx, p| zero(idx, p) - 1), 1).unwrap();
        assert_eq!(less_one, direct);
    }

    #[test]
    fn every_nibble_of_compressed_tensors_finds_its_place() {
        let weights = packed(N * K / 8, |idx, p| nibble(idx / (K / 8), idx % (K / 8) * 8 + p));
        let zeros = packed(N / 8 * 4, |idx, p| nibble(idx / 4 * 8 + p, idx % 4).max(1));
        check(&compressed_weights(&weights, N, K), &compressed_zeros(&zeros, N, 4));
    }

    #[test]
    fn a_zero_beyond_four_bits_is_found() {
        let mut zeros = packed(3, |_, _| 14);
        zeros[9] = 0xfe;
        assert_eq!(gptq_zeros(&zeros, 1), Err(2));
        assert!(gptq_zeros(&zeros, 0).is_ok());
    }

    #[test]
    fn scales_are_turned_and_kept_exactly() {
        let scales: Vec<u8> = (0..12u16).flat_map(u16::to_le_bytes).collect();
        let turned = transposed_scales(&scales, 6, 2);
        let expected = [0u16, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11].map(u16::to_le_bytes).concat();
        assert_eq!(turned, expected);
        let exact = [0.5, -0.0, 2.0f32.powi(-24), 65504.0];
        let bytes = exact_scales(&exact).unwrap();
        let back = bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32());
        assert_eq!(back.map(f32::to_bits).collect::<Vec<_>>(), exact.map(f32::to_bits));
        for value in [2.0f32.powi(-25), 1.0 + f32::EPSILON, 70_000.0, -1e-7] {
            let error = InexactScale { idx: 1, value };
            assert_eq!(exact_scales(&[1.0, value]), Err(error));
        }
        assert!(exact_scales(&[f32::NAN]).is_ok());
    }
}
