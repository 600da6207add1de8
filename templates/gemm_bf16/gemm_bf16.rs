//! Dense matmul `[rows, K] × [N, K]ᵀ` of bfloat16 rows and weights, added up in float32.
//!
//! Bound: one row reads every weight once (bytes / bandwidth); many rows are bound by the rate of
//! products of pairs, on AVX-512 twice that of float32. Packed weights are operands as they lie, in
//! panels of `COLS` tiles of `LANES` columns, the last panel narrower:
//!
//! ```text
//! [panel][k / 2][tile][lane][2]                 an odd last input is paired with a zero
//! ```
//!
//! Every output is one chain over pairs of inputs in order, so its bits depend neither on the
//! number of rows nor on how columns and rows are split over threads.

use super::abi::{GemmBf16Args, Share, bf16_stride};
use super::bf16::DotBf16;
use super::gemm::{
    TileRun, ask_for, for_row_blocks, for_tile_runs, has_block, load_block, next_block, split_many,
    store_block, tile_range, tile_unit,
};

/// Lines of a weight panel that all rows pass before the next: 512 · 64 columns · 4 bytes fit L2.
pub const LINE_BLOCK: usize = 512;

/// One row.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn one<
    S: DotBf16,
    const N: usize,
    const K: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &GemmBf16Args,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: the runs lie within the panels, the row is the only one.
    unsafe {
        ask_for::<S>(args.x.cast(), 2 * bf16_stride(K));
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            block::<S, N, K, PREFETCH, 1, C>(args, 0, run, 0, K.div_ceil(2))
        });
    }
}

/// Some rows: weights are read from memory once.
///
/// # Safety
/// As [`one`].
#[inline(always)]
pub unsafe fn few<
    S: DotBf16,
    const N: usize,
    const K: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &GemmBf16Args,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: as in `one`; row + R never exceeds the rows.
    unsafe {
        ask_for::<S>(args.x.cast(), args.rows * 2 * bf16_stride(K));
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            for_row_blocks!(0, args.rows, |row, R| {
                block::<S, N, K, PREFETCH, R, C>(args, row, run, 0, K.div_ceil(2))
            })
        });
    }
}

/// Any number of rows: they pass a part of a panel that stays in a cache.
///
/// # Safety
/// As [`one`].
#[inline(always)]
pub unsafe fn many<
    S: DotBf16,
    const N: usize,
    const K: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &GemmBf16Args,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (rows, (first, last)) = split_many::<S, N, SPLIT>(args.rows, share);
    // SAFETY: as in `few`; a row has its first part before its second.
    unsafe {
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            let mut line = 0;
            while line < K.div_ceil(2) {
                let left = K.div_ceil(2) - line;
                let end = line + if left < LINE_BLOCK { left } else { LINE_BLOCK };
                for_row_blocks!(rows.0, rows.1, |row, R| {
                    block::<S, N, K, PREFETCH, R, C>(args, row, run, line, end)
                });
                line = end;
            }
        });
    }
}

/// Lines `line..end` of `R` rows by `C` tiles: adds to what the lines before have left in the
/// outputs, and the bias behind the last.
#[inline(always)]
unsafe fn block<
    S: DotBf16,
    const N: usize,
    const K: usize,
    const PREFETCH: usize,
    const R: usize,
    const C: usize,
>(
    args: &GemmBf16Args,
    row: usize,
    run: TileRun,
    line: usize,
    end: usize,
) {
    // SAFETY: the caller's rows and tiles exist; a row holds a pair for each line.
    unsafe {
        let lines = K.div_ceil(2);
        let stride = run.panel_width * S::LANES * 4;
        let mut w = args.weight.add((run.panel_tile * lines + run.tile) * S::LANES * 4);
        w = w.add(line * stride);
        let x = args.x.add(row * bf16_stride(K)).cast::<i32>();
        let mut acc = [[S::zero(); C]; R];
        if line > 0 {
            load_block::<S, N, R, C>(&mut acc, row, run, args.out);
        }
        let mut line = line;
        while line < end {
            if PREFETCH > 0 {
                S::prefetch(w.wrapping_add(PREFETCH));
            }
            let mut weight = [S::zero_i32(); C];
            let mut c = 0;
            while c < C {
                weight[c] = S::load_i32(w.add(c * S::LANES * 4));
                c += 1;
            }
            let mut r = 0;
            while r < R {
                let pair = x.add(r * (bf16_stride(K) / 2) + line).read_unaligned();
                let pair = S::splat_i32(pair);
                let mut c = 0;
                while c < C {
                    acc[r][c] = S::dot_bf16(acc[r][c], weight[c], pair);
                    c += 1;
                }
                r += 1;
            }
            w = w.add(stride);
            line += 1;
        }
        let bias = if end == lines { args.bias } else { std::ptr::null() };
        store_block::<S, N, R, C>(&acc, bias, row, run, args.out);
    }
}
