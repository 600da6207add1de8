// The frame of the matmuls `out = x · weightᵀ + bias`, whatever form the weights have: how the work
// is cut, the ring of shared memory that weights and rows travel through, and the end of a sum.
//
// Outputs are the 16 rows of an mma, rows of `x` its 8 columns. A warp computes OUT_TILES × 16
// outputs of ROW_TILES × 8 rows; OUT_WARPS × ROW_WARPS warps are a team, which shares a ring of
// STAGES stages of 64 inputs each; K_WARPS teams are a block, SPLITS blocks an output tile.
//
// K is cut into SLICES slices, whose sums are added up in their order, so that kernels of one linear
// give the same bits for a row whatever their tiles are. Either every team has one slice
// (K_WARPS · SPLITS = SLICES), or one team has all of them (K_WARPS · SPLITS = 1).
//
// `Weights` is how 16 outputs × 64 inputs of weights, a tile, are stored and multiplied:
//   TILE_BYTES, SCALE_BYTES         of a tile, its weights and its scales
//   scales(params, tile, record), scales_at(kb)  where a tile's scales are, and how much further
//                                   those of the kb-th 64 inputs
//   multiply(acc, b, weights, scales, tile)  adds a tile's products to `acc`
// Tiles lie as [N / 64][K / 64][4], N and K rounded up to 64; what is beyond K meets rows of zeros,
// what is beyond N is computed and dropped.
//
// Bound: for few rows the bytes of the weights at the speed of memory, for many the tensor cores.

#pragma once
#include "params.h"
#include "types.cuh"

namespace matmul {

constexpr u32 BLOCK_K = 64;
// Outputs of a tile, and tiles that lie together.
constexpr u32 TILE = 16;
constexpr u32 TILES_PER_BLOCK = 4;
// Bytes of 64 inputs of a row.
constexpr u32 ROW_BYTES = 2 * BLOCK_K;

// B fragments of 8 rows × 64 inputs: [k16][register].
using RowFragments = u32[BLOCK_K / 16][2];
// Sums of 16 outputs × 8 rows.
using Sums = float[4];

// Stores `value`, of a Rows type or float32, as one element.
template <class T> DEVICE void store_element(void* out, u64 idx, float value) {
    ptx::store(static_cast<u16*>(out) + idx, T::narrow(value));
}
template <> DEVICE void store_element<F32>(void* out, u64 idx, float value) {
    ptx::store(static_cast<float*>(out) + idx, value);
}

// Stores four elements at an index that is a multiple of 4.
template <class T> DEVICE void store_four(void* out, u64 idx, const float (&v)[4]) {
    u32x2 pairs{T::pack(v[0], v[1]), T::pack(v[2], v[3])};
    ptx::store(reinterpret_cast<u32x2*>(static_cast<u16*>(out) + idx), pairs);
}
template <> DEVICE void store_four<F32>(void* out, u64 idx, const float (&v)[4]) {
    u32x4 bits{ptx::as_bits(v[0]), ptx::as_bits(v[1]), ptx::as_bits(v[2]), ptx::as_bits(v[3])};
    ptx::store(reinterpret_cast<u32x4*>(static_cast<float*>(out) + idx), bits);
}

DEVICE void add_four(float (&sum)[4], const u32x4& bits) {
    sum[0] += ptx::as_float(bits.x);
    sum[1] += ptx::as_float(bits.y);
    sum[2] += ptx::as_float(bits.z);
    sum[3] += ptx::as_float(bits.w);
}

// Constants: `Out` (F16, BF16 or F32), N, K, PACKED_K (inputs as packed, see `source_k`), GROUP,
// PACKED_GROUP (both K where groups need no padding), and the tiling: OUT_TILES, ROW_TILES,
// OUT_WARPS, ROW_WARPS, K_WARPS, SPLITS, SLICES, STAGES.
template <class C, class Weights> struct Matmul {
    static constexpr u32 TEAM_THREADS = 32 * C::OUT_WARPS * C::ROW_WARPS;
    static constexpr u32 THREADS = TEAM_THREADS * C::K_WARPS;
    static constexpr u32 BLOCK_OUTS = TILE * C::OUT_TILES * C::OUT_WARPS;
    static constexpr u32 BLOCK_ROWS = 8 * C::ROW_TILES * C::ROW_WARPS;
    static constexpr u32 NUM_OUT_BLOCKS = div_up(C::N, BLOCK_OUTS);
    static constexpr u32 NUM_TILES = round_up(C::N, 64) / TILE;
    static constexpr u32 NUM_K_BLOCKS = div_up(C::PACKED_K, BLOCK_K);
    static constexpr u32 NUM_PARTS = C::K_WARPS * C::SPLITS;
    static_assert(NUM_PARTS == 1 || NUM_PARTS == C::SLICES, "a team has one slice or all");
    static_assert(C::SLICES <= NUM_K_BLOCKS, "no slice is empty");
    static_assert(C::STAGES >= 2, "a stage is filled while another is read");

    // Shared memory: the teams' rings, each stage [rows][weights][scales]; after the main loop
    // sums as [slice of the block][row][output].
    static constexpr u32 X_BYTES = BLOCK_ROWS * ROW_BYTES;
    static constexpr u32 BLOCK_TILES = BLOCK_OUTS / TILE;
    static constexpr u32 WEIGHT_BYTES = BLOCK_TILES * Weights::TILE_BYTES;
    static constexpr u32 STAGE_BYTES =
        round_up(X_BYTES + WEIGHT_BYTES + BLOCK_TILES * Weights::SCALE_BYTES, 128);
    // NOTE: 4 floats of padding put the two rows and eight outputs that a warp's threads store at
    // once into different banks.
    static constexpr u32 SUM_STRIDE = BLOCK_OUTS + 4;
    // Bytes from a tile to that of the next 64 inputs.
    static constexpr u32 K_STRIDE = TILES_PER_BLOCK * Weights::TILE_BYTES;
    static constexpr u32 TILE_CHUNKS = Weights::TILE_BYTES / 16;
    static constexpr u32 NUM_CHUNKS = BLOCK_TILES * TILE_CHUNKS;
    static constexpr u32 WEIGHT_COPIES = div_up(NUM_CHUNKS, TEAM_THREADS);
    static constexpr u32 NUM_SCALE_COPIES =
        div_up(BLOCK_TILES * Weights::SCALE_BYTES / 16, TEAM_THREADS);
    static constexpr u32 RING_BYTES = C::K_WARPS * C::STAGES * STAGE_BYTES;
    static constexpr u32 SUM_BYTES = C::K_WARPS * BLOCK_ROWS * SUM_STRIDE * 4;
    static_assert(max_of(RING_BYTES, SUM_BYTES) <= C::SHARED_BYTES, "the generator's sum is off");

    // Blocks: x counts blocks of rows, y splits and, slower, blocks of outputs.
    DEVICE static void run(const LinearParams& params) {
        Matmul self(params);
        self.main_loop();
        ptx::grid_launch_dependents();
        self.finish();
    }

private:
    const LinearParams& params;
    u32 first_row, out_block, split;
    u32 team, thread, out_warp, row_warp;
    u32 ring;
    // Where the thread's copies come from, at the first 64 inputs.
    const u8* weight_from[WEIGHT_COPIES];
    const u8* scales_from[max_of(NUM_SCALE_COPIES, 1u)];
    // A sum of a slice, and of all slices before it where the team has all.
    Sums acc[C::OUT_TILES][C::ROW_TILES];
    Sums total[C::OUT_TILES][C::ROW_TILES];

    DEVICE explicit Matmul(const LinearParams& p) : params(p) {
        u32 warp = ptx::warp_idx();
        first_row = ptx::block_idx() * BLOCK_ROWS;
        out_block = ptx::block_idx_y() / C::SPLITS;
        split = ptx::block_idx_y() % C::SPLITS;
        team = warp / (C::OUT_WARPS * C::ROW_WARPS);
        thread = ptx::thread_idx() - team * TEAM_THREADS;
        out_warp = warp % C::OUT_WARPS;
        row_warp = warp / C::OUT_WARPS % C::ROW_WARPS;
        ring = ptx::shared_base() + team * (C::STAGES * STAGE_BYTES);
        find_weights();
    }

    // First block of 64 inputs of a slice.
    DEVICE static constexpr u32 slice_start(u32 slice) {
        return slice * NUM_K_BLOCKS / C::SLICES;
    }

    // --- main loop ---

    DEVICE void main_loop() {
        constexpr bool ALL = NUM_PARTS == 1;
        u32 slice = ALL ? 0 : split * C::K_WARPS + team;
        u32 begin = slice_start(slice), end = ALL ? NUM_K_BLOCKS : slice_start(slice + 1);
        clear(acc);
        clear(total);
        fill_ring(begin, end);
        u32 stage = 0, filled = C::STAGES - 1, slice_end = slice_start(slice + 1);
        NO_UNROLL
        for (u32 kb = begin; kb < end; kb++) {
            ptx::cp_async_wait<C::STAGES - 2>();
            // NOTE: makes the copies of the team's other threads visible, and says that they have
            // read the stage that is filled next.
            team_sync();
            if (kb + C::STAGES - 1 < end) {
                copy_weights(filled, kb + C::STAGES - 1);
                copy_rows(filled, kb + C::STAGES - 1);
            }
            ptx::cp_async_commit();
            multiply(ring + stage * STAGE_BYTES);
            stage = stage + 1 == C::STAGES ? 0 : stage + 1;
            filled = filled + 1 == C::STAGES ? 0 : filled + 1;
            if constexpr (ALL && C::SLICES > 1) {
                if (kb + 1 == slice_end) {
                    slice++;
                    slice_end = slice_start(slice + 1);
                    add_slice();
                }
            }
        }
        ptx::cp_async_wait<0>();
    }

    // Weights do not depend on the kernel before, rows do.
    DEVICE void fill_ring(u32 begin, u32 end) {
        UNROLL
        for (u32 i = 0; i < C::STAGES - 1; i++) {
            if (begin + i < end) copy_weights(i, begin + i);
        }
        ptx::grid_wait();
        UNROLL
        for (u32 i = 0; i < C::STAGES - 1; i++) {
            if (begin + i < end) copy_rows(i, begin + i);
            ptx::cp_async_commit();
        }
    }

    DEVICE void team_sync() {
        if constexpr (TEAM_THREADS == 32) {
            ptx::warp_sync();
        } else if constexpr (C::K_WARPS == 1) {
            ptx::block_sync();
        } else {
            ptx::barrier_sync(1 + team, TEAM_THREADS);
        }
    }

    DEVICE void multiply(u32 stage) {
        RowFragments b[C::ROW_TILES];
        UNROLL
        for (u32 i = 0; i < C::ROW_TILES; i++) {
            load_fragments(b[i], stage + (row_warp * C::ROW_TILES + i) * 8 * ROW_BYTES);
        }
        u32 weights = stage + X_BYTES, scales = weights + WEIGHT_BYTES;
        UNROLL
        for (u32 i = 0; i < C::OUT_TILES; i++) {
            u32 tile = out_warp * C::OUT_TILES + i;
            Weights::template multiply<BLOCK_TILES>(acc[i], b, weights, scales, tile);
        }
    }

    // Lane i addresses 8 inputs, number i / 8, of row i % 8; the second half is 64 bytes away.
    DEVICE static void load_fragments(RowFragments& b, u32 rows) {
        u32 lane = ptx::lane_idx(), row = lane % 8;
        u32 offset = row * ROW_BYTES + ((lane / 8 ^ row) * 16);
        UNROLL
        for (u32 half = 0; half < 2; half++) {
            u32 d[4];
            ptx::ldmatrix_x4(d, rows + (offset ^ half * 64));
            b[2 * half][0] = d[0];
            b[2 * half][1] = d[1];
            b[2 * half + 1][0] = d[2];
            b[2 * half + 1][1] = d[3];
        }
    }

    DEVICE static void clear(Sums (&sums)[C::OUT_TILES][C::ROW_TILES]) {
        UNROLL
        for (u32 i = 0; i < C::OUT_TILES; i++) {
            UNROLL
            for (u32 j = 0; j < C::ROW_TILES; j++) {
                UNROLL
                for (u32 r = 0; r < 4; r++) sums[i][j][r] = 0.0f;
            }
        }
    }

    DEVICE void add_slice() {
        UNROLL
        for (u32 i = 0; i < C::OUT_TILES; i++) {
            UNROLL
            for (u32 j = 0; j < C::ROW_TILES; j++) {
                UNROLL
                for (u32 r = 0; r < 4; r++) total[i][j][r] += acc[i][j][r];
            }
        }
        clear(acc);
    }

    // --- copies to shared memory, 16 bytes a thread ---

    DEVICE void find_weights() {
        const u8* source = static_cast<const u8*>(params.weight);
        UNROLL
        for (u32 i = 0; i < WEIGHT_COPIES; i++) {
            u32 chunk = i * TEAM_THREADS + thread;
            u32 tile = tile_at(chunk / TILE_CHUNKS);
            u64 place = u64(tile / TILES_PER_BLOCK) * NUM_K_BLOCKS * TILES_PER_BLOCK;
            place += tile % TILES_PER_BLOCK;
            weight_from[i] = source + place * Weights::TILE_BYTES + chunk % TILE_CHUNKS * 16;
        }
        if constexpr (NUM_SCALE_COPIES > 0) find_scales();
    }

    DEVICE void find_scales() {
        UNROLL
        for (u32 i = 0; i < NUM_SCALE_COPIES; i++) {
            u32 chunk = i * TEAM_THREADS + thread;
            u32 tile = tile_at(chunk / 4 % BLOCK_TILES);
            scales_from[i] = Weights::scales(params, tile, chunk / (4 * BLOCK_TILES));
            scales_from[i] += chunk % 4 * 16;
        }
    }

    // Tile `i` of the block; the last one where the block is wider than the weights.
    DEVICE u32 tile_at(u32 i) {
        u32 tile = out_block * BLOCK_TILES + i;
        return NUM_TILES % BLOCK_TILES == 0 ? tile : min_of(tile, NUM_TILES - 1);
    }

    DEVICE void copy_weights(u32 stage, u32 kb) {
        u32 to = ring + stage * STAGE_BYTES + X_BYTES + thread * 16;
        UNROLL
        for (u32 i = 0; i < WEIGHT_COPIES; i++) {
            u32 chunk = i * TEAM_THREADS + thread;
            if ((i + 1) * TEAM_THREADS > NUM_CHUNKS && chunk >= NUM_CHUNKS) break;
            ptx::cp_async_16(to + i * TEAM_THREADS * 16, weight_from[i] + u64(kb) * K_STRIDE);
        }
        if constexpr (NUM_SCALE_COPIES > 0) copy_scales(to + WEIGHT_BYTES, Weights::scales_at(kb));
    }

    DEVICE void copy_scales(u32 to, u32 at) {
        constexpr u32 CHUNKS = BLOCK_TILES * Weights::SCALE_BYTES / 16;
        UNROLL
        for (u32 i = 0; i < NUM_SCALE_COPIES; i++) {
            if ((i + 1) * TEAM_THREADS > CHUNKS && i * TEAM_THREADS + thread >= CHUNKS) break;
            ptx::cp_async_16(to + i * TEAM_THREADS * 16, scales_from[i] + at);
        }
    }

    // Rows lie [row][8 chunks], chunk c in place c ^ row % 8, so that ldmatrix meets every bank
    // once. Rows and inputs that do not exist become zero.
    DEVICE void copy_rows(u32 stage, u32 kb) {
        constexpr u32 CHUNKS = BLOCK_ROWS * 8;
        u32 place = thread / 8 * ROW_BYTES + (thread % 8 ^ thread / 8 % 8) * 16;
        u32 to = ring + stage * STAGE_BYTES;
        u32 k = source_k(kb * BLOCK_K + thread % 8 * 8);
        UNROLL
        for (u32 i = 0; i < CHUNKS; i += TEAM_THREADS) {
            if (i + TEAM_THREADS > CHUNKS && i + thread >= CHUNKS) break;
            // NOTE: 32 threads are 4 rows, so that the place changes by 0 or 4 chunks.
            u32 at = (place ^ i / 8 % 8 * 16) + i / 8 * ROW_BYTES;
            copy_chunk(to + at, first_row + (i + thread) / 8, k);
        }
    }

    // The input that is packed at `k`, a multiple of 8; K where there is none. Groups that are no
    // multiple of 16 are packed with room behind them up to the next.
    DEVICE static u32 source_k(u32 k) {
        if constexpr (C::GROUP == C::PACKED_GROUP) return k;
        u32 place = k % C::PACKED_GROUP;
        return place < C::GROUP ? k / C::PACKED_GROUP * C::GROUP + place : C::K;
    }

    DEVICE void copy_chunk(u32 to, u32 row, u32 k) {
        constexpr bool TAIL = C::K % BLOCK_K != 0 || C::GROUP != C::PACKED_GROUP;
        bool exists = row < params.num_rows;
        const u16* x = static_cast<const u16*>(params.x) + u64(exists ? row : 0) * C::K;
        if constexpr (C::K % 8 == 0) {
            if constexpr (TAIL) exists = exists && k < C::K;
            ptx::cp_async_16(to, x + (TAIL && k >= C::K ? 0 : k), exists ? 16 : 0);
        } else {
            static_assert(C::K % 2 == 0, "rows are copied by 4 bytes or 16");
            UNROLL
            for (u32 i = 0; i < 8; i += 2) {
                bool pair = exists && k + i < C::K;
                ptx::cp_async_4(to + 2 * i, pair ? x + k + i : x, pair ? 4 : 0);
            }
        }
    }

    // --- the end of the sums ---

    static constexpr u32 QUADS = BLOCK_OUTS / 4;

    DEVICE void finish() {
        // NOTE: the ring becomes the place of the sums when all have read it.
        ptx::block_sync();
        store_sums();
        ptx::block_sync();
        if constexpr (C::SPLITS > 1) {
            if (!last_of_splits()) return;
        }
        u32 num_rows = min_of(params.num_rows - first_row, BLOCK_ROWS);
        for (u32 i = ptx::thread_idx(); i < num_rows * QUADS; i += THREADS) {
            u32 row = i / QUADS, out = i % QUADS * 4;
            float sum[4] = {};
            UNROLL
            for (u32 part = 0; part < NUM_PARTS; part++) {
                add_four(sum, C::SPLITS > 1 ? ptx::load(workspace(part, row, out))
                                            : ptx::load_shared<u32x4>(sum_at(part, row, out)));
            }
            store_outputs(sum, row, out);
        }
    }

    DEVICE static u32 sum_at(u32 part, u32 row, u32 out) {
        return ptx::shared_base() + ((part * BLOCK_ROWS + row) * SUM_STRIDE + out) * 4;
    }

    DEVICE void store_sums() {
        u32 lane = ptx::lane_idx();
        UNROLL
        for (u32 i = 0; i < C::OUT_TILES; i++) {
            UNROLL
            for (u32 j = 0; j < C::ROW_TILES; j++) {
                u32 out = (out_warp * C::OUT_TILES + i) * TILE + lane / 4;
                u32 row = (row_warp * C::ROW_TILES + j) * 8 + lane % 4 * 2;
                const Sums& sums = NUM_PARTS == 1 && C::SLICES > 1 ? total[i][j] : acc[i][j];
                UNROLL
                for (u32 r = 0; r < 4; r++) {
                    ptx::store_shared(sum_at(team, row + r % 2, out + r / 2 * 8), sums[r]);
                }
            }
        }
    }

    DEVICE u32 output_tile() { return ptx::block_idx() * NUM_OUT_BLOCKS + out_block; }

    // Workspace: [output tile][slice][row][output].
    DEVICE u32x4* workspace(u32 part, u32 row, u32 out) {
        u64 place = (u64(output_tile()) * C::SLICES + part) * BLOCK_ROWS + row;
        return reinterpret_cast<u32x4*>(params.workspace + place * BLOCK_OUTS + out);
    }

    // Hands the block's sums to the last block of the output tile, and says whether this is it.
    DEVICE bool last_of_splits() {
        u32 num_rows = min_of(params.num_rows - first_row, BLOCK_ROWS);
        UNROLL
        for (u32 part = 0; part < C::K_WARPS; part++) {
            for (u32 i = ptx::thread_idx(); i < num_rows * QUADS; i += THREADS) {
                u32 row = i / QUADS, out = i % QUADS * 4;
                ptx::store(workspace(split * C::K_WARPS + part, row, out),
                           ptx::load_shared<u32x4>(sum_at(part, row, out)));
            }
        }
        // NOTE: every thread's stores come before the count, and the count before the loads.
        ptx::fence_device();
        ptx::block_sync();
        if (ptx::thread_idx() == 0) {
            u32 arrived = ptx::atomic_add(params.counters + output_tile(), 1);
            if (arrived == C::SPLITS - 1) ptx::store(params.counters + output_tile(), 0u);
            ptx::fence_device();
            ptx::store_shared(ptx::shared_base(), arrived);
        }
        ptx::block_sync();
        return ptx::load_shared<u32>(ptx::shared_base()) == C::SPLITS - 1;
    }

    DEVICE void store_outputs(float (&sum)[4], u32 row, u32 block_out) {
        u32 out = out_block * BLOCK_OUTS + block_out;
        u64 at = u64(first_row + row) * C::N + out;
        if (C::N % BLOCK_OUTS != 0 && out >= C::N) return;
        UNROLL
        for (u32 i = 0; i < 4; i++) {
            if (C::N % 4 != 0 && out + i >= C::N) break;
            if (params.bias != nullptr) sum[i] += ptx::load_constant(params.bias + out + i);
            if constexpr (C::N % 4 != 0) store_element<typename C::Out>(params.out, at + i, sum[i]);
        }
        if constexpr (C::N % 4 == 0) store_four<typename C::Out>(params.out, at, sum);
    }
};

}  // namespace matmul
