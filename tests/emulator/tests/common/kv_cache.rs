//! Pages of a KV cache on the host, written and read element by element.

use bespoke_kernel_gen::cuda::pages::{Layout, Place};
use bespoke_kernel_gen::cuda::{KvType, RowType};
use half::f16;

use super::{round, widen};

pub(crate) struct Cache {
    pub(crate) layout: Layout,
    pub(crate) rows: RowType,
    pub(crate) bytes: Vec<u8>,
}

/// Key or value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    K,
    V,
}

impl Cache {
    /// Pages in which every 16-bit value, scale and minimum is NaN.
    pub(crate) fn poisoned(layout: Layout, rows: RowType, num_pages: usize) -> Cache {
        Cache { layout, rows, bytes: vec![0xff; num_pages * layout.page_bytes()] }
    }

    fn place(&self, slot: usize, kv_head: usize, part: Part, dim: usize) -> Place {
        let Layout { page_size, .. } = self.layout;
        let head = self.layout.head_offset(slot / page_size, kv_head);
        let Place { byte, shift } = match part {
            Part::K => self.layout.k(slot % page_size, dim),
            Part::V => self.layout.v(slot % page_size, dim),
        };
        Place { byte: head + byte, shift }
    }

    fn params_at(&self, slot: usize, kv_head: usize, part: Part) -> usize {
        let Layout { page_size, .. } = self.layout;
        let head = self.layout.head_offset(slot / page_size, kv_head);
        head + match part {
            Part::K => self.layout.k_params(slot % page_size),
            Part::V => self.layout.v_params(slot % page_size),
        }
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Scale and minimum.
    pub(crate) fn params(&self, slot: usize, kv_head: usize, part: Part) -> (f32, f32) {
        if self.layout.kv == KvType::Rows {
            return (1.0, 0.0);
        }
        let at = self.params_at(slot, kv_head, part);
        let f32_at = |at| f16::from_bits(self.u16_at(at)).to_f32();
        (f32_at(at), f32_at(at + 2))
    }

    /// The value, or the level of a quantized cache.
    pub(crate) fn level(&self, slot: usize, kv_head: usize, part: Part, dim: usize) -> f32 {
        let Place { byte, shift } = self.place(slot, kv_head, part, dim);
        match self.layout.kv {
            KvType::Rows => widen(self.rows, self.u16_at(byte)),
            KvType::I8 => f32::from(self.bytes[byte]),
            KvType::I4 => f32::from(self.bytes[byte] >> shift & 15),
        }
    }

    /// A head of a token as it is stored: of int4, multiplied by its Hadamard matrix.
    pub(crate) fn head(&self, slot: usize, kv_head: usize, part: Part) -> Vec<f64> {
        let (scale, min) = self.params(slot, kv_head, part);
        let value = |dim| {
            let level = self.level(slot, kv_head, part, dim);
            f64::from(level) * f64::from(scale) + f64::from(min)
        };
        (0..self.layout.head_dim).map(value).collect()
    }

    fn set_level(&mut self, place: Place, level: f32) {
        let Place { byte, shift } = place;
        match self.layout.kv {
            KvType::Rows => {
                let bits = round(self.rows, level);
                self.bytes[byte..byte + 2].copy_from_slice(&bits.to_le_bytes());
            }
            KvType::I8 => self.bytes[byte] = level as u8,
            KvType::I4 => {
                let other = self.bytes[byte] & !(15 << shift);
                self.bytes[byte] = other | (level as u8) << shift;
            }
        }
    }

    /// Stores a head of a token: levels, scale and minimum of a quantized cache are made up from
    /// the range of `x`.
    pub(crate) fn set_head(&mut self, slot: usize, kv_head: usize, part: Part, x: &[f32]) {
        let (mut scale, mut min) = (1.0, 0.0);
        let levels_max = ((1 << self.layout.kv.bits()) - 1) as f32;
        if self.layout.kv != KvType::Rows {
            let low = x.iter().copied().fold(f32::INFINITY, f32::min);
            let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            (scale, min) = (f16::from_f32((high - low) / levels_max), f16::from_f32(low)).to_f32();
            let at = self.params_at(slot, kv_head, part);
            self.bytes[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            self.bytes[at + 2..at + 4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
        }
        for dim in 0..self.layout.dims() {
            let place = self.place(slot, kv_head, part, dim);
            let level = match x.get(dim) {
                None => 0.0,
                Some(value) if self.layout.kv == KvType::Rows => *value,
                Some(value) => ((value - min) / scale).round().clamp(0.0, levels_max),
            };
            self.set_level(place, level);
        }
    }
}

trait ToF32Pair {
    fn to_f32(self) -> (f32, f32);
}

impl ToF32Pair for (f16, f16) {
    fn to_f32(self) -> (f32, f32) {
        (self.0.to_f32(), self.1.to_f32())
    }
}

/// Multiplies a head by its Hadamard matrix.
pub(crate) fn hadamard(x: &mut [f64]) {
    let block = 1 << x.len().trailing_zeros();
    for head in x.chunks_mut(block) {
        let old = head.to_vec();
        for (i, out) in head.iter_mut().enumerate() {
            let sign = |j: usize| if (i & j).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
            let sum: f64 = old.iter().enumerate().map(|(j, v)| sign(j) * v).sum();
            *out = sum / (block as f64).sqrt();
        }
    }
}
