//! The AWQ "gemm" layout of a 4-bit linear with `k` inputs and `n` outputs, groups of `g` inputs:
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `qweight` | int32 | `[k, n / 8]` |
//! | `qzeros` | int32 | `[k / g, n / 8]` |
//! | `scales` | float16 | `[k / g, n]` |
//!
//! `w[k][n] = (q[k][n] - z[k / g][n]) · s[k / g][n]`, with q and z from 0 to 15.

use half::f16;

/// Outputs that share a word.
pub const PACK: usize = 8;

/// The nibble at bits `4p` of a word holds output `ORDER[p]` of its eight.
pub const ORDER: [usize; PACK] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Packs eight neighbouring outputs, each below 16.
pub fn pack(values: [u8; PACK]) -> u32 {
    ORDER.iter().rev().fold(0, |word, &output| word << 4 | u32::from(values[output] & 15))
}

/// The eight outputs of a word.
pub fn unpack(word: u32) -> [u8; PACK] {
    let mut values = [0; PACK];
    for (position, &output) in ORDER.iter().enumerate() {
        values[output] = (word >> (4 * position)) as u8 & 15;
    }
    values
}

/// A quantized linear, column block by column block: threads fill blocks of eight outputs each,
/// and the layout of the file is made while it is written.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLinear {
    pub n: usize,
    pub k: usize,
    pub group: usize,
    /// `[n / 8, k]`
    pub qweight: Vec<u32>,
    /// `[n / 8, k / group]`
    pub qzeros: Vec<u32>,
    /// `[n / 8, k / group, 8]`
    pub scales: Vec<f16>,
}

impl PackedLinear {
    /// All zeros. `n` must be a multiple of 8 and `k` one of `group`.
    pub fn new(n: usize, k: usize, group: usize) -> PackedLinear {
        assert!(n.is_multiple_of(PACK), "{n} outputs do not fill words");
        assert!(group > 0 && k.is_multiple_of(group), "{k} inputs in groups of {group}");
        let blocks = n / PACK;
        PackedLinear {
            n,
            k,
            group,
            qweight: vec![0; blocks * k],
            qzeros: vec![0; blocks * (k / group)],
            scales: vec![f16::ZERO; n * (k / group)],
        }
    }

    /// Bytes of `qweight` as `[k, n / 8]`, rows `rows` only.
    pub fn qweight_rows(&self, rows: std::ops::Range<usize>) -> Vec<u8> {
        transposed(&self.qweight, self.k, rows)
    }

    /// Bytes of `qzeros` as `[k / group, n / 8]`.
    pub fn qzeros_bytes(&self) -> Vec<u8> {
        let groups = self.k / self.group;
        transposed(&self.qzeros, groups, 0..groups)
    }

    /// Bytes of `scales` as `[k / group, n]`.
    pub fn scales_bytes(&self) -> Vec<u8> {
        let groups = self.k / self.group;
        let mut bytes = Vec::with_capacity(self.scales.len() * 2);
        for group in 0..groups {
            for block in self.scales.chunks_exact(groups * PACK) {
                let eight = &block[group * PACK..][..PACK];
                bytes.extend(eight.iter().flat_map(|scale| scale.to_le_bytes()));
            }
        }
        bytes
    }
}

/// Rows of the transpose of `[blocks, columns]`, as little-endian bytes.
fn transposed(words: &[u32], columns: usize, rows: std::ops::Range<usize>) -> Vec<u8> {
    let blocks = words.len() / columns;
    let mut bytes = Vec::with_capacity(blocks * rows.len() * 4);
    for row in rows {
        for block in 0..blocks {
            bytes.extend_from_slice(&words[block * columns + row].to_le_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::{PackedLinear, pack, unpack};

    #[test]
    fn outputs_are_packed_in_the_published_order() {
        assert_eq!(pack([0, 1, 2, 3, 4, 5, 6, 7]), 0x7531_6420);
        assert_eq!(pack([15, 0, 0, 0, 0, 0, 0, 15]), 0xf000_000f);
        for seed in 0..1000u32 {
            let word = seed.wrapping_mul(2_654_435_761);
            assert_eq!(pack(unpack(word)), word);
        }
    }

    #[test]
    fn the_file_is_the_transpose_of_the_blocks() {
        let mut linear = PackedLinear::new(16, 3, 1);
        linear.qweight = vec![1, 2, 3, 4, 5, 6];
        let words = [1u32, 4, 2, 5, 3, 6].map(u32::to_le_bytes).concat();
        assert_eq!(linear.qweight_rows(0..3), words);
        assert_eq!(linear.qweight_rows(1..2), words[8..16]);
    }
}
