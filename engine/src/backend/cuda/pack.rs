//! Checkpoint weights into the tiles that the CUDA matmuls read.
//!
//! The layouts are described in `templates/gemm/gemm.cuh`, `templates/awq_gemm/awq_gemm.cuh` and
//! `templates/common/dequant.cuh`. Weights come in blocks of 64 outputs × 64 inputs of four tiles,
//! and a tile's 16 × 16 weights are an A fragment of m16n8k16: lane 4g + t holds in register r the
//! outputs g (r even) or g + 8, the inputs 2t and 2t + 1, and 8 more for registers 2 and 3.

use bespoke_kernel_gen::cuda::RowType;
use bespoke_kernel_gen::cuda::matmul::{AwqLayout, DenseLayout};
use half::{bf16, f16};

use crate::error::Error;
use crate::model::linear::{AwqView, LinearPart, LinearSource};

/// Outputs that lie together.
const BLOCK: usize = 64;
/// Outputs of a tile, and inputs of a fragment.
const TILE: usize = 16;
/// Inputs of a tile.
const TILE_K: usize = 64;

/// Packed int4 weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwqTiles {
    pub weight: Vec<u8>,
    /// A float16 scale and a zero for each output and scale group.
    pub scales: Vec<u8>,
}

/// Where an output and an input are in a tile: the place of the lane's word and its half.
struct Place {
    tile: usize,
    /// Which 16 inputs of the tile.
    k16: usize,
    lane: usize,
    register: usize,
    /// 0 for the first of the pair of inputs.
    half: usize,
}

impl Place {
    /// Of output `row` and input `k` of weights with `padded_k` inputs.
    fn of(row: usize, k: usize, padded_k: usize) -> Place {
        let block = row / BLOCK * (padded_k / TILE_K) + k / TILE_K;
        Place {
            tile: block * (BLOCK / TILE) + row % BLOCK / TILE,
            k16: k % TILE_K / TILE,
            lane: row % 8 * 4 + k % 8 / 2,
            register: k % TILE / 8 * 2 + row % TILE / 8,
            half: k % 2,
        }
    }

    /// Byte of a 16-bit weight.
    fn dense(&self) -> usize {
        let fragment = self.tile * (TILE_K / TILE) + self.k16;
        fragment * 512 + self.lane * 16 + self.register * 4 + self.half * 2
    }

    /// Byte and shift of an int4 weight.
    fn int4(&self) -> (usize, usize) {
        let word = self.tile * 512 + self.lane * 16 + self.k16 * 4;
        let nibble = self.register + 4 * self.half;
        (word + nibble / 2, nibble % 2 * 4)
    }
}

/// Packs the outputs from the first of a block on: `(first output, the block's bytes)`.
type PackBlock<'a> = dyn Fn(usize, &mut [u8]) -> Result<(), Error> + Sync + 'a;

/// Calls `pack` for every block of 64 outputs, on `num_threads` threads.
fn for_blocks(
    data: &mut [u8],
    block_bytes: usize,
    num_threads: usize,
    pack: &PackBlock<'_>,
) -> Result<(), Error> {
    let per_thread = (data.len() / block_bytes).div_ceil(num_threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (thread_idx, part) in data.chunks_mut(block_bytes * per_thread).enumerate() {
            threads.push(scope.spawn(move || {
                part.chunks_mut(block_bytes).enumerate().try_for_each(|(idx, block)| {
                    pack((thread_idx * per_thread + idx) * BLOCK, block)
                })
            }));
        }
        let mut result = Ok(());
        for thread in threads {
            let outcome = match thread.join() {
                Ok(outcome) => outcome,
                Err(payload) => std::panic::resume_unwind(payload),
            };
            result = result.and(outcome);
        }
        result
    })
}

/// A value in the rows' type, or the reason why not.
fn narrow(rows: RowType, value: f32, n: usize, k: usize) -> Result<[u8; 2], Error> {
    let (bits, rounded) = match rows {
        RowType::F16 => (f16::from_f32(value).to_bits(), f16::from_f32(value).to_f32()),
        RowType::BF16 => (bf16::from_f32(value).to_bits(), bf16::from_f32(value).to_f32()),
    };
    match value.is_finite() && !rounded.is_finite() {
        true => Err(Error::Unsupported(format!(
            "weight [{n}, {k}] = {value} does not fit {}, which the GPU runs this model in; set \
             dtype in config.json to bfloat16",
            rows.name()
        ))),
        false => Ok(bits.to_le_bytes()),
    }
}

/// Weights of a linear, rounded to the rows' type. Quantized parts are dequantized.
pub fn dense(
    source: &LinearSource<'_>,
    rows: RowType,
    num_threads: usize,
) -> Result<Vec<u8>, Error> {
    let layout = DenseLayout { n: source.n(), k: source.k() };
    let mut weight = vec![0; layout.weight_bytes()];
    let padded_k = layout.padded_k();
    for_blocks(&mut weight, BLOCK * padded_k * 2, num_threads, &|first, out| {
        let mut row = vec![0.0; layout.k];
        for n in first..layout.n.min(first + BLOCK) {
            source.row(n, &mut row);
            for (k, value) in row.iter().enumerate() {
                let at = Place::of(n - first, k, padded_k).dense();
                out[at..at + 2].copy_from_slice(&narrow(rows, *value, n, k)?);
            }
        }
        Ok(())
    })?;
    Ok(weight)
}

/// The parts of a quantized linear.
struct AwqSource<'a> {
    source: &'a LinearSource<'a>,
    views: Vec<AwqView<'a>>,
}

impl<'a> AwqSource<'a> {
    fn new(source: &'a LinearSource<'a>, layout: &AwqLayout) -> Result<AwqSource<'a>, Error> {
        let mut views = Vec::new();
        for part in &source.parts {
            let LinearPart::Awq(view) = part else {
                return Err(Error::Unsupported(
                    "a linear mixes quantized and dense weights; quantize all of its parts or none"
                        .to_string(),
                ));
            };
            if view.group != layout.group || view.k != layout.k {
                return Err(Error::Unsupported(format!(
                    "a linear has a part with {} inputs in groups of {}, its kernel has {} in \
                     groups of {}; rebuild for this model",
                    view.k, view.group, layout.k, layout.group
                )));
            }
            views.push(*view);
        }
        if source.n() != layout.n {
            return Err(Error::Unsupported(format!(
                "a linear has {} outputs, its kernel {}; rebuild for this model",
                source.n(),
                layout.n
            )));
        }
        Ok(AwqSource { source, views })
    }

    fn locate(&self, n: usize) -> (&AwqView<'a>, usize) {
        let (part_idx, row) = self.source.locate(n);
        (&self.views[part_idx], row)
    }
}

/// AWQ weights of a linear.
pub fn awq(
    source: &LinearSource<'_>,
    layout: &AwqLayout,
    rows: RowType,
    num_threads: usize,
) -> Result<AwqTiles, Error> {
    let parts = AwqSource::new(source, layout)?;
    let mut weight = vec![0; layout.weight_bytes()];
    for_blocks(&mut weight, BLOCK * layout.padded_k() / 2, num_threads, &|first, out| {
        pack_block(&parts, layout, first, out);
        Ok(())
    })?;
    let mut scales = vec![0; layout.scale_bytes()];
    let block_bytes = BLOCK * layout.num_scale_groups() * 4;
    for_blocks(&mut scales, block_bytes, num_threads, &|first, out| {
        pack_scales(&parts, layout, rows, first, out);
        Ok(())
    })?;
    Ok(AwqTiles { weight, scales })
}

/// What lies between the groups and behind the last is multiplied with zeros.
fn pack_block(parts: &AwqSource<'_>, layout: &AwqLayout, first: usize, out: &mut [u8]) {
    for row in 0..BLOCK.min(layout.n - first) {
        let (view, part_row) = parts.locate(first + row);
        for k in 0..layout.k {
            let (byte, shift) = Place::of(row, layout.place(k), layout.padded_k()).int4();
            out[byte] |= view.q(k, part_row) << shift;
        }
    }
}

/// Records of outputs that do not exist have scale 0.
fn pack_scales(
    parts: &AwqSource<'_>,
    layout: &AwqLayout,
    rows: RowType,
    first: usize,
    out: &mut [u8],
) {
    let last_group = layout.k / layout.group - 1;
    for row in 0..BLOCK {
        for record in 0..layout.num_scale_groups() {
            let group = (record * layout.scale_group / layout.packed_group).min(last_group);
            let (scale, zero) = match first + row < layout.n {
                true => {
                    let (view, part_row) = parts.locate(first + row);
                    (view.scale(group, part_row), view.zero(group, part_row))
                }
                false => (f16::ZERO, 0),
            };
            let tile = record * (BLOCK / TILE) + row / TILE;
            let at = (tile * TILE + row % 8 * 2 + row % TILE / 8) * 4;
            let zero = added_zero(rows, zero, row % TILE < 8);
            out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            out[at + 2..at + 4].copy_from_slice(&zero.to_le_bytes());
        }
    }
}

/// The number that `dequant.cuh` adds for a zero, of the first or the last 8 outputs of a tile.
fn added_zero(rows: RowType, zero: u8, is_first: bool) -> u16 {
    let zero = f32::from(zero);
    match rows {
        RowType::F16 if is_first => f16::from_f32(-(1024.0 + zero)).to_bits(),
        RowType::F16 => f16::from_f32(-(64.0 + zero)).to_bits(),
        RowType::BF16 => bf16::from_f32(-(128.0 + zero)).to_bits(),
    }
}

#[cfg(test)]
mod tests;
