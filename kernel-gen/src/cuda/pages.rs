//! Layout of the KV cache on GPUs, as `templates/common/pages.cuh` defines it: the same offsets,
//! for whoever allocates, reads or writes pages from the host.

use super::KvType;

/// Tokens and dimensions of a cell.
const OCTET: usize = 8;
const CELL_DIMS: usize = 32;
/// Sixteen bytes of eight lanes.
const PIECE_BYTES: usize = 128;

/// Sizes of a layer's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub page_size: usize,
    pub kv: KvType,
}

/// Where an element lies: a byte offset, and how far the element is shifted there (int4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub byte: usize,
    pub shift: u32,
}

impl Layout {
    /// Dimensions of a head as stored; those beyond `head_dim` are zero.
    pub fn dims(&self) -> usize {
        self.head_dim.next_multiple_of(CELL_DIMS)
    }

    fn cell_bytes(&self) -> usize {
        self.kv.bits() / 4 * PIECE_BYTES
    }

    fn v_offset(&self) -> usize {
        self.page_size / OCTET * (self.dims() / CELL_DIMS) * self.cell_bytes()
    }

    fn is_quantized(&self) -> bool {
        self.kv != KvType::Rows
    }

    /// Bytes of one head of a page.
    pub fn head_bytes(&self) -> usize {
        2 * self.v_offset() + if self.is_quantized() { 8 * self.page_size } else { 0 }
    }

    /// Bytes of one page of one layer.
    pub fn page_bytes(&self) -> usize {
        self.num_kv_heads * self.head_bytes()
    }

    /// Offset of a head in the pages of a layer.
    pub fn head_offset(&self, page: usize, kv_head: usize) -> usize {
        page * self.page_bytes() + kv_head * self.head_bytes()
    }

    /// Byte `at` of what lane `lane` holds of the cell of a token and a dimension.
    fn lane_offset(&self, token: usize, dim: usize, lane: usize, at: usize) -> usize {
        let cell = token / OCTET * (self.dims() / CELL_DIMS) + dim / CELL_DIMS;
        cell * self.cell_bytes() + at / 16 * PIECE_BYTES + lane * 16 + at % 16
    }

    /// Where dimension `dim` of the key of token `token` of a page lies, in the head's bytes.
    pub fn k(&self, token: usize, dim: usize) -> Place {
        let lane = token % 2 * 4 + dim % CELL_DIMS / 8;
        let (j, i) = (token % OCTET / 2, dim % 8);
        let bits = self.kv.bits();
        let (bit, shift) = match self.kv {
            KvType::I4 => {
                let nibble = i / 2 + i % 2 * 4;
                (j * 32 + nibble / 2 * 8, nibble as u32 % 2 * 4)
            }
            _ => ((j * 8 + i) * bits, 0),
        };
        Place { byte: self.lane_offset(token, dim, lane, bit / 8), shift }
    }

    /// As [`Layout::k`] for values.
    pub fn v(&self, token: usize, dim: usize) -> Place {
        let (j, i) = (dim % CELL_DIMS / 8, token % OCTET);
        let (at, shift) = match self.kv {
            KvType::I4 => ((j / 2 * 2 + i / 4) * 4 + i / 2 % 2 + i % 2 * 2, j as u32 % 2 * 4),
            _ => ((j * 8 + i) * self.kv.bits() / 8, 0),
        };
        Place { byte: self.v_offset() + self.lane_offset(token, dim, dim % 8, at), shift }
    }

    /// Where scale and, two bytes further, minimum of the key of a token lie.
    pub fn k_params(&self, token: usize) -> usize {
        let place = token / OCTET * OCTET + token % 2 * 4 + token % OCTET / 2;
        2 * self.v_offset() + place * 4
    }

    /// As [`Layout::k_params`] for values.
    pub fn v_params(&self, token: usize) -> usize {
        self.k_params(token) + 4 * self.page_size
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_element_has_a_place_of_its_own() {
        for kv in KvType::ALL {
            for (head_dim, page_size) in [(16, 16), (24, 32), (80, 16), (128, 64)] {
                let layout = Layout { num_kv_heads: 2, head_dim, page_size, kv };
                let mut used = BTreeSet::new();
                let mut take = |byte: usize, shift: u32, bits: usize| {
                    for bit in 0..bits {
                        let bit = byte * 8 + shift as usize + bit;
                        assert!(bit < layout.head_bytes() * 8);
                        assert!(used.insert(bit), "{layout:?}: bit {bit} is used twice");
                    }
                };
                for token in 0..page_size {
                    for dim in 0..layout.dims() {
                        for Place { byte, shift } in [layout.k(token, dim), layout.v(token, dim)] {
                            take(byte, shift, kv.bits());
                        }
                    }
                    if layout.is_quantized() {
                        take(layout.k_params(token), 0, 32);
                        take(layout.v_params(token), 0, 32);
                    }
                }
                assert_eq!(used.len(), layout.head_bytes() * 8, "{layout:?}");
            }
        }
    }

    #[test]
    fn pages_cost_what_they_hold() {
        let layout = |kv| Layout { num_kv_heads: 8, head_dim: 128, page_size: 32, kv }.page_bytes();
        assert_eq!(layout(KvType::Rows), 8 * 32 * 2 * 128 * 2);
        assert_eq!(layout(KvType::I8), 8 * 32 * 2 * (128 + 4));
        assert_eq!(layout(KvType::I4), 8 * 32 * 2 * (64 + 4));
    }
}
