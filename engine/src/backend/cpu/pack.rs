//! Checkpoint weights into the packed panels that the matmul kernels read.
//!
//! The layouts are described in `gemm/gemm.rs`, `gemm_bf16/gemm_bf16.rs` and `awq_gemm/awq_gemm.rs`
//! of `templates/`.

use std::sync::atomic::{AtomicU32, Ordering};

use bespoke_kernel_gen::spec::{DType, LinearRole};

use super::memory::Memory;
use crate::error::Error;
use crate::model::linear::{AWQ_NIBBLE, AwqView, DenseView, LinearPart, LinearSource};

/// Sizes of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Panels {
    pub n: usize,
    pub k: usize,
    /// Columns of a tile.
    pub lanes: usize,
    /// Tiles of a panel.
    pub cols: usize,
}

impl Panels {
    pub fn num_tiles(&self) -> usize {
        self.n.div_ceil(self.lanes)
    }

    pub fn num_panels(&self) -> usize {
        self.num_tiles().div_ceil(self.cols)
    }

    /// Tiles of panel `panel`.
    pub fn width(&self, panel: usize) -> usize {
        self.cols.min(self.num_tiles() - panel * self.cols)
    }

    /// Columns of all tiles, padding included.
    pub fn padded_n(&self) -> usize {
        self.num_tiles() * self.lanes
    }
}

/// Packs one panel: `(panel, its part of the packed data)`.
type PackPanel<'a> = dyn Fn(usize, &mut [u8]) -> Result<(), Error> + Sync + 'a;

/// Splits `data` into the panels' parts, `per_column` bytes a column, and calls `pack` for each, on
/// all threads.
fn for_panels(
    panels: Panels,
    data: &mut [u8],
    per_column: usize,
    num_threads: usize,
    pack: &PackPanel<'_>,
) -> Result<(), Error> {
    let panel_bytes = panels.cols * panels.lanes * per_column;
    let per_thread = panels.num_panels().div_ceil(num_threads).max(1);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (thread_idx, part) in data.chunks_mut(panel_bytes * per_thread).enumerate() {
            threads.push(scope.spawn(move || {
                for (idx, panel) in part.chunks_mut(panel_bytes).enumerate() {
                    pack(thread_idx * per_thread + idx, panel)?;
                }
                Ok(())
            }));
        }
        let mut result = Ok(());
        for thread in threads {
            let outcome: Result<(), Error> = match thread.join() {
                Ok(outcome) => outcome,
                Err(payload) => std::panic::resume_unwind(payload),
            };
            result = result.and(outcome);
        }
        result
    })
}

/// Dense weights of type `dtype`: `[panel][k][tile][lane]`.
pub fn dense(
    source: &LinearSource<'_>,
    dtype: DType,
    panels: Panels,
    num_threads: usize,
) -> Result<Memory, Error> {
    elements(source, dtype, 1, panels, num_threads)
}

/// Dense bfloat16 weights in pairs: `[panel][k / 2][tile][lane][2]`; an odd last input is paired
/// with a zero.
pub fn bf16_pairs(
    source: &LinearSource<'_>,
    panels: Panels,
    num_threads: usize,
) -> Result<Memory, Error> {
    elements(source, DType::BF16, 2, panels, num_threads)
}

/// `[panel][k / per_lane][tile][lane][per_lane]`
fn elements(
    source: &LinearSource<'_>,
    dtype: DType,
    per_lane: usize,
    panels: Panels,
    num_threads: usize,
) -> Result<Memory, Error> {
    let per_column = panels.k.next_multiple_of(per_lane) * dtype.size();
    let mut memory = Memory::new(panels.padded_n() * per_column, "packed weights")?;
    for_panels(panels, memory.bytes_mut(), per_column, num_threads, &|panel, out| {
        let columns = panels.width(panel) * panels.lanes;
        let mut row = vec![0.0; panels.k];
        for column in 0..columns {
            let n = panel * panels.cols * panels.lanes + column;
            if n >= panels.n {
                break;
            }
            source.row(n, &mut row);
            for (k, value) in row.iter().enumerate() {
                let lane = k / per_lane * columns + column;
                let at = (lane * per_lane + k % per_lane) * dtype.size();
                write_element(dtype, *value, &mut out[at..at + dtype.size()])
                    .map_err(|error| error.at(n, k))?;
            }
        }
        Ok(())
    })?;
    Ok(memory)
}

/// Row-major embedding table in `dtype`.
pub fn embedding(source: &DenseView<'_>, dtype: DType) -> Result<Memory, Error> {
    let row_bytes = source.k * dtype.size();
    let mut memory = Memory::new(source.n * row_bytes, "the embedding table")?;
    if source.dtype == dtype {
        memory.bytes_mut().copy_from_slice(source.bytes);
        return Ok(memory);
    }
    let mut row = vec![0.0; source.k];
    for (n, out) in memory.bytes_mut().chunks_exact_mut(row_bytes).enumerate() {
        source.row(n, &mut row);
        for (k, value) in row.iter().enumerate() {
            let at = k * dtype.size();
            write_element(dtype, *value, &mut out[at..at + dtype.size()])
                .map_err(|error| error.at(n, k))?;
        }
    }
    Ok(memory)
}

/// A value that became infinite in a narrower type.
struct Overflow {
    value: f32,
    dtype: DType,
}

impl Overflow {
    fn at(self, n: usize, k: usize) -> Error {
        Error::Unsupported(format!(
            "weight [{n}, {k}] = {} does not fit {}, the dtype of config.json; set dtype to the \
             type the weights are stored in",
            self.value,
            self.dtype.name()
        ))
    }
}

fn write_element(dtype: DType, value: f32, out: &mut [u8]) -> Result<(), Overflow> {
    let rounded = match dtype {
        DType::F32 => {
            out.copy_from_slice(&value.to_le_bytes());
            value
        }
        DType::F16 => {
            let rounded = half::f16::from_f32(value);
            out.copy_from_slice(&rounded.to_le_bytes());
            rounded.to_f32()
        }
        DType::BF16 => {
            let rounded = half::bf16::from_f32(value);
            out.copy_from_slice(&rounded.to_le_bytes());
            rounded.to_f32()
        }
        DType::I8 => unreachable!("int8 weights are packed with their scales by `int8`"),
    };
    match value.is_finite() && !rounded.is_finite() {
        true => Err(Overflow { value, dtype }),
        false => Ok(()),
    }
}

/// Dense weights rounded to int8 per output (absmax / 127): `[panel][k / 4][tile][lane][4]` bytes
/// `w + 128`, and the scales of all padded columns.
pub fn int8(
    source: &LinearSource<'_>,
    panels: Panels,
    num_threads: usize,
) -> Result<(Memory, Memory), Error> {
    let mut scales = Memory::floats(panels.padded_n(), "packed scales")?;
    // The threads that pack the panels learn the scales: each is stored once, by one of them.
    let found: Vec<AtomicU32> = (0..panels.n).map(|_| AtomicU32::new(0)).collect();
    let scale_of = |row: &[f32]| row.iter().fold(0.0f32, |max, w| max.max(w.abs())) / 127.0;
    let mut memory = Memory::new(panels.padded_n() * panels.k, "packed weights")?;
    for_panels(panels, memory.bytes_mut(), panels.k, num_threads, &|panel, out| {
        let columns = panels.width(panel) * panels.lanes;
        let mut row = vec![0.0; panels.k];
        for column in 0..columns {
            let n = panel * panels.cols * panels.lanes + column;
            let scale = if n < panels.n {
                source.row(n, &mut row);
                let scale = scale_of(&row);
                found[n].store(scale.to_bits(), Ordering::Relaxed);
                scale
            } else {
                0.0
            };
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            for (line, four) in row.chunks(4).enumerate() {
                let lane = &mut out[(line * columns + column) * 4..][..four.len()];
                for (byte, value) in lane.iter_mut().zip(four) {
                    let q = nearest(value * inverse).clamp(-127.0, 127.0) as i32;
                    *byte = (q + 128) as u8;
                }
            }
        }
        Ok(())
    })?;
    for (scale, found) in scales.as_f32_mut().iter_mut().zip(found) {
        *scale = f32::from_bits(found.into_inner());
    }
    Ok((memory, scales))
}

/// `value` rounded to the nearest integer, ties to even, for values of at most 2²² either way.
///
/// NOTE: where the target has no instruction for it, `round_ties_even` is a call, and these are
/// tens of millions; a sum of 1.5 · 2²³ has no bits behind the point.
fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// Packed AWQ weights.
pub struct AwqPanels {
    /// `[panel][k / 8][tile][lane][4]` nibble pairs.
    pub weight: Memory,
    /// float16 `[panel][group][tile][lane]`
    pub scales: Memory,
    /// One byte each, as `scales`.
    pub zeros: Memory,
}

/// AWQ weights with scales and zeros repeated for every `group` inputs.
pub fn awq(
    source: &LinearSource<'_>,
    role: LinearRole,
    group: usize,
    panels: Panels,
    num_threads: usize,
) -> Result<AwqPanels, Error> {
    let mut views = Vec::new();
    for part in &source.parts {
        match part {
            LinearPart::Awq(view) => views.push(*view),
            LinearPart::Dense(_) => {
                return Err(Error::Unsupported(format!(
                    "{role:?} mixes quantized and dense weights; quantize all of its parts or none"
                )));
            }
        }
    }
    let view_of = |n: usize| {
        let (part_idx, row) = source.locate(n);
        (views[part_idx], row)
    };
    let num_groups = panels.k / group;
    let mut weight = Memory::new(panels.padded_n() * panels.k / 2, "packed weights")?;
    for_panels(panels, weight.bytes_mut(), panels.k / 2, num_threads, &|panel, out| {
        let first = panel * panels.cols * panels.lanes;
        let columns = panels.width(panel) * panels.lanes;
        let mut column = 0;
        while column < columns && first + column < panels.n {
            let n = first + column;
            let (part_idx, row) = source.locate(n);
            let view = views[part_idx];
            let is_word =
                |i: usize| n + i < panels.n && source.locate(n + i) == (part_idx, row + i);
            if row % 8 == 0 && column + 8 <= columns && (1..8).all(is_word) {
                pack_awq_word(&view, row / 8, columns, column, out);
                column += 8;
            } else {
                pack_awq_column(&view, row, columns, column, out);
                column += 1;
            }
        }
        Ok(())
    })?;
    let mut scales = Memory::new(panels.padded_n() * num_groups * 2, "packed scales")?;
    for_panels(panels, scales.bytes_mut(), num_groups * 2, num_threads, &|panel, out| {
        for_columns(panels, panel, &mut |columns, column, n| {
            let (view, row) = view_of(n);
            for g in 0..num_groups {
                let scale = view.scale(g * group / view.group, row);
                let at = (g * columns + column) * 2;
                out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        });
        Ok(())
    })?;
    let mut zeros = Memory::new(panels.padded_n() * num_groups, "packed zeros")?;
    for_panels(panels, zeros.bytes_mut(), num_groups, num_threads, &|panel, out| {
        for_columns(panels, panel, &mut |columns, column, n| {
            let (view, row) = view_of(n);
            for g in 0..num_groups {
                out[g * columns + column] = view.zero(g * group / view.group, row);
            }
        });
        Ok(())
    })?;
    Ok(AwqPanels { weight, scales, zeros })
}

/// Calls `each(columns of the panel, column in the panel, output)` for the real outputs of a panel.
fn for_columns(panels: Panels, panel: usize, each: &mut dyn FnMut(usize, usize, usize)) {
    let columns = panels.width(panel) * panels.lanes;
    for column in 0..columns {
        let n = panel * panels.cols * panels.lanes + column;
        if n < panels.n {
            each(columns, column, n);
        }
    }
}

/// Nibbles of the eight outputs of a word, `word` of each input, into their lanes of a panel with
/// `columns` columns.
fn pack_awq_word(view: &AwqView<'_>, word: usize, columns: usize, column: usize, out: &mut [u8]) {
    let stride = view.n / 8;
    for (line, out) in out.chunks_exact_mut(columns * 4).enumerate().take(view.k / 8) {
        let words: [u32; 8] = std::array::from_fn(|i| view.word((line * 8 + i) * stride + word));
        let lanes = &mut out[column * 4..][..32];
        for (lane, nibble) in lanes.chunks_exact_mut(4).zip(AWQ_NIBBLE) {
            for (i, byte) in lane.iter_mut().enumerate() {
                let low = words[i] >> (4 * nibble) & 15;
                let high = words[i + 4] >> (4 * nibble) & 15;
                *byte = (low | high << 4) as u8;
            }
        }
    }
}

/// Nibbles of one output into its lane of a panel with `columns` columns.
fn pack_awq_column(view: &AwqView<'_>, row: usize, columns: usize, column: usize, out: &mut [u8]) {
    for k in 0..view.k {
        let (line, place) = (k / 8, k % 8);
        let at = (line * columns + column) * 4 + place % 4;
        out[at] |= view.q(k, row) << (4 * (place / 4));
    }
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn rounds_as_the_standard_library() {
        for step in -40_000..=40_000 {
            // Halves and their neighbours among them.
            let value = step as f32 / 256.0;
            for value in [value.next_down(), value, value.next_up()] {
                assert_eq!(nearest(value), value.round_ties_even(), "{value}");
            }
        }
        assert!(nearest(f32::NAN).is_nan());
    }
}
