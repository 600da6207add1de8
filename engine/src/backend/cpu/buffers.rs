//! What the CPU backend keeps: packed linears, activation rows and the KV cache.

use std::ops::Range;

use bespoke_kernel_gen::spec::{LinearRole, RowFormat};

use super::ahead::Ahead;
use super::memory::Memory;
use super::pack::AwqPanels;
use crate::error::Error;
use crate::kernels::abi::{RowsIn, RowsOut, bf16_stride, int8_stride};

/// A linear's weights in the layout of its kernel.
pub struct CpuLinear {
    pub(super) role: LinearRole,
    /// Place of its kernels among the model's.
    pub(super) kernels_idx: usize,
    pub(super) packed: Packed,
    /// `[n]`
    pub(super) bias: Option<Memory>,
}

pub(super) enum Packed {
    Dense { weight: Memory },
    Bf16Pairs { weight: Memory },
    Int8 { weight: Memory, scales: Memory },
    Awq(AwqPanels),
}

impl CpuLinear {
    pub(super) fn bytes(&self) -> usize {
        let packed = match &self.packed {
            Packed::Dense { weight } | Packed::Bf16Pairs { weight } => weight.len(),
            Packed::Int8 { weight, scales } => weight.len() + scales.len(),
            Packed::Awq(awq) => awq.weight.len() + awq.scales.len() + awq.zeros.len(),
        };
        packed + self.bias.as_ref().map_or(0, Memory::len)
    }

    /// The arrays that its kernel reads.
    pub(super) fn ahead(&self) -> Ahead {
        Ahead::new(match &self.packed {
            Packed::Dense { weight } | Packed::Bf16Pairs { weight } => [None, None, Some(weight)],
            Packed::Int8 { weight, scales } => [Some(scales), None, Some(weight)],
            Packed::Awq(awq) => [Some(&awq.scales), Some(&awq.zeros), Some(&awq.weight)],
        })
    }

    pub(super) fn bias_ptr(&self) -> *const f32 {
        self.bias.as_ref().map_or(std::ptr::null(), Memory::ptr)
    }
}

/// float32 `[rows_max, width]`.
pub struct CpuRows {
    pub(super) data: Memory,
    pub(super) rows_max: usize,
    pub(super) width: usize,
}

impl CpuRows {
    pub(super) fn new(rows_max: usize, width: usize) -> Result<CpuRows, Error> {
        let len = checked_product(rows_max, width)?;
        Ok(CpuRows { data: Memory::floats(len, "activations")?, rows_max, width })
    }
}

/// Rows in the form that a linear reads.
pub struct CpuInput {
    /// That of the linear they are written for.
    pub(super) format: RowFormat,
    pub(super) rows_max: usize,
    pub(super) k: usize,
    /// `[rows_max, k]`: the rows themselves in the float form, where attention leaves them else.
    pub(super) float: Memory,
    /// `[rows_max, bf16_stride(k)]` where there is room for this form.
    bf16: Memory,
    /// Elements that share a scale in the int8 form; `None`: there is no room for it.
    group: Option<usize>,
    /// `[rows_max, int8_stride(k)]`
    q: Memory,
    /// `[rows_max, k / group]`
    scales: Memory,
    /// `[rows_max, k / group]`
    sums: Memory,
}

impl CpuInput {
    /// With room for rows in all `formats`, of which there are at most one in int8.
    pub(super) fn new(rows_max: usize, k: usize, formats: &[RowFormat]) -> Result<CpuInput, Error> {
        let float = Memory::floats(checked_product(rows_max, k)?, "activations")?;
        let group = formats.iter().find_map(|format| match format {
            RowFormat::F32 | RowFormat::Bf16 => None,
            RowFormat::I8 { group } => Some(*group),
        });
        let bf16_stride = if formats.contains(&RowFormat::Bf16) { bf16_stride(k) } else { 0 };
        let bf16_bytes = checked_product(rows_max, 2 * bf16_stride)?;
        let (row_bytes, groups) = match group {
            None => (0, 0),
            Some(group) => (int8_stride(k), k / group),
        };
        let params = checked_product(rows_max, groups)?;
        Ok(CpuInput {
            format: formats[0],
            rows_max,
            k,
            float,
            bf16: Memory::new(bf16_bytes, "bf16 activations")?,
            group,
            q: Memory::new(checked_product(rows_max, row_bytes)?, "int8 activations")?,
            scales: Memory::floats(params, "activation scales")?,
            sums: Memory::floats(params, "activation sums")?,
        })
    }

    /// The next rows are written in this form.
    pub(super) fn set_format(&mut self, format: RowFormat) {
        let has_room = match format {
            RowFormat::F32 => true,
            RowFormat::I8 { group } => self.group == Some(group),
            RowFormat::Bf16 => self.bf16.len() >= 2 * self.rows_max * self.k,
        };
        assert!(has_room, "the buffer has room for these rows");
        self.format = format;
    }

    /// The rows as a linear reads them, unless in bfloat16.
    pub(super) fn rows_in(&self) -> RowsIn {
        match self.format {
            RowFormat::I8 { .. } => RowsIn {
                f32: std::ptr::null(),
                q: self.q.ptr(),
                scales: self.scales.ptr(),
                sums: self.sums.ptr(),
            },
            RowFormat::F32 | RowFormat::Bf16 => RowsIn {
                f32: self.float.ptr(),
                q: std::ptr::null(),
                scales: std::ptr::null(),
                sums: std::ptr::null(),
            },
        }
    }

    /// `[rows_max, bf16_stride(k)]`
    pub(super) fn bf16_rows(&self) -> *const u16 {
        self.bf16.ptr()
    }

    /// What a linear makes of the first `num_rows` rows.
    pub(super) fn values(&self, num_rows: usize) -> Vec<f32> {
        let group = match self.format {
            RowFormat::F32 => return self.float.as_f32()[..num_rows * self.k].to_vec(),
            RowFormat::Bf16 => return self.bf16_values(num_rows),
            RowFormat::I8 { group } => group,
        };
        let rows = self.q.bytes().chunks_exact(int8_stride(self.k)).take(num_rows);
        let levels = rows.flat_map(|row| &row[..self.k]).map(|level| f32::from(*level as i8));
        let scales = self.scales.as_f32().iter().flat_map(|s| std::iter::repeat_n(*s, group));
        levels.zip(scales).map(|(level, scale)| level * scale).collect()
    }

    fn bf16_values(&self, num_rows: usize) -> Vec<f32> {
        let rows = self.bf16.bytes().chunks_exact(2 * bf16_stride(self.k)).take(num_rows);
        let elements = rows.flat_map(|row| row[..2 * self.k].as_chunks::<2>().0);
        elements.map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect()
    }

    /// The rows as an op writes them.
    pub(super) fn rows_out(&mut self) -> RowsOut {
        let mut out = RowsOut {
            f32: std::ptr::null_mut(),
            bf16: std::ptr::null_mut(),
            q: std::ptr::null_mut(),
            scales: std::ptr::null_mut(),
            sums: std::ptr::null_mut(),
        };
        match self.format {
            RowFormat::F32 => out.f32 = self.float.ptr_mut(),
            RowFormat::Bf16 => out.bf16 = self.bf16.ptr_mut(),
            RowFormat::I8 { .. } => {
                out.q = self.q.ptr_mut();
                out.scales = self.scales.ptr_mut();
                out.sums = self.sums.ptr_mut();
            }
        }
        out
    }
}

/// Pages of all layers: `[layer][page]`, see `templates/common/pages.rs`.
pub struct CpuKvCache {
    pub(super) data: Memory,
    /// Bytes of one page of one layer.
    pub(super) page_bytes: usize,
    pub(super) num_pages: usize,
    pub(super) num_layers: usize,
}

impl CpuKvCache {
    pub(super) fn new(
        num_layers: usize,
        num_pages: usize,
        page_bytes: usize,
    ) -> Result<CpuKvCache, Error> {
        let len = checked_product(checked_product(num_layers, num_pages)?, page_bytes)?;
        Ok(CpuKvCache {
            data: Memory::new(len, "the KV cache")?,
            page_bytes,
            num_pages,
            num_layers,
        })
    }

    /// Where a layer's pages start.
    pub(super) fn layer_offset(&self, layer_idx: usize) -> usize {
        assert!(layer_idx < self.num_layers, "layer {layer_idx} of {}", self.num_layers);
        layer_idx * self.num_pages * self.page_bytes
    }

    /// The bytes of one page of a layer.
    pub(super) fn page_range(&self, layer_idx: usize, page: u32) -> Range<usize> {
        assert!((page as usize) < self.num_pages, "page {page} of {}", self.num_pages);
        let start = self.layer_offset(layer_idx) + page as usize * self.page_bytes;
        start..start + self.page_bytes
    }
}

fn checked_product(a: usize, b: usize) -> Result<usize, Error> {
    a.checked_mul(b).filter(|len| *len <= isize::MAX as usize / 4).ok_or_else(|| {
        Error::Resources(format!("a buffer of {a} × {b} elements does not fit an address space"))
    })
}
