//! Fused AWQ-dequant matmul `[rows, K] × [N, K]ᵀ`: 4-bit weights, a float16 scale and a 4-bit zero
//! per group, float32 or int8 rows.
//!
//! Bound: one row streams (0.5 + 3 / GROUP) · N · K bytes; many int8 rows are bound by the dot
//! rate. Packed weights are panels of `COLS` tiles of `LANES` columns, the last panel narrower:
//!
//! ```text
//! weight         [panel][k / 8][tile][lane][4]   byte j: input k+j low nibble, input k+4+j high
//! scales, zeros  [panel][group][tile][lane]
//! ```
//!
//! so that `line & 0x0f` and `line >> 4 & 0x0f` are at once the unsigned operands of two byte dot
//! products with inputs k..k+4 and k+4..k+8 broadcast as one word each.
//!
//! int8 rows: Σ (q − z)·a is exact in integers (Σ q·a − z·Σ a), then scaled and added in group
//! order. Float rows: weights become float32 `(q − z) · scale` and one chain over k adds them in
//! order. Neither depends on the number of rows or on the split over threads.

use super::abi::{AwqGemmArgs, Share, int8_stride};
use super::gemm::{
    K_BLOCK, TileRun, add_bias, ask_for_floats, ask_for_int8, float_block, for_row_blocks,
    for_tile_runs, has_block, next_block, split_many, store_block, tile_range, tile_unit,
};
use super::simd::{Element, F16, Simd};

/// One int8 row.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn int8_one<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &AwqGemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: the runs lie within the panels, the row is the only one.
    unsafe {
        ask_for_int8::<S, K, GROUP>(&args.x, 1);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            int8_stream::<S, N, K, GROUP, UNROLL, PREFETCH, 1, C>(args, 0, run)
        });
    }
}

/// Some int8 rows: weights are read from memory once.
///
/// # Safety
/// As [`int8_one`].
#[inline(always)]
pub unsafe fn int8_few<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &AwqGemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: as in `int8_one`; row + R never exceeds the rows.
    unsafe {
        ask_for_int8::<S, K, GROUP>(&args.x, args.rows);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            for_row_blocks!(0, args.rows, |row, R| {
                int8_stream::<S, N, K, GROUP, UNROLL, PREFETCH, R, C>(args, row, run)
            })
        });
    }
}

/// Any number of int8 rows: nibbles are unpacked to bytes once per thread and panel.
///
/// # Safety
/// As [`int8_one`]; scratch for K inputs of a panel, one byte each.
#[inline(always)]
pub unsafe fn int8_many<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &AwqGemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (rows, (first, last)) = split_many::<S, N, SPLIT>(args.rows, share);
    // SAFETY: a run's weights lie within its panel; scratch holds K · COLS · LANES bytes.
    unsafe {
        for_tile_runs!(first, last, tiles, COLS, S::BLOCK_TILES, |run, C| {
            if const { TILES >= 4 && C == 4 } {
                int8_panel::<S, N, K, GROUP, ROWS, HALVES, C, C>(args, share.scratch, rows, run)
            } else if const { TILES >= 2 && C >= 2 } {
                int8_panel::<S, N, K, GROUP, ROWS, HALVES, C, 2>(args, share.scratch, rows, run)
            } else {
                int8_panel::<S, N, K, GROUP, ROWS, HALVES, C, 1>(args, share.scratch, rows, run)
            }
        });
    }
}

/// One float row.
///
/// # Safety
/// As [`int8_one`].
#[inline(always)]
pub unsafe fn float_one<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &AwqGemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: as in `int8_one`.
    unsafe {
        ask_for_floats::<S, K>(&args.x, 1);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            float_stream::<S, N, K, GROUP, PREFETCH, 1, C>(args, 0, run)
        });
    }
}

/// Some float rows: weights are read from memory once.
///
/// # Safety
/// As [`int8_one`].
#[inline(always)]
pub unsafe fn float_few<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &AwqGemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: as in `int8_few`.
    unsafe {
        ask_for_floats::<S, K>(&args.x, args.rows);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            for_row_blocks!(0, args.rows, |row, R| {
                float_stream::<S, N, K, GROUP, PREFETCH, R, C>(args, row, run)
            })
        });
    }
}

/// Any number of float rows: weights are dequantized once per thread and panel.
///
/// # Safety
/// As [`int8_one`]; scratch for [`K_BLOCK`] inputs of a panel, four bytes each.
#[inline(always)]
pub unsafe fn float_many<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const COLS: usize,
    const ROWS: usize,
    const TILES: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const SPLIT: usize,
    const HALVES: usize,
>(
    args: &AwqGemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (rows, (first, last)) = split_many::<S, N, SPLIT>(args.rows, share);
    let scratch: *mut f32 = share.scratch.cast();
    // SAFETY: a run's weights lie within its panel; scratch holds K_BLOCK · COLS · LANES floats.
    unsafe {
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            let mut k0 = 0;
            while k0 < K {
                let k1 = if k0 + K_BLOCK < K { k0 + K_BLOCK } else { K };
                dequantize::<S, K, GROUP, C>(args, run, k0, k1, scratch);
                for_row_blocks!(rows.0, rows.1, |row, R| {
                    float_block::<S, N, K, R, C>(args.x.f32, scratch, row, run, k0, k1, args.out)
                });
                k0 = k1;
            }
            add_bias::<S, N, C>(args.bias, run, rows, args.out);
        });
    }
}

/// First packed line of a run.
#[inline(always)]
unsafe fn run_weight<S: Simd, const K: usize>(weight: *const u8, run: TileRun) -> *const u8 {
    // SAFETY: the run lies within the packed weights.
    unsafe { weight.add((run.panel_tile * (K / 8) + run.tile) * S::LANES * 4) }
}

/// Index of the scales and zeros of tile `c` of a run in `group`.
#[inline(always)]
fn param_idx<S: Simd, const K: usize, const GROUP: usize>(
    run: TileRun,
    group: usize,
    c: usize,
) -> usize {
    (run.panel_tile * (K / GROUP) + group * run.panel_width + run.tile + c) * S::LANES
}

/// `R` int8 rows by `C` tiles straight from the packed nibbles.
#[inline(always)]
unsafe fn int8_stream<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const R: usize,
    const C: usize,
>(
    args: &AwqGemmArgs,
    row: usize,
    run: TileRun,
) {
    const { assert!(K.is_multiple_of(GROUP) && GROUP.is_multiple_of(8 * UNROLL)) };
    // SAFETY: the caller's rows and tiles exist.
    unsafe {
        let stride = run.panel_width * S::LANES * 4;
        let mut w = run_weight::<S, K>(args.weight, run);
        let x = args.x.q.add(row * int8_stride(K));
        let mut acc = [[S::zero(); C]; R];
        let mut group = 0;
        while group < K / GROUP {
            // NOTE: low and high nibbles add up apart where that keeps more sums in flight,
            // together where registers would run out; integers do not mind.
            let mut low = [[S::zero_i32(); C]; R];
            let mut high = [[S::zero_i32(); C]; R];
            let mut k = group * GROUP;
            while k < (group + 1) * GROUP {
                let mut line = 0;
                while line < UNROLL {
                    int8_line::<S, K, PREFETCH, R, C>(&mut low, &mut high, w, x.add(k));
                    w = w.add(stride);
                    k += 8;
                    line += 1;
                }
            }
            let mut r = 0;
            while r < R {
                let mut c = 0;
                while c < C {
                    low[r][c] = S::add_i32(low[r][c], high[r][c]);
                    c += 1;
                }
                r += 1;
            }
            flush::<S, K, GROUP, R, C>(&mut acc, &low, args, row, run, group, Zero::Subtract);
            group += 1;
        }
        store_block::<S, N, R, C>(&acc, args.bias, row, run, args.out);
    }
}

/// Eight inputs of `R` int8 rows by `C` tiles of packed nibbles at `w`.
#[inline(always)]
unsafe fn int8_line<
    S: Simd,
    const K: usize,
    const PREFETCH: usize,
    const R: usize,
    const C: usize,
>(
    low: &mut [[S::I32; C]; R],
    high: &mut [[S::I32; C]; R],
    w: *const u8,
    x: *const i8,
) {
    let mut c = 0;
    while c < C {
        // SAFETY: the caller's rows and weights exist.
        unsafe {
            let at = w.add(c * S::LANES * 4);
            if PREFETCH > 0 {
                S::prefetch(at.wrapping_add(PREFETCH));
            }
            let line = S::load_i32(at);
            let (u_low, u_high) = (S::low_nibbles(line), S::high_nibbles(line));
            let mut r = 0;
            while r < R {
                let x = x.add(r * int8_stride(K)).cast::<i32>();
                low[r][c] = S::dot_u4(low[r][c], u_low, S::splat_i32(x.read_unaligned()));
                let x = S::splat_i32(x.add(1).read_unaligned());
                if R * C <= 8 {
                    high[r][c] = S::dot_u4(high[r][c], u_high, x);
                } else {
                    low[r][c] = S::dot_u4(low[r][c], u_high, x);
                }
                r += 1;
            }
        }
        c += 1;
    }
}

/// Whether the sums of a group still lack their zero term.
#[derive(Clone, Copy, PartialEq)]
enum Zero {
    Subtract,
    Done,
}

/// Ends a group: `acc += (sums − zero · Σ a) · scale_w · scale_a`.
#[inline(always)]
unsafe fn flush<S: Simd, const K: usize, const GROUP: usize, const R: usize, const C: usize>(
    acc: &mut [[S::F32; C]; R],
    sums: &[[S::I32; C]; R],
    args: &AwqGemmArgs,
    row: usize,
    run: TileRun,
    group: usize,
    zero: Zero,
) {
    let mut c = 0;
    while c < C {
        let idx = param_idx::<S, K, GROUP>(run, group, c);
        // SAFETY: the run and the rows exist.
        unsafe {
            let scale = F16::load::<S>(args.scales.add(idx).cast());
            let mut r = 0;
            while r < R {
                let param = (row + r) * (K / GROUP) + group;
                let mut sum = sums[r][c];
                if zero == Zero::Subtract {
                    let zeros = S::load_u8_i32(args.zeros.add(idx));
                    let total = S::splat_i32(*args.x.sums.add(param));
                    sum = S::sub_i32(sum, S::mul_i32(zeros, total));
                }
                let value = S::mul(S::to_f32(sum), scale);
                acc[r][c] = S::fma(value, S::splat(*args.x.scales.add(param)), acc[r][c]);
                r += 1;
            }
        }
        c += 1;
    }
}

/// What unpacked weights are too large by: q − z + 16 is a positive byte.
const BIAS: i32 = 16;

/// The rows `rows` by `C` tiles, `W` at a time, unpacked to `scratch` before.
#[inline(always)]
unsafe fn int8_panel<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const ROWS: usize,
    const HALVES: usize,
    const C: usize,
    const W: usize,
>(
    args: &AwqGemmArgs,
    scratch: *mut u8,
    rows: (usize, usize),
    run: TileRun,
) {
    // SAFETY: the run and the rows exist, scratch holds K bytes of each of the run's columns.
    unsafe {
        unpack_bytes::<S, K, GROUP, C, W>(args, run, scratch);
        let mut tile = 0;
        while tile < C {
            let part = TileRun { tile: run.tile + tile, ..run };
            let panel = scratch.add(tile * K * S::LANES);
            // NOTE: the first rows ask for the weights of the next run, which lie behind.
            let next =
                run_weight::<S, K>(args.weight, run).wrapping_add(K / 2 * (C + tile) * S::LANES);
            for_row_blocks!(rows.0, rows.1, |row, R| {
                if row == rows.0 {
                    int8_block::<S, N, K, GROUP, R, W, true>(args, panel, next, row, part)
                } else {
                    int8_block::<S, N, K, GROUP, R, W, false>(args, panel, next, row, part)
                }
            });
            tile += W;
        }
    }
}

/// Nibbles of `C` tiles as bytes q − z + [`BIAS`], `[block][k / 4][tile][lane][4]` with the `W`
/// tiles of a register block side by side. The zeros are subtracted here, once for all rows.
#[inline(always)]
unsafe fn unpack_bytes<
    S: Simd,
    const K: usize,
    const GROUP: usize,
    const C: usize,
    const W: usize,
>(
    args: &AwqGemmArgs,
    run: TileRun,
    out: *mut u8,
) {
    const { assert!(K.is_multiple_of(GROUP) && GROUP.is_multiple_of(8)) };
    let line_bytes = S::LANES * 4;
    // SAFETY: reads the run's K / 8 lines, writes K · C · LANES bytes.
    unsafe {
        let mut w = run_weight::<S, K>(args.weight, run);
        let mut group = 0;
        while group < K / GROUP {
            let mut shift = [S::zero_i32(); C];
            let mut c = 0;
            while c < C {
                let zeros = S::load_u8_i32(args.zeros.add(param_idx::<S, K, GROUP>(run, group, c)));
                let each_byte = S::mul_i32(zeros, S::splat_i32(0x0101_0101));
                shift[c] = S::sub_i32(S::splat_i32(BIAS * 0x0101_0101), each_byte);
                c += 1;
            }
            let mut k8 = group * GROUP / 8;
            while k8 < (group + 1) * GROUP / 8 {
                let mut c = 0;
                while c < C {
                    let line = S::load_i32(w.add(c * line_bytes));
                    let block = out.add(c / W * W * K * S::LANES);
                    let at = block.add((2 * k8 * W + c % W) * line_bytes);
                    // NOTE: no byte overflows into the next.
                    S::store_i32(at, S::add_i32(S::low_nibbles(line), shift[c]));
                    let high = S::add_i32(S::high_nibbles(line), shift[c]);
                    S::store_i32(at.add(W * line_bytes), high);
                    c += 1;
                }
                w = w.add(run.panel_width * line_bytes);
                k8 += 1;
            }
            group += 1;
        }
    }
}

/// `R` int8 rows by `C` unpacked tiles; with `AHEAD` it asks for the packed weights at `next`
/// meanwhile.
#[inline(always)]
unsafe fn int8_block<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const R: usize,
    const C: usize,
    const AHEAD: bool,
>(
    args: &AwqGemmArgs,
    panel: *const u8,
    next: *const u8,
    row: usize,
    run: TileRun,
) {
    const { assert!(K.is_multiple_of(GROUP) && GROUP.is_multiple_of(8)) };
    // SAFETY: the caller's rows and tiles exist; the panel holds K / 4 lines of C tiles.
    unsafe {
        let x = args.x.q.add(row * int8_stride(K));
        let mut w = panel;
        let line_bytes = S::LANES * 4;
        let mut ahead = next;
        let mut acc = [[S::zero(); C]; R];
        let mut group = 0;
        while group < K / GROUP {
            let mut sums = [[S::zero_i32(); C]; R];
            let mut r = 0;
            while r < R {
                let total = *args.x.sums.add((row + r) * (K / GROUP) + group);
                sums[r] = [S::splat_i32(-BIAS * total); C];
                r += 1;
            }
            let mut k = group * GROUP;
            while k < (group + 1) * GROUP {
                let mut weight = [S::zero_i32(); C];
                let mut c = 0;
                while c < C {
                    weight[c] = S::load_i32(w.add(c * S::LANES * 4));
                    c += 1;
                }
                let mut r = 0;
                while r < R {
                    let x = x.add(r * int8_stride(K) + k).cast::<i32>().read_unaligned();
                    let value = S::splat_i32(x);
                    let mut c = 0;
                    while c < C {
                        sums[r][c] = S::dot_u4(sums[r][c], weight[c], value);
                        c += 1;
                    }
                    r += 1;
                }
                if AHEAD {
                    // NOTE: a step reads what half a packed line holds for each tile.
                    S::prefetch(ahead);
                    if C * line_bytes / 2 > 64 {
                        S::prefetch(ahead.wrapping_add(64));
                    }
                    ahead = ahead.wrapping_add(C * line_bytes / 2);
                }
                w = w.add(C * line_bytes);
                k += 4;
            }
            flush::<S, K, GROUP, R, C>(&mut acc, &sums, args, row, run, group, Zero::Done);
            group += 1;
        }
        store_block::<S, N, R, C>(&acc, args.bias, row, run, args.out);
    }
}

/// Byte `BYTE` of a nibble line as dequantized float32 weights of one input.
#[inline(always)]
unsafe fn weight<S: Simd, const BYTE: u32>(nibbles: S::I32, zero: S::F32, scale: S::F32) -> S::F32 {
    // SAFETY: the caller has the instruction set.
    unsafe { S::mul(S::sub(S::to_f32(S::byte::<BYTE>(nibbles)), zero), scale) }
}

/// The eight inputs of a packed line, in order, as float32 weights.
#[inline(always)]
unsafe fn dequantize_line<S: Simd>(line: S::I32, zero: S::F32, scale: S::F32) -> [S::F32; 8] {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let (low, high) = (S::low_nibbles(line), S::high_nibbles(line));
        [
            weight::<S, 0>(low, zero, scale),
            weight::<S, 1>(low, zero, scale),
            weight::<S, 2>(low, zero, scale),
            weight::<S, 3>(low, zero, scale),
            weight::<S, 0>(high, zero, scale),
            weight::<S, 1>(high, zero, scale),
            weight::<S, 2>(high, zero, scale),
            weight::<S, 3>(high, zero, scale),
        ]
    }
}

/// `R` float rows by `C` tiles straight from the packed nibbles.
#[inline(always)]
unsafe fn float_stream<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const PREFETCH: usize,
    const R: usize,
    const C: usize,
>(
    args: &AwqGemmArgs,
    row: usize,
    run: TileRun,
) {
    const { assert!(K.is_multiple_of(GROUP) && GROUP.is_multiple_of(8)) };
    // SAFETY: the caller's rows and tiles exist.
    unsafe {
        let stride = run.panel_width * S::LANES * 4;
        let mut w = run_weight::<S, K>(args.weight, run);
        let x = args.x.f32.add(row * K);
        let mut acc = [[S::zero(); C]; R];
        let mut k = 0;
        while k < K {
            let mut c = 0;
            while c < C {
                let idx = param_idx::<S, K, GROUP>(run, k / GROUP, c);
                let scale = F16::load::<S>(args.scales.add(idx).cast());
                let zero = S::load_u8(args.zeros.add(idx));
                let at = w.add(c * S::LANES * 4);
                if PREFETCH > 0 {
                    S::prefetch(at.wrapping_add(PREFETCH));
                }
                let weights = dequantize_line::<S>(S::load_i32(at), zero, scale);
                let mut r = 0;
                while r < R {
                    let mut j = 0;
                    while j < 8 {
                        let x = S::splat(*x.add(r * K + k + j));
                        acc[r][c] = S::fma(x, weights[j], acc[r][c]);
                        j += 1;
                    }
                    r += 1;
                }
                c += 1;
            }
            w = w.add(stride);
            k += 8;
        }
        store_block::<S, N, R, C>(&acc, args.bias, row, run, args.out);
    }
}

/// Weights `k0..k1` of `C` tiles as float32 `[k][tile][lane]`.
#[inline(always)]
unsafe fn dequantize<S: Simd, const K: usize, const GROUP: usize, const C: usize>(
    args: &AwqGemmArgs,
    run: TileRun,
    k0: usize,
    k1: usize,
    out: *mut f32,
) {
    // SAFETY: reads the run's lines, writes (k1 - k0) · C · LANES floats.
    unsafe {
        let stride = run.panel_width * S::LANES * 4;
        let base = run_weight::<S, K>(args.weight, run);
        let mut k = k0;
        while k < k1 {
            let mut c = 0;
            while c < C {
                let idx = param_idx::<S, K, GROUP>(run, k / GROUP, c);
                let scale = F16::load::<S>(args.scales.add(idx).cast());
                let zero = S::load_u8(args.zeros.add(idx));
                let line = S::load_i32(base.add(k / 8 * stride + c * S::LANES * 4));
                let weights = dequantize_line::<S>(line, zero, scale);
                let mut j = 0;
                while j < 8 {
                    S::store(out.add(((k - k0 + j) * C + c) * S::LANES), weights[j]);
                    j += 1;
                }
                c += 1;
            }
            k += 8;
        }
    }
}
