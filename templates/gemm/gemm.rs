//! Dense matmul `[rows, K] × [N, K]ᵀ`, float rows with f32, f16 or bf16 weights, or int8 rows with
//! int8 weights per output channel.
//!
//! Bound: one row reads every weight once (bytes / bandwidth); many rows are bound by the dot or
//! FMA rate. Packed weights are panels of `COLS` tiles of `LANES` columns, the last panel narrower:
//!
//! ```text
//! float  [panel][k][tile][lane]                 elements of E
//! int8   [panel][k / 4][tile][lane][4]          bytes w + 128
//! ```
//!
//! Every output is one chain over k in order, so its bits depend neither on the number of rows nor
//! on how columns and rows are split over threads.

use super::abi::{GemmArgs, RowsIn, Share, int8_stride};
use super::simd::{Element, Simd};

/// Inputs of a weight panel that are unpacked at a time: 512 · 64 columns · 4 bytes fit in L2.
pub const K_BLOCK: usize = 512;

/// Where a run of tiles lies: inside one panel.
#[derive(Clone, Copy)]
pub struct TileRun {
    /// First tile of the panel, counted over all tiles.
    pub panel_tile: usize,
    /// Tiles of the panel.
    pub panel_width: usize,
    /// First tile of the run, counted within the panel.
    pub tile: usize,
}

/// Calls a block function over the tiles `first..last`, 4, 2 or 1 of a panel at a time, at most
/// `$most`.
macro_rules! for_tile_runs {
    ($first:expr, $last:expr, $tiles:expr, $cols:expr, $most:expr, |$run:ident, $c:ident|
     $body:expr) => {{
        let mut tile = $first;
        while tile < $last {
            let panel_tile = tile / $cols * $cols;
            let panel_width = if $tiles - panel_tile < $cols { $tiles - panel_tile } else { $cols };
            let left = {
                let panel_left = panel_tile + panel_width - tile;
                if $last - tile < panel_left { $last - tile } else { panel_left }
            };
            let $run = TileRun { panel_tile, panel_width, tile: tile - panel_tile };
            if const { $most >= 4 && COLS >= 4 } && left >= 4 {
                const $c: usize = 4;
                $body;
                tile += 4;
            } else if const { $most >= 2 && COLS >= 2 } && left >= 2 {
                const $c: usize = 2;
                $body;
                tile += 2;
            } else if const { $most == 1 || COLS % 2 == 1 || tile_unit::<S, N>() == 1 } {
                const $c: usize = 1;
                $body;
                tile += 1;
            } else {
                // Tiles come in pairs, so none is left alone.
                break;
            }
        }
    }};
}
pub(crate) use for_tile_runs;

/// Calls a block function over the rows `first..last`, in the blocks that [`next_block`] gives for
/// the constants `ROWS` and `HALVES` of the caller.
macro_rules! for_row_blocks {
    ($first:expr, $last:expr, |$row:ident, $r:ident| $body:expr) => {{
        let mut done = $first;
        while done < $last {
            let (size, again) = next_block(ROWS, HALVES, done - $first, $last - done);
            let $row = done - again;
            for_row_blocks!(@sizes size, $r, $body, 16, 14, 12, 8, 7, 6, 4, 3, 2, 1);
            done = $row + size;
        }
    }};
    (@sizes $size:ident, $r:ident, $body:expr, $($rows:literal),*) => {
        $(if const { has_block(ROWS, HALVES, $rows) } && $size == $rows {
            const $r: usize = $rows;
            $body;
        })*
    };
}
pub(crate) use for_row_blocks;

/// The next block of rows, of which `done` precede and `left` follow: its size, and how many of the
/// rows before it it repeats. Whole blocks of `rows` come first. What is left is taken in pairs, or
/// with `halves` in the smallest of `rows`, its half, the half of that, … that hold it, where as
/// many rows precede; to compute a row again gives the same bits.
#[inline(always)]
pub const fn next_block(rows: usize, halves: usize, done: usize, left: usize) -> (usize, usize) {
    if left >= rows {
        return (rows, 0);
    }
    if halves == 0 {
        return (if left >= 2 { 2 } else { 1 }, 0);
    }
    let mut size = rows;
    while left < size {
        let half = size.div_ceil(2);
        if left > half && done + left >= size {
            return (size, size - left);
        }
        size = half;
    }
    (size, 0)
}

/// Whether [`next_block`] ever gives `size` rows.
pub const fn has_block(rows: usize, halves: usize, size: usize) -> bool {
    if halves == 0 {
        return size == rows || (size < rows && size <= 2);
    }
    let mut block = rows;
    while block > size {
        block = block.div_ceil(2);
    }
    block == size
}

/// Tiles that threads share out together: pairs where there are pairs, because every size of a
/// block is code of its own.
pub const fn tile_unit<S: Simd, const N: usize>() -> usize {
    if N.div_ceil(S::LANES).is_multiple_of(2) { 2 } else { 1 }
}

/// Tiles that a share of a call computes.
#[inline(always)]
pub fn tile_range<S: Simd, const N: usize>(share: Share) -> (usize, usize) {
    let unit = const { tile_unit::<S, N>() };
    let (first, last) = share.range(N.div_ceil(S::LANES) / unit);
    (first * unit, last * unit)
}

/// Rows and tiles that a share of a many-row call computes: `(row range, tile range)`. From `SPLIT`
/// rows on it is rows that are shared out, unless that is 0.
#[inline(always)]
pub fn split_many<S: Simd, const N: usize, const SPLIT: usize>(
    rows: usize,
    share: Share,
) -> ((usize, usize), (usize, usize)) {
    let tiles = N.div_ceil(S::LANES);
    if SPLIT > 0 && rows >= SPLIT {
        (share.range(rows), (0, tiles))
    } else {
        ((0, rows), tile_range::<S, N>(share))
    }
}

/// Bytes of rows that are asked for ahead: half of a small first-level cache.
const AHEAD_BYTES: usize = 16 << 10;

/// Asks for `bytes` from `first` on, all at once. Other threads have just written parts of a call's
/// rows: read line by line, each would wait for another core's cache.
///
/// # Safety
/// The bytes are there; the instruction set of `S`.
#[inline(always)]
pub unsafe fn ask_for<S: Simd>(first: *const u8, bytes: usize) {
    let bytes = if bytes < AHEAD_BYTES { bytes } else { AHEAD_BYTES };
    let mut at = 0;
    while at < bytes {
        // SAFETY: the rows are there.
        unsafe { S::prefetch(first.add(at)) };
        at += 64;
    }
}

/// Asks for the first of `rows` float32 rows of `K` inputs.
///
/// # Safety
/// `x` holds them; the instruction set of `S`.
#[inline(always)]
pub unsafe fn ask_for_floats<S: Simd, const K: usize>(x: &RowsIn, rows: usize) {
    // SAFETY: as the caller promises.
    unsafe { ask_for::<S>(x.f32.cast(), rows * K * 4) }
}

/// Asks for the first of `rows` int8 rows of `K` inputs in groups of `GROUP`.
///
/// # Safety
/// `x` holds them; the instruction set of `S`.
#[inline(always)]
pub unsafe fn ask_for_int8<S: Simd, const K: usize, const GROUP: usize>(x: &RowsIn, rows: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        ask_for::<S>(x.q.cast(), rows * int8_stride(K));
        ask_for::<S>(x.scales.cast(), rows * (K / GROUP) * 4);
        ask_for::<S>(x.sums.cast(), rows * (K / GROUP) * 4);
    }
}

/// One row of float activations.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn one<
    S: Simd,
    E: Element,
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
    args: &GemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: the runs lie within the panels, the row is the only one.
    unsafe {
        ask_for_floats::<S, K>(&args.x, 1);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            stream::<S, E, N, K, PREFETCH, 1, C>(args, 0, run)
        });
    }
}

/// Some rows of float activations: weights are read from memory once.
///
/// # Safety
/// As [`one`].
#[inline(always)]
pub unsafe fn few<
    S: Simd,
    E: Element,
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
    args: &GemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: as in `one`; row + R never exceeds the rows.
    unsafe {
        ask_for_floats::<S, K>(&args.x, args.rows);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            for_row_blocks!(0, args.rows, |row, R| {
                stream::<S, E, N, K, PREFETCH, R, C>(args, row, run)
            })
        });
    }
}

/// Any number of rows: weights are unpacked to float32 once per thread and panel.
///
/// # Safety
/// As [`one`]; scratch for [`K_BLOCK`] inputs of a panel.
#[inline(always)]
pub unsafe fn many<
    S: Simd,
    E: Element,
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
    args: &GemmArgs,
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
                unpack::<S, E, K, C>(args.weight, run, k0, k1, scratch);
                for_row_blocks!(rows.0, rows.1, |row, R| {
                    float_block::<S, N, K, R, C>(args.x.f32, scratch, row, run, k0, k1, args.out)
                });
                k0 = k1;
            }
            add_bias::<S, N, C>(args.bias, run, rows, args.out);
        });
    }
}

/// `R` rows by `C` tiles straight from the packed weights.
#[inline(always)]
unsafe fn stream<
    S: Simd,
    E: Element,
    const N: usize,
    const K: usize,
    const PREFETCH: usize,
    const R: usize,
    const C: usize,
>(
    args: &GemmArgs,
    row: usize,
    run: TileRun,
) {
    // SAFETY: the caller's rows and tiles exist.
    unsafe {
        let stride = run.panel_width * S::LANES * E::SIZE;
        let mut w = args.weight.add((run.panel_tile * K + run.tile) * S::LANES * E::SIZE);
        let x = args.x.f32.add(row * K);
        let mut acc = [[S::zero(); C]; R];
        let mut k = 0;
        while k < K {
            if PREFETCH > 0 {
                S::prefetch(w.wrapping_add(PREFETCH));
            }
            let mut c = 0;
            while c < C {
                let weight = E::load::<S>(w.add(c * S::LANES * E::SIZE));
                let mut r = 0;
                while r < R {
                    acc[r][c] = S::fma(S::splat(*x.add(r * K + k)), weight, acc[r][c]);
                    r += 1;
                }
                c += 1;
            }
            w = w.add(stride);
            k += 1;
        }
        store_block::<S, N, R, C>(&acc, args.bias, row, run, args.out);
    }
}

/// Weights `k0..k1` of `C` tiles as float32 `[k][tile][lane]`.
#[inline(always)]
unsafe fn unpack<S: Simd, E: Element, const K: usize, const C: usize>(
    weight: *const u8,
    run: TileRun,
    k0: usize,
    k1: usize,
    out: *mut f32,
) {
    // SAFETY: reads the run's weights, writes (k1 - k0) · C · LANES floats.
    unsafe {
        let base = weight.add((run.panel_tile * K + run.tile) * S::LANES * E::SIZE);
        let mut k = k0;
        while k < k1 {
            let line = base.add(k * run.panel_width * S::LANES * E::SIZE);
            let mut c = 0;
            while c < C {
                let value = E::load::<S>(line.add(c * S::LANES * E::SIZE));
                S::store(out.add(((k - k0) * C + c) * S::LANES), value);
                c += 1;
            }
            k += 1;
        }
    }
}

/// Adds inputs `k0..k1` of `R` rows times an unpacked panel `[k][C tiles]` to `out`, which starts
/// at zero for `k0 == 0`.
///
/// # Safety
/// `x` is `[rows, K]`, `out` is `[rows, N]`, both with `row + R` rows.
#[inline(always)]
pub unsafe fn float_block<
    S: Simd,
    const N: usize,
    const K: usize,
    const R: usize,
    const C: usize,
>(
    x: *const f32,
    panel: *const f32,
    row: usize,
    run: TileRun,
    k0: usize,
    k1: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's rows and tiles exist, the panel holds k1 - k0 lines.
    unsafe {
        let x = x.add(row * K);
        let mut acc = [[S::zero(); C]; R];
        if k0 > 0 {
            load_block::<S, N, R, C>(&mut acc, row, run, out);
        }
        let mut w = panel;
        let mut k = k0;
        while k < k1 {
            let mut weight = [S::zero(); C];
            let mut c = 0;
            while c < C {
                weight[c] = S::load(w.add(c * S::LANES));
                c += 1;
            }
            let mut r = 0;
            while r < R {
                let value = S::splat(*x.add(r * K + k));
                let mut c = 0;
                while c < C {
                    acc[r][c] = S::fma(value, weight[c], acc[r][c]);
                    c += 1;
                }
                r += 1;
            }
            w = w.add(C * S::LANES);
            k += 1;
        }
        store_block::<S, N, R, C>(&acc, std::ptr::null(), row, run, out);
    }
}

/// Reads `R` rows by `C` tiles of `[rows, N]`.
///
/// # Safety
/// `out` has `row + R` rows.
#[inline(always)]
pub unsafe fn load_block<S: Simd, const N: usize, const R: usize, const C: usize>(
    acc: &mut [[S::F32; C]; R],
    row: usize,
    run: TileRun,
    out: *const f32,
) {
    let mut c = 0;
    while c < C {
        let col = (run.panel_tile + run.tile + c) * S::LANES;
        let mut r = 0;
        while r < R {
            // SAFETY: row + r and col exist; a tile that crosses N is read up to N.
            unsafe {
                let at = out.add((row + r) * N + col);
                acc[r][c] =
                    if col + S::LANES <= N { S::load(at) } else { S::load_first(at, N - col) };
            }
            r += 1;
        }
        c += 1;
    }
}

/// Writes `R` rows by `C` tiles to `[rows, N]`, plus the bias unless it is null.
///
/// # Safety
/// `out` has `row + R` rows, `bias` is null or `[N]`.
#[inline(always)]
pub unsafe fn store_block<S: Simd, const N: usize, const R: usize, const C: usize>(
    acc: &[[S::F32; C]; R],
    bias: *const f32,
    row: usize,
    run: TileRun,
    out: *mut f32,
) {
    let mut c = 0;
    while c < C {
        let col = (run.panel_tile + run.tile + c) * S::LANES;
        let mut r = 0;
        while r < R {
            // SAFETY: row + r and col exist; a tile that crosses N is handled up to N.
            unsafe {
                let at = out.add((row + r) * N + col);
                let mut value = acc[r][c];
                if col + S::LANES <= N {
                    if !bias.is_null() {
                        value = S::add(value, S::load(bias.add(col)));
                    }
                    S::store(at, value);
                } else {
                    if !bias.is_null() {
                        value = S::add(value, S::load_first(bias.add(col), N - col));
                    }
                    S::store_first(at, value, N - col);
                }
            }
            r += 1;
        }
        c += 1;
    }
}

/// Adds the bias, unless it is null, to the rows `rows` and the tiles of a run.
///
/// # Safety
/// As [`store_block`].
#[inline(always)]
pub unsafe fn add_bias<S: Simd, const N: usize, const C: usize>(
    bias: *const f32,
    run: TileRun,
    rows: (usize, usize),
    out: *mut f32,
) {
    if bias.is_null() {
        return;
    }
    let mut row = rows.0;
    while row < rows.1 {
        // SAFETY: the caller's rows and tiles exist.
        unsafe {
            let mut acc = [[S::zero(); C]; 1];
            load_block::<S, N, 1, C>(&mut acc, row, run, out);
            store_block::<S, N, 1, C>(&acc, bias, row, run, out);
        }
        row += 1;
    }
}

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
    args: &GemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: the runs lie within the panels, the row is the only one.
    unsafe {
        ask_for_int8::<S, K, GROUP>(&args.x, 1);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            int8_block::<S, N, K, GROUP, UNROLL, PREFETCH, 1, C>(args, 0, run)
        });
    }
}

/// Some int8 rows.
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
    args: &GemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (first, last) = tile_range::<S, N>(share);
    // SAFETY: as in `int8_one`; row + R never exceeds the rows.
    unsafe {
        ask_for_int8::<S, K, GROUP>(&args.x, args.rows);
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            for_row_blocks!(0, args.rows, |row, R| {
                int8_block::<S, N, K, GROUP, UNROLL, PREFETCH, R, C>(args, row, run)
            })
        });
    }
}

/// Any number of int8 rows.
///
/// # Safety
/// As [`int8_one`].
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
    args: &GemmArgs,
    share: Share,
) {
    let tiles = N.div_ceil(S::LANES);
    let (rows, (first, last)) = split_many::<S, N, SPLIT>(args.rows, share);
    // SAFETY: as in `int8_few`.
    unsafe {
        for_tile_runs!(first, last, tiles, COLS, TILES, |run, C| {
            for_row_blocks!(rows.0, rows.1, |row, R| {
                int8_block::<S, N, K, GROUP, 1, PREFETCH, R, C>(args, row, run)
            })
        });
    }
}

/// `R` int8 rows by `C` tiles: exact integer sums per group, scaled and added in group order.
#[inline(always)]
unsafe fn int8_block<
    S: Simd,
    const N: usize,
    const K: usize,
    const GROUP: usize,
    const UNROLL: usize,
    const PREFETCH: usize,
    const R: usize,
    const C: usize,
>(
    args: &GemmArgs,
    row: usize,
    run: TileRun,
) {
    const { assert!(K.is_multiple_of(GROUP) && GROUP.is_multiple_of(4 * UNROLL)) };
    // SAFETY: the caller's rows and tiles exist.
    unsafe {
        let stride = run.panel_width * S::LANES * 4;
        let mut w = args.weight.add((run.panel_tile * (K / 4) + run.tile) * S::LANES * 4);
        let x = args.x.q.add(row * int8_stride(K));
        let mut acc = [[S::zero(); C]; R];
        let mut group = 0;
        while group < K / GROUP {
            let mut sums = [[S::zero_i32(); C]; R];
            let mut r = 0;
            while r < R {
                let sum = *args.x.sums.add((row + r) * (K / GROUP) + group);
                sums[r] = [S::splat_i32(-S::DOT_I8_BIAS * sum); C];
                r += 1;
            }
            let mut k = group * GROUP;
            while k < (group + 1) * GROUP {
                let mut line = 0;
                while line < UNROLL {
                    if PREFETCH > 0 {
                        S::prefetch(w.wrapping_add(PREFETCH));
                    }
                    int8_step::<S, K, R, C>(&mut sums, w, x.add(k));
                    w = w.add(stride);
                    k += 4;
                    line += 1;
                }
            }
            let mut r = 0;
            while r < R {
                let scale = S::splat(*args.x.scales.add((row + r) * (K / GROUP) + group));
                let mut c = 0;
                while c < C {
                    acc[r][c] = S::fma(S::to_f32(sums[r][c]), scale, acc[r][c]);
                    c += 1;
                }
                r += 1;
            }
            group += 1;
        }
        let mut c = 0;
        while c < C {
            let scale = S::load(args.scales.add((run.panel_tile + run.tile + c) * S::LANES));
            let mut r = 0;
            while r < R {
                acc[r][c] = S::mul(acc[r][c], scale);
                r += 1;
            }
            c += 1;
        }
        store_block::<S, N, R, C>(&acc, args.bias, row, run, args.out);
    }
}

/// Four inputs of `R` rows by `C` tiles.
#[inline(always)]
unsafe fn int8_step<S: Simd, const K: usize, const R: usize, const C: usize>(
    sums: &mut [[S::I32; C]; R],
    w: *const u8,
    x: *const i8,
) {
    // SAFETY: the caller's rows and weights exist.
    unsafe {
        let mut weight = [S::zero_i32(); C];
        let mut c = 0;
        while c < C {
            weight[c] = S::load_i32(w.add(c * S::LANES * 4));
            c += 1;
        }
        let mut r = 0;
        while r < R {
            let value = S::splat_i32(x.add(r * int8_stride(K)).cast::<i32>().read_unaligned());
            let mut c = 0;
            while c < C {
                sums[r][c] = S::dot_i8(sums[r][c], weight[c], value);
                c += 1;
            }
            r += 1;
        }
    }
}
