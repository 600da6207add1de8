// Causal attention over KV pages: `Decode` for single rows, split over the keys, and `Prefill` for
// runs of rows. Out^T = V^T · softmax(K · Q^T): keys and values are the 16-row operand of the
// tensor core, straight from the cells of `pages.cuh`, query heads of a KV head (of several rows in
// prefill) its 8 columns.
//
// Reduction order, the same in both kernels, at absolute positions of the keys:
//
//   score        one chain of m16n8k16 over the dimensions
//   block        64 keys: maximum, rounded to an integer, of scores in powers of two; probabilities
//                relative to it; outputs are one chain of m16n8k16 over the keys
//   chunk        CHUNK keys: blocks are added in order
//   row          chunks are added in order
//
// Rounded maxima make every change of scale a power of two, which changes no bit. So a row has the
// same bits in decode and in prefill, alone and in any batch, and however its prompt was cut into
// steps, as far as nothing underflows.
//
// Bound: decode reads the pages once, at the speed of memory; prefill does 4 · head_dim operations
// for each row, head and visible key, at the rate of mma.sync.

#pragma once
#include "pages.cuh"
#include "params.h"
#include "types.cuh"

namespace paged_attention {

constexpr u32 BLOCK = 64;          // keys of a block
constexpr float MASKED = -3.0e38f;  // score of a key that a row does not see
constexpr float NO_MAX = -1.0e30f;  // maximum of no keys: above MASKED, below any score
constexpr float LOG2_E = 1.44269504f;

// 2^n for integers n up to 0, and 0 where that is not a normal number.
DEVICE float exp2_integer(float n) {
    return ptx::as_float(u32(ptx::cvt_rni_s32(ptx::max(n, -127.0f)) + 127) << 23);
}

// The largest power of two up to x, and its inverse.
DEVICE void split_exponent(float x, float& power, float& inverse) {
    u32 exponent = ptx::as_bits(x) >> 23;
    power = ptx::as_float(exponent << 23);
    inverse = ptx::as_float(min_of(254 - exponent, 253u) << 23);
}

// Keys [begin, end).
struct Keys {
    u32 begin, end;
};

// What one block of a grid works on: rows of an item, and query heads of a KV head.
struct Work {
    AttentionItem item;
    u32 first_page;  // index into the page table
    u32 first_end;   // end of the keys that the item's first row sees
    u32 kv_head;
    u32 first_head;  // of the KV head's group
};

// What both kernels do with the columns of one warp, NT tiles of 8. Column c of a block of the grid
// is head c % HEADS_TILE of row c / HEADS_TILE of its work.
//
// Constants: `Rows` (F16 or BF16), `Kv`, `HEADS`, `KV_HEADS`, `HEAD_DIM`, `WINDOW` (0: none),
// `PAGE`, `CHUNK`, `HEADS_TILE`, `NT`, `WARPS`, `STAGES`.
template <class C> struct Columns {
    using Rows = typename C::Rows;
    using Kv = typename C::Kv;
    using Mma = typename Kv::Mma;
    using Layout = pages::Layout<C>;
    static constexpr u32 NT = C::NT;
    static constexpr u32 CELLS = Layout::CELLS;
    static constexpr u32 PIECES = Layout::PIECES;
    static constexpr bool QUANTIZED = Layout::QUANTIZED;
    static constexpr u32 GROUP = C::HEADS / C::KV_HEADS;
    static constexpr u32 HEAD_TILES = div_up(GROUP, C::HEADS_TILE);
    static constexpr u32 ROW = (C::HEADS + 2 * C::KV_HEADS) * C::HEAD_DIM;
    static constexpr u32 FRAGMENT_BYTES = PIECES * 512;  // of a warp: 32 keys × 32 dimensions
    static_assert(C::HEADS % C::KV_HEADS == 0 && C::CHUNK % BLOCK == 0, "whole groups and blocks");

    // --- what a column is ---------------------------------------------------------------------

    DEVICE static Work work(const PagedAttentionParams& params, u32 idx) {
        Work work;
        AttentionSpan span;
        load_words(params.items + idx / (C::KV_HEADS * HEAD_TILES), work.item);
        load_words(params.spans + work.item.span, span);
        work.first_page = span.first_page;
        work.first_end =
            span.context_len - span.num_rows + work.item.first_row - span.first_row + 1;
        work.kv_head = idx / HEAD_TILES % C::KV_HEADS;
        work.first_head = idx % HEAD_TILES * C::HEADS_TILE;
        return work;
    }

    template <class T> DEVICE static void load_words(const T* from, T& to) {
        UNROLL for (u32 i = 0; i < sizeof(T) / 4; i++) {
            reinterpret_cast<u32*>(&to)[i] = ptx::load(reinterpret_cast<const u32*>(from) + i);
        }
    }

    DEVICE static u32 head(const Work& work, u32 column) {
        return work.first_head + column % C::HEADS_TILE;
    }

    DEVICE static bool is_used(const Work& work, u32 column) {
        return row(column) < work.item.num_rows && head(work, column) < GROUP;
    }

    // The row of the item.
    DEVICE static u32 row(u32 column) { return column / C::HEADS_TILE; }

    // The keys that a row of the item sees.
    DEVICE static Keys visible(const Work& work, u32 row) {
        u32 end = work.first_end + row;
        return {C::WINDOW > 0 && end > C::WINDOW ? end - C::WINDOW : 0, end};
    }

    // --- queries --------------------------------------------------------------------------------

    // Lane 4g + t: dimensions 8t .. 8t + 8 of every 32 of column g of each tile; what is beyond the
    // head, and unused columns, are zero.
    DEVICE static void load_queries(const PagedAttentionParams& params, const Work& work,
                                    u32 first_column, u32 (&q)[CELLS][NT][4]) {
        UNROLL for (u32 nt = 0; nt < NT; nt++) {
            u32 column = first_column + nt * 8 + ptx::lane_idx() / 4;
            bool used = is_used(work, column);
            u32 query_head = work.kv_head * GROUP + head(work, column);
            u64 at = u64(work.item.first_row + row(column)) * ROW + query_head * C::HEAD_DIM;
            UNROLL for (u32 cell = 0; cell < CELLS; cell++) {
                u32 dim = cell * 32 + ptx::lane_idx() % 4 * 8;
                u32x4 x = {0, 0, 0, 0};
                if (used && dim < C::HEAD_DIM) {
                    const u16* qkv = static_cast<const u16*>(params.qkv);
                    x = ptx::load(reinterpret_cast<const u32x4*>(qkv + at + dim));
                }
                q[cell][nt][0] = convert(x.x), q[cell][nt][1] = convert(x.y);
                q[cell][nt][2] = convert(x.z), q[cell][nt][3] = convert(x.w);
            }
        }
    }

    // A pair of the rows' type as the type that is multiplied.
    DEVICE static u32 convert(u32 pair) {
        if constexpr (__is_same(Rows, Mma)) {
            return pair;
        } else {
            return Mma::pack(clamp(Rows::first(pair)), clamp(Rows::second(pair)));
        }
    }

    DEVICE static float clamp(float x) { return ptx::max(ptx::min(x, 65504.0f), -65504.0f); }

    // Sums of queries, which the centers of keys are multiplied with.
    DEVICE static void sum_queries(const u32 (&q)[CELLS][NT][4], float (&sums)[NT][2]) {
        const u32 one = Mma::pack(1.0f, 1.0f);
        const u32 ones[4] = {one, one, one, one};
        UNROLL for (u32 nt = 0; nt < NT; nt++) {
            float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            UNROLL for (u32 cell = 0; cell < CELLS; cell++) {
                const u32 low[2] = {q[cell][nt][0], q[cell][nt][1]};
                const u32 high[2] = {q[cell][nt][2], q[cell][nt][3]};
                Mma::mma(d, ones, low);
                Mma::mma(d, ones, high);
            }
            sums[nt][0] = d[0], sums[nt][1] = d[1];
        }
    }

    // --- where keys and values lie -------------------------------------------------------------

    // Lane i % 8 gets the page of octet i of the block; what no row sees is replaced by an octet
    // that some row sees.
    DEVICE static u32 load_pages(const PagedAttentionParams& params, const Work& work, u32 block,
                                 Keys keys) {
        u32 octet = clamp_octet(block, ptx::lane_idx() % 8, keys);
        return ptx::load(params.page_table + work.first_page + octet * 8 / C::PAGE);
    }

    DEVICE static u32 clamp_octet(u32 block, u32 octet, Keys keys) {
        return max_of(min_of(block / 8 + octet, (keys.end - 1) / 8), keys.begin / 8);
    }

    // The head's block of the page of an octet, and the octet's place in the page.
    struct Octet {
        const u8* head;
        u32 idx;
    };

    DEVICE static Octet octet(const PagedAttentionParams& params, const Work& work, u32 block,
                              u32 pages, u32 octet, Keys keys) {
        u32 page = ptx::shfl(pages, octet);
        const u8* cache = static_cast<const u8*>(params.kv_cache);
        return {cache + Layout::head_offset(page, work.kv_head),
                clamp_octet(block, octet, keys) % (C::PAGE / 8)};
    }

    // Where a lane's part of the cells of 32 keys starts; cells and pieces follow every 128 bytes.
    DEVICE static const u8* k_cells(const Octet& octet) {
        return octet.head + octet.idx * Layout::OCTET_BYTES + ptx::lane_idx() % 8 * 16;
    }

    DEVICE static const u8* v_cells(const Octet& octet) {
        return octet.head + Layout::V_OFFSET + octet.idx * Layout::OCTET_BYTES +
               ptx::lane_idx() / 4 * 16;
    }

    // The octets that a lane reads of 32 keys.
    DEVICE static u32 k_octet(u32 half) { return half * 4 + ptx::lane_idx() / 8; }
    DEVICE static u32 v_octet(u32 half) { return half * 4 + ptx::lane_idx() % 4; }

    // Key (mt, h) of 32: a lane's rows of tile `mt` are the keys with h = 0 and 1.
    DEVICE static u32 key(u32 half, u32 mt, u32 h) {
        u32 lane = ptx::lane_idx();
        return half * 32 + lane / 8 * 8 + lane / 4 % 2 + mt * 4 + h * 2;
    }

    // --- scores -------------------------------------------------------------------------------

    using Scores = float[2][2][NT][4];
    using Probabilities = u32[2][2][NT][2];

    DEVICE static void read_fragment(u32 address, u32x4 (&pieces)[PIECES]) {
        UNROLL for (u32 i = 0; i < PIECES; i++) {
            pieces[i] = ptx::load_shared<u32x4>(address + i * 512 + ptx::lane_idx() * 16);
        }
    }

    // The part of a tile of 16 rows that is multiplied with inner indices 16 ks and on.
    DEVICE static void operand(const u32 (&x)[2][4], u32 ks, u32 (&a)[4]) {
        a[0] = x[0][2 * ks], a[1] = x[1][2 * ks];
        a[2] = x[0][2 * ks + 1], a[3] = x[1][2 * ks + 1];
    }

    // Adds 32 dimensions of 32 keys.
    DEVICE static void add_scores(u32 address, const u32 (&q)[NT][4], float (&s)[2][NT][4]) {
        u32x4 pieces[PIECES];
        read_fragment(address, pieces);
        UNROLL for (u32 mt = 0; mt < 2; mt++) {
            u32 k[2][4];
            Kv::unpack_k(mt, pieces, k);
            UNROLL for (u32 ks = 0; ks < 2; ks++) {
                u32 a[4];
                operand(k, ks, a);
                UNROLL for (u32 nt = 0; nt < NT; nt++) {
                    const u32 b[2] = {q[nt][2 * ks], q[nt][2 * ks + 1]};
                    Mma::mma(s[mt][nt], a, b);
                }
            }
        }
    }

    // Scales and minima of a lane's keys, in the order of 2 mt + h.
    struct Params {
        u32x4 half[2];
        DEVICE u32 pair(u32 s, u32 mt, u32 h) const {
            return mt == 0 ? (h == 0 ? half[s].x : half[s].y) : (h == 0 ? half[s].z : half[s].w);
        }
        DEVICE float scale(u32 s, u32 mt, u32 h) const { return F16::first(pair(s, mt, h)); }
        // The value of level CENTER.
        DEVICE float center(u32 s, u32 mt, u32 h) const {
            return ptx::fma(scale(s, mt, h), float(Kv::CENTER), F16::second(pair(s, mt, h)));
        }
        DEVICE void clear(u32 s, u32 mt, u32 h) {
            u32& x = mt == 0 ? (h == 0 ? half[s].x : half[s].y) : (h == 0 ? half[s].z : half[s].w);
            x = 0;
        }
    };

    // Scores of levels to scores of keys.
    DEVICE static void scale_scores(const Params& k, const float (&q_sums)[NT][2], Scores& s) {
        UNROLL for (u32 i = 0; i < 8; i++) {
            u32 half = i / 4, mt = i / 2 % 2, h = i % 2;
            float scale = k.scale(half, mt, h), center = k.center(half, mt, h);
            UNROLL for (u32 nt = 0; nt < NT; nt++) {
                UNROLL for (u32 e = 0; e < 2; e++) {
                    float& x = s[half][mt][nt][2 * h + e];
                    x = ptx::fma(x, scale, center * q_sums[nt][e]);
                }
            }
        }
    }

    // Scores of keys that a column does not see, and V parameters of keys that no column sees,
    // which may hold anything.
    DEVICE static void mask(const Work& work, u32 first_column, u32 block, Keys keys, Params& v,
                            Scores& s) {
        UNROLL for (u32 i = 0; i < 8; i++) {
            u32 half = i / 4, mt = i / 2 % 2, h = i % 2;
            u32 at = block + key(half, mt, h);
            if constexpr (QUANTIZED) {
                if (at < keys.begin || at >= keys.end) {
                    v.clear(half, mt, h);
                }
            }
            UNROLL for (u32 nt = 0; nt < NT; nt++) {
                UNROLL for (u32 e = 0; e < 2; e++) {
                    u32 column = first_column + nt * 8 + ptx::lane_idx() % 4 * 2 + e;
                    Keys seen = visible(work, row(column));
                    float& x = s[half][mt][nt][2 * h + e];
                    x = at >= seen.begin && at < seen.end ? x : MASKED;
                }
            }
        }
    }

    // --- sums -----------------------------------------------------------------------------------

    // Of a lane's columns 2t, 2t + 1 of each tile.
    struct Stats {
        float max[NT][2];    // an integer; sums are relative to 2^max
        float sum[NT][2];    // of probabilities
        float center[NT][2]; // of probabilities · centers of V
    };

    // Sums of probability · value: dimensions 16 d + g and + 8, columns 2t and 2t + 1 as in `mma`.
    struct State {
        Stats stats;
        float o[2 * CELLS][NT][4];
    };

    DEVICE static void clear(State& state) {
        UNROLL for (u32 nt = 0; nt < NT; nt++) {
            UNROLL for (u32 e = 0; e < 2; e++) {
                state.stats.max[nt][e] = NO_MAX;
                state.stats.sum[nt][e] = state.stats.center[nt][e] = 0.0f;
            }
            UNROLL for (u32 i = 0; i < 8 * CELLS; i++) {
                state.o[i / 4][nt][i % 4] = 0.0f;
            }
        }
    }

    // Over the lanes that hold a column.
    template <class F> DEVICE static float reduce(float x, F combine) {
        x = combine(x, ptx::shfl_xor(x, 4));
        x = combine(x, ptx::shfl_xor(x, 8));
        return combine(x, ptx::shfl_xor(x, 16));
    }
    struct Max {
        DEVICE float operator()(float a, float b) const { return ptx::max(a, b); }
    };
    struct Add {
        DEVICE float operator()(float a, float b) const { return a + b; }
    };

    // Scores of a block to probabilities as the operand of the second product. `powers` is what the
    // block's outputs are to be multiplied with: probabilities are multiplied by scales of V, and
    // brought back to a range in which 16 bits are precise.
    DEVICE static void softmax(float scale, const Params& v, Scores& s, Stats& block,
                               float (&powers)[NT][2], Probabilities& p) {
        UNROLL for (u32 nt = 0; nt < NT; nt++) {
            float inverses[2];
            UNROLL for (u32 e = 0; e < 2; e++) {
                inverses[e] = softmax_column(scale, v, nt, e, s, block, powers[nt][e]);
            }
            UNROLL for (u32 i = 0; i < 8; i++) {
                u32 half = i / 4, mt = i / 2 % 2, h = i % 2;
                const float(&x)[4] = s[half][mt][nt];
                u32 pair;
                if constexpr (QUANTIZED) {
                    pair = Mma::pack(x[2 * h] * inverses[0], x[2 * h + 1] * inverses[1]);
                } else {
                    pair = Mma::pack(x[2 * h], x[2 * h + 1]);
                }
                p[half][mt][nt][h] = ptx::movmatrix_trans(pair);
            }
        }
    }

    // Returns the factor that is still to be applied to the probabilities.
    DEVICE static float softmax_column(float scale, const Params& v, u32 nt, u32 e, Scores& s,
                                       Stats& block, float& power) {
        float max = MASKED;
        UNROLL for (u32 i = 0; i < 8; i++) {
            max = ptx::max(max, s[i / 4][i / 2 % 2][nt][i % 2 * 2 + e]);
        }
        max = ptx::max(ptx::cvt_rni_f32(reduce(max, Max()) * scale), NO_MAX);
        float sum = 0.0f, center = 0.0f, largest = 0.0f;
        UNROLL for (u32 i = 0; i < 8; i++) {
            float& x = s[i / 4][i / 2 % 2][nt][i % 2 * 2 + e];
            x = ptx::ex2(ptx::fma(x, scale, -max));
            sum += x;
            if constexpr (QUANTIZED) {
                center = ptx::fma(x, v.center(i / 4, i / 2 % 2, i % 2), center);
                x *= v.scale(i / 4, i / 2 % 2, i % 2);
                largest = ptx::max(largest, x);
            }
        }
        block.max[nt][e] = max;
        block.sum[nt][e] = reduce(sum, Add());
        float inverse = 1.0f;
        power = 1.0f;
        if constexpr (QUANTIZED) {
            block.center[nt][e] = reduce(center, Add());
            split_exponent(reduce(largest, Max()), power, inverse);
        }
        return inverse;
    }

    // Prepares the state for a summand: raises its maxima to the summand's where these are larger.
    // Returns in `factors` what the summand's values are to be multiplied with.
    DEVICE static void raise(const Stats& summand, State& state, float (&factors)[NT][2]) {
        bool grows = false;
        UNROLL for (u32 i = 0; i < 2 * NT; i++) {
            grows |= summand.max[i / 2][i % 2] > state.stats.max[i / 2][i % 2];
        }
        if (ptx::any(grows)) {
            UNROLL for (u32 i = 0; i < 2 * NT; i++) {
                float& max = state.stats.max[i / 2][i % 2];
                float larger = ptx::max(max, summand.max[i / 2][i % 2]);
                factors[i / 2][i % 2] = exp2_integer(max - larger);
                max = larger;
            }
            multiply(factors, state);
        }
        UNROLL for (u32 i = 0; i < 2 * NT; i++) {
            u32 nt = i / 2, e = i % 2;
            float factor = exp2_integer(summand.max[nt][e] - state.stats.max[nt][e]);
            factors[nt][e] = factor;
            state.stats.sum[nt][e] = ptx::fma(summand.sum[nt][e], factor, state.stats.sum[nt][e]);
            if constexpr (QUANTIZED) {
                state.stats.center[nt][e] =
                    ptx::fma(summand.center[nt][e], factor, state.stats.center[nt][e]);
            }
        }
    }

    DEVICE static void multiply(const float (&factors)[NT][2], State& state) {
        UNROLL for (u32 nt = 0; nt < NT; nt++) {
            UNROLL for (u32 e = 0; e < 2; e++) {
                state.stats.sum[nt][e] *= factors[nt][e];
                if constexpr (QUANTIZED) {
                    state.stats.center[nt][e] *= factors[nt][e];
                }
            }
            UNROLL for (u32 i = 0; i < 8 * CELLS; i++) {
                state.o[i / 4][nt][i % 4] *= factors[nt][i % 2];
            }
        }
    }

    // Adds probability · value of a block for 32 dimensions, whose two fragments lie at `first` and
    // `second`. MASK: some keys of the block are seen by no column.
    template <bool MASK>
    DEVICE static void add_values(u32 first, u32 second, u32 cell, u32 block, Keys keys,
                                  const Probabilities& p, const float (&factors)[NT][2],
                                  State& state) {
        u32x4 pieces[2][PIECES];
        read_fragment(first, pieces[0]);
        read_fragment(second, pieces[1]);
        UNROLL for (u32 mt = 0; mt < 2; mt++) {
            float d[NT][4] = {};
            UNROLL for (u32 i = 0; i < 4; i++) {
                u32 half = i / 2, ks = i % 2, v[2][4], a[4];
                Kv::unpack_v(mt, pieces[half], v);
                if constexpr (MASK && !QUANTIZED) {
                    mask_values(block + v_octet(half) * 8, keys, v);
                }
                operand(v, ks, a);
                UNROLL for (u32 nt = 0; nt < NT; nt++) {
                    Mma::mma(d[nt], a, p[half][ks][nt]);
                }
            }
            UNROLL for (u32 i = 0; i < 4 * NT; i++) {
                float& o = state.o[2 * cell + mt][i / 4][i % 4];
                o = ptx::fma(d[i / 4][i % 4], factors[i / 4][i % 2], o);
            }
        }
    }

    // Zero for keys that no column sees: what lies there may be no number.
    DEVICE static void mask_values(u32 first_key, Keys keys, u32 (&v)[2][4]) {
        UNROLL for (u32 i = 0; i < 4; i++) {
            u32 low = first_key + 2 * i, high = low + 1;
            u32 bits = low >= keys.begin && low < keys.end ? 0x0000ffff : 0;
            bits |= high >= keys.begin && high < keys.end ? 0xffff0000 : 0;
            UNROLL for (u32 j = 0; j < 2; j++) {
                v[j][i] &= bits;
            }
        }
    }
};

// `num_rows` of every item is 1. The four blocks of a chunk go to four warps, each of which streams
// its keys and values through a ring of shared memory that no other thread sees: a lane waits for
// its own copies only. The last block of the grid to finish a row's chunks adds them up.
template <class C> struct Decode : Columns<C> {
    using Base = Columns<C>;
    using Layout = typename Base::Layout;
    using typename Base::Octet;
    using typename Base::Params;
    using typename Base::Probabilities;
    using typename Base::Scores;
    using typename Base::State;
    static constexpr u32 NT = Base::NT;
    static constexpr u32 CELLS = Base::CELLS;
    static constexpr u32 PIECES = Base::PIECES;
    static constexpr bool QUANTIZED = Base::QUANTIZED;
    static constexpr u32 FRAGMENT_BYTES = Base::FRAGMENT_BYTES;
    static constexpr u32 UNITS = 4 * CELLS;  // fragments of a block: half of them keys
    static constexpr u32 STAGES = C::STAGES;
    static constexpr u32 RING_BYTES = STAGES * FRAGMENT_BYTES;  // of a warp
    // Sums of a column in shared memory: 4 more than its dimensions, so that lanes of a warp meet
    // different banks; the statistics lie there.
    static constexpr u32 COLUMN = Layout::DIMS + 4;
    static constexpr u32 SUMS_BYTES = C::WARPS * NT * 8 * COLUMN * 4;
    static constexpr u32 FLAG_OFFSET = max_of(C::WARPS * RING_BYTES, SUMS_BYTES);
    static constexpr u32 SHARED_BYTES = FLAG_OFFSET + 16;
    // float32 values of a part of a row in the workspace, for one KV head and tile of heads.
    static constexpr u32 PART = C::HEADS_TILE * COLUMN;
    static constexpr u32 HEAD_SETS = C::KV_HEADS * Base::HEAD_TILES;
    static_assert(C::WARPS * BLOCK == C::CHUNK, "a block for each warp");
    static_assert(STAGES >= 2 && STAGES <= UNITS, "two fragments of values are read at once");
    static_assert(C::HEADS_TILE <= NT * 8, "a column for each head");

    // A column's sums: lane l holds dimensions l + 32 i.
    struct Column {
        float x[CELLS];
        float max, sum, center;
    };

    DEVICE static void run(const PagedAttentionParams& params) {
        ptx::grid_wait();
        u32 num_works = ptx::load(params.num_items) * HEAD_SETS;
        for (u32 idx = ptx::block_idx(); idx < num_works; idx += ptx::num_blocks()) {
            Work work = Base::work(params, idx);
            attend(params, work);
            ptx::block_sync();
            combine_blocks(params, work);
            if (work.item.num_parts > 1) {
                combine_parts(params, work);
            }
            ptx::block_sync();
        }
        ptx::grid_launch_dependents();
    }

private:
    // --- a block of keys by a warp ---

    DEVICE static void attend(const PagedAttentionParams& params, const Work& work) {
        u32 block = work.item.first_key / C::CHUNK * C::CHUNK + ptx::warp_idx() * BLOCK;
        Keys keys = {max_of(work.item.first_key, block),
                     min_of(work.item.first_key + work.item.num_keys, block + BLOCK)};
        State state;
        if (keys.begin < keys.end) {
            attend_block(params, work, block, keys, state);
        } else {
            Base::clear(state);
        }
        // The ring becomes room for sums.
        ptx::block_sync();
        store_sums(state);
    }

    DEVICE static void attend_block(const PagedAttentionParams& params, const Work& work, u32 block,
                                    Keys keys, State& state) {
        u32 ring = ptx::shared_base() + ptx::warp_idx() * RING_BYTES;
        u32 pages = Base::load_pages(params, work, block, keys);
        const u8* cells[4];  // keys of both halves, values of both halves
        Params k_params, v_params;
        UNROLL for (u32 half = 0; half < 2; half++) {
            Octet octet =
                Base::octet(params, work, block, pages, Base::k_octet(half), keys);
            cells[half] = Base::k_cells(octet);
            load_params(octet, half, k_params, v_params);
            octet = Base::octet(params, work, block, pages, Base::v_octet(half), keys);
            cells[2 + half] = Base::v_cells(octet);
        }
        UNROLL for (u32 unit = 0; unit < STAGES; unit++) {
            copy(unit, ring, cells);
        }
        u32 q[CELLS][NT][4];
        Base::load_queries(params, work, 0, q);
        Scores s = {};
        UNROLL for (u32 unit = 0; unit < UNITS / 2; unit++) {
            ptx::cp_async_wait<STAGES - 1>();
            Base::add_scores(slot(ring, unit), q[unit % CELLS], s[unit / CELLS]);
            copy(unit + STAGES, ring, cells);
        }
        if constexpr (QUANTIZED) {
            float q_sums[NT][2];
            Base::sum_queries(q, q_sums);
            Base::scale_scores(k_params, q_sums, s);
        }
        bool partial = keys.begin > block || keys.end < block + BLOCK;
        if (partial) {
            Base::mask(work, 0, block, keys, v_params, s);
        }
        float powers[NT][2];
        Probabilities p;
        Base::clear(state);
        Base::softmax(params.scale * LOG2_E, v_params, s, state.stats, powers, p);
        if (partial) {
            add_values<true>(ring, cells, block, keys, p, powers, state);
        } else {
            add_values<false>(ring, cells, block, keys, p, powers, state);
        }
    }

    template <bool MASK>
    DEVICE static void add_values(u32 ring, const u8* const (&cells)[4], u32 block, Keys keys,
                                  const Probabilities& p, const float (&powers)[NT][2],
                                  State& state) {
        UNROLL for (u32 cell = 0; cell < CELLS; cell++) {
            u32 unit = UNITS / 2 + 2 * cell;
            ptx::cp_async_wait<STAGES - 2>();
            Base::template add_values<MASK>(slot(ring, unit), slot(ring, unit + 1), cell, block,
                                            keys, p, powers, state);
            copy(unit + STAGES, ring, cells);
            copy(unit + 1 + STAGES, ring, cells);
        }
    }

    DEVICE static u32 slot(u32 ring, u32 unit) { return ring + unit % STAGES * FRAGMENT_BYTES; }

    // A fragment by the warp; closes a group even where there is nothing left to copy.
    DEVICE static void copy(u32 unit, u32 ring, const u8* const (&cells)[4]) {
        if (unit < UNITS) {
            bool is_v = unit >= UNITS / 2;
            u32 i = is_v ? unit - UNITS / 2 : unit;
            u32 half = is_v ? i % 2 : i / CELLS, cell = is_v ? i / 2 : i % CELLS;
            const u8* from = cells[(is_v ? 2 : 0) + half] + cell * Layout::CELL_BYTES;
            UNROLL for (u32 piece = 0; piece < PIECES; piece++) {
                ptx::cp_async_16(slot(ring, unit) + piece * 512 + ptx::lane_idx() * 16,
                                 from + piece * pages::PIECE_BYTES);
            }
        }
        ptx::cp_async_commit();
    }

    DEVICE static void load_params(const Octet& octet, u32 half, Params& k, Params& v) {
        if constexpr (QUANTIZED) {
            u32 at = octet.idx * 32 + ptx::lane_idx() / 4 % 2 * 16;
            const u8* from = octet.head + Layout::K_PARAMS_OFFSET + at;
            k.half[half] = ptx::load(reinterpret_cast<const u32x4*>(from));
            from = octet.head + Layout::V_PARAMS_OFFSET + at;
            v.half[half] = ptx::load(reinterpret_cast<const u32x4*>(from));
        }
    }

    // --- the blocks of a chunk, the chunks of a row ---

    DEVICE static u32 sums(u32 warp, u32 column) {
        return ptx::shared_base() + (warp * NT * 8 + column) * COLUMN * 4;
    }

    DEVICE static void store_sums(const State& state) {
        u32 g = ptx::lane_idx() / 4, t = ptx::lane_idx() % 4;
        UNROLL for (u32 i = 0; i < 2 * NT; i++) {
            u32 nt = i / 2, e = i % 2;
            u32 at = sums(ptx::warp_idx(), nt * 8 + 2 * t + e);
            UNROLL for (u32 d = 0; d < 2 * CELLS; d++) {
                ptx::store_shared(at + (d * 16 + g) * 4, state.o[d][nt][e]);
                ptx::store_shared(at + (d * 16 + g + 8) * 4, state.o[d][nt][2 + e]);
            }
            if (g == 0) {
                ptx::store_shared(at + Layout::DIMS * 4, state.stats.max[nt][e]);
                ptx::store_shared(at + Layout::DIMS * 4 + 4, state.stats.sum[nt][e]);
                ptx::store_shared(at + Layout::DIMS * 4 + 8, state.stats.center[nt][e]);
            }
        }
    }

    DEVICE static u32 num_columns(const Work& work) {
        return min_of(C::HEADS_TILE, Base::GROUP - work.first_head);
    }

    DEVICE static void clear(float max, Column& column) {
        UNROLL for (u32 i = 0; i < CELLS; i++) {
            column.x[i] = 0.0f;
        }
        column.max = max;
        column.sum = column.center = 0.0f;
    }

    // A summand of a column, in shared memory or in the workspace.
    template <class Load> DEVICE static void add(Load load, Column& column) {
        float factor = exp2_integer(load(Layout::DIMS) - column.max);
        column.sum = ptx::fma(load(Layout::DIMS + 1), factor, column.sum);
        column.center = ptx::fma(load(Layout::DIMS + 2), factor, column.center);
        UNROLL for (u32 i = 0; i < CELLS; i++) {
            column.x[i] = ptx::fma(load(ptx::lane_idx() + 32 * i), factor, column.x[i]);
        }
    }

    struct LoadShared {
        u32 at;
        DEVICE float operator()(u32 i) const { return ptx::load_shared<float>(at + i * 4); }
    };
    struct LoadGlobal {
        const float* at;
        DEVICE float operator()(u32 i) const { return ptx::load(at + i); }
    };

    DEVICE static void combine_blocks(const PagedAttentionParams& params, const Work& work) {
        for (u32 idx = ptx::warp_idx(); idx < num_columns(work); idx += C::WARPS) {
            float max = NO_MAX;
            UNROLL for (u32 warp = 0; warp < C::WARPS; warp++) {
                max = ptx::max(max, LoadShared{sums(warp, idx)}(Layout::DIMS));
            }
            Column column;
            clear(max, column);
            UNROLL for (u32 warp = 0; warp < C::WARPS; warp++) {
                add(LoadShared{sums(warp, idx)}, column);
            }
            if (work.item.num_parts == 1) {
                finish(params, work, idx, column);
            } else {
                store_part(part(params, work, work.item.part, idx), column);
            }
        }
    }

    DEVICE static float* part(const PagedAttentionParams& params, const Work& work, u32 part,
                              u32 column) {
        u64 idx = u64(work.item.first_part + part) * HEAD_SETS + head_set(work);
        return params.workspace + idx * PART + column * COLUMN;
    }

    DEVICE static u32 head_set(const Work& work) {
        return work.kv_head * Base::HEAD_TILES + work.first_head / C::HEADS_TILE;
    }

    DEVICE static void store_part(float* to, const Column& column) {
        UNROLL for (u32 i = 0; i < CELLS; i++) {
            ptx::store(to + ptx::lane_idx() + 32 * i, column.x[i]);
        }
        if (ptx::lane_idx() == 0) {
            ptx::store(to + Layout::DIMS, column.max);
            ptx::store(to + Layout::DIMS + 1, column.sum);
            ptx::store(to + Layout::DIMS + 2, column.center);
        }
    }

    // If all parts of the row are there, adds them up.
    DEVICE static void combine_parts(const PagedAttentionParams& params, const Work& work) {
        u32* counter = params.counters + work.item.first_row * HEAD_SETS + head_set(work);
        u32 flag = ptx::shared_base() + FLAG_OFFSET;
        ptx::fence_device();
        ptx::block_sync();
        if (ptx::thread_idx() == 0) {
            u32 last = work.item.num_parts - 1;
            ptx::store_shared(flag, u32(ptx::atomic_add(counter, 1) == last));
            ptx::fence_device();
        }
        ptx::block_sync();
        if (ptx::load_shared<u32>(flag) == 0) {
            return;
        }
        ptx::fence_device();
        for (u32 idx = ptx::warp_idx(); idx < num_columns(work); idx += C::WARPS) {
            combine_column(params, work, idx);
        }
        if (ptx::thread_idx() == 0) {
            ptx::store(counter, 0u);
        }
    }

    DEVICE static void combine_column(const PagedAttentionParams& params, const Work& work,
                                      u32 idx) {
        u32 num_parts = work.item.num_parts;
        float max = NO_MAX;
        for (u32 i = ptx::lane_idx(); i < num_parts; i += 32) {
            max = ptx::max(max, ptx::load(part(params, work, i, idx) + Layout::DIMS));
        }
        UNROLL for (u32 mask = 16; mask > 0; mask /= 2) {
            max = ptx::max(max, ptx::shfl_xor(max, mask));
        }
        Column column;
        clear(max, column);
        _Pragma("unroll 4") for (u32 i = 0; i < num_parts; i++) {
            add(LoadGlobal{part(params, work, i, idx)}, column);
        }
        finish(params, work, idx, column);
    }

    // Divides by the sum of probabilities and writes a row of a head.
    DEVICE static void finish(const PagedAttentionParams& params, const Work& work, u32 idx,
                              Column& column) {
        float inverse = ptx::rcp(column.sum);
        UNROLL for (u32 i = 0; i < CELLS; i++) {
            column.x[i] = (column.x[i] + column.center) * inverse;
        }
        if constexpr (C::Kv::BITS == 4) {
            hadamard(column.x);
        }
        u32 head = work.kv_head * Base::GROUP + Base::head(work, idx);
        u16* out = static_cast<u16*>(params.out) +
                   (u64(work.item.first_row) * C::HEADS + head) * C::HEAD_DIM;
        UNROLL for (u32 i = 0; i < CELLS; i++) {
            u32 dim = ptx::lane_idx() + 32 * i;
            if (dim < C::HEAD_DIM) {
                ptx::store(out + dim, Base::Rows::narrow(column.x[i]));
            }
        }
    }

    DEVICE static void hadamard(float (&x)[CELLS]) {
        constexpr u32 SIZE = pages::hadamard_size(C::HEAD_DIM);
        UNROLL for (u32 mask = 1; mask < 32 && mask < SIZE; mask *= 2) {
            UNROLL for (u32 i = 0; i < CELLS; i++) {
                float other = ptx::shfl_xor(x[i], mask);
                x[i] = ptx::lane_idx() & mask ? other - x[i] : x[i] + other;
            }
        }
        UNROLL for (u32 step = 1; 32 * step < SIZE; step *= 2) {
            UNROLL for (u32 i = 0; i < CELLS; i++) {
                if ((i & step) == 0) {
                    float sum = x[i] + x[i + step];
                    x[i + step] = x[i] - x[i + step];
                    x[i] = sum;
                }
            }
        }
        UNROLL for (u32 i = 0; i < CELLS; i++) {
            x[i] *= pages::hadamard_factor(C::HEAD_DIM);
        }
    }
};

// Rows of a span in tiles of WARPS · NT · 8 columns. Blocks of keys come through a ring of shared
// memory, keys and values in turn, in the order in which lanes read them; scores, probabilities and
// a chunk's sums stay in registers, and the sums of the chunks before where no other thread sees
// them.
template <class C> struct Prefill : Columns<C> {
    using Base = Columns<C>;
    using Layout = typename Base::Layout;
    using typename Base::Octet;
    using typename Base::Params;
    using typename Base::Probabilities;
    using typename Base::Scores;
    using typename Base::State;
    static constexpr u32 NT = Base::NT;
    static constexpr u32 CELLS = Base::CELLS;
    static constexpr u32 PIECES = Base::PIECES;
    static constexpr bool QUANTIZED = Base::QUANTIZED;
    static constexpr u32 FRAGMENT_BYTES = Base::FRAGMENT_BYTES;
    static constexpr u32 STAGES = C::STAGES;
    static constexpr u32 PARAMS_OFFSET = 2 * CELLS * FRAGMENT_BYTES;  // of keys, then of values
    static constexpr u32 SLOT_BYTES = PARAMS_OFFSET + (QUANTIZED ? 8 * BLOCK : 0);
    // Sums of the chunks before, 16 bytes of each thread side by side.
    static constexpr u32 TOTAL_OFFSET = STAGES * SLOT_BYTES;
    static constexpr u32 TOTAL_STRIDE = C::WARPS * 32 * 16;
    static constexpr u32 TOTAL_VECTORS = NT * (2 * CELLS + (QUANTIZED ? 2 : 1));
    static constexpr u32 SHARED_BYTES = TOTAL_OFFSET + TOTAL_VECTORS * TOTAL_STRIDE;
    static_assert(C::HEADS_TILE <= C::WARPS * NT * 8, "a column for each head");

    DEVICE static void run(const PagedAttentionParams& params) {
        ptx::grid_wait();
        u32 num_works = ptx::load(params.num_items) * C::KV_HEADS * Base::HEAD_TILES;
        for (u32 idx = ptx::block_idx(); idx < num_works; idx += ptx::num_blocks()) {
            Tile tile(params, Base::work(params, idx));
            tile.run();
            ptx::block_sync();
        }
        ptx::grid_launch_dependents();
    }

private:
    // The work of a block of the grid.
    struct Tile {
        const PagedAttentionParams& params;
        Work work;
        u32 pages;  // of the next block to be copied

        DEVICE Tile(const PagedAttentionParams& params, const Work& work)
            : params(params), work(work) {
            pages = Base::load_pages(params, work, first_block() * BLOCK, keys());
        }

        // Keys that some row sees.
        DEVICE Keys keys() const {
            return {Base::visible(work, 0).begin,
                    Base::visible(work, work.item.num_rows - 1).end};
        }

        // Whether all rows see all keys of a block.
        DEVICE bool is_common(u32 block) const {
            return block >= Base::visible(work, work.item.num_rows - 1).begin &&
                   block + BLOCK <= Base::visible(work, 0).end;
        }

        DEVICE u32 first_block() const { return keys().begin / BLOCK; }
        DEVICE u32 num_blocks() const { return div_up(keys().end, BLOCK) - first_block(); }
        DEVICE u32 first_column() const { return ptx::warp_idx() * NT * 8; }

        DEVICE void run() {
            UNROLL for (u32 i = 0; i < STAGES - 1; i++) {
                copy(i);
            }
            u32 q[CELLS][NT][4];
            float q_sums[NT][2];
            Base::load_queries(params, work, first_column(), q);
            if constexpr (QUANTIZED) {
                Base::sum_queries(q, q_sums);
            }
            State sums;
            Base::clear(sums);
            bool has_total = false;
            NO_UNROLL for (u32 i = 0; i < num_blocks(); i++) {
                if (i > 0 && (first_block() + i) % (C::CHUNK / BLOCK) == 0) {
                    add_total(has_total, sums);
                    store_total(sums);
                    has_total = true;
                    Base::clear(sums);
                }
                attend(i, q, q_sums, sums);
            }
            ptx::cp_async_wait<0>();
            add_total(has_total, sums);
            finish(sums);
        }

        // --- sums of chunks ---------------------------------------------------------------------

        DEVICE u32 total(u32 vector) {
            return ptx::shared_base() + TOTAL_OFFSET + vector * TOTAL_STRIDE +
                   ptx::thread_idx() * 16;
        }

        DEVICE void store(u32 vector, float a, float b, float c, float d) {
            ptx::store_shared(total(vector), u32x4{ptx::as_bits(a), ptx::as_bits(b),
                                                   ptx::as_bits(c), ptx::as_bits(d)});
        }

        DEVICE void load(u32 vector, float (&x)[4]) {
            u32x4 bits = ptx::load_shared<u32x4>(total(vector));
            x[0] = ptx::as_float(bits.x), x[1] = ptx::as_float(bits.y);
            x[2] = ptx::as_float(bits.z), x[3] = ptx::as_float(bits.w);
        }

        DEVICE void store_total(const State& sums) {
            UNROLL for (u32 nt = 0; nt < NT; nt++) {
                const typename Base::Stats& stats = sums.stats;
                store(nt, stats.max[nt][0], stats.max[nt][1], stats.sum[nt][0], stats.sum[nt][1]);
                if constexpr (QUANTIZED) {
                    store(NT + nt, stats.center[nt][0], stats.center[nt][1], 0.0f, 0.0f);
                }
                UNROLL for (u32 d = 0; d < 2 * CELLS; d++) {
                    const float(&o)[4] = sums.o[d][nt];
                    store(TOTAL_VECTORS - NT * (d + 1) + nt, o[0], o[1], o[2], o[3]);
                }
            }
        }

        // Puts the chunks before in front of the sums of a chunk.
        DEVICE void add_total(bool has_total, State& sums) {
            if (!has_total) {
                return;
            }
            UNROLL for (u32 nt = 0; nt < NT; nt++) {
                float stats[4], center[4], old[2], factors[2];
                load(nt, stats);
                if constexpr (QUANTIZED) {
                    load(NT + nt, center);
                }
                UNROLL for (u32 e = 0; e < 2; e++) {
                    float& max = sums.stats.max[nt][e];
                    float larger = ptx::max(max, stats[e]);
                    old[e] = exp2_integer(stats[e] - larger);
                    factors[e] = exp2_integer(max - larger);
                    max = larger;
                    float& sum = sums.stats.sum[nt][e];
                    sum = ptx::fma(sum, factors[e], stats[2 + e] * old[e]);
                    if constexpr (QUANTIZED) {
                        float& x = sums.stats.center[nt][e];
                        x = ptx::fma(x, factors[e], center[e] * old[e]);
                    }
                }
                UNROLL for (u32 d = 0; d < 2 * CELLS; d++) {
                    float o[4];
                    load(TOTAL_VECTORS - NT * (d + 1) + nt, o);
                    UNROLL for (u32 i = 0; i < 4; i++) {
                        float& x = sums.o[d][nt][i];
                        x = ptx::fma(x, factors[i % 2], o[i] * old[i % 2]);
                    }
                }
            }
        }

        // --- blocks of keys ---------------------------------------------------------------------

        // Half `idx` of the copies, keys and values of a block in turn, is there; asks for a later
        // one in the place of the one before.
        DEVICE void advance(u32 idx) {
            ptx::cp_async_wait<STAGES - 2>();
            ptx::block_sync();
            copy(idx + STAGES - 1);
        }

        DEVICE u32 slot(u32 idx) { return ptx::shared_base() + idx % STAGES * SLOT_BYTES; }

        // Copies keys (even `idx`) or values of a block; closes a group even where none is left.
        DEVICE void copy(u32 idx) {
            if (idx < 2 * num_blocks()) {
                u32 block = (first_block() + idx / 2) * BLOCK;
                if (idx % 2 == 0) {
                    copy_params(slot(idx), block);
                }
                copy_cells(slot(idx), block, idx % 2);
                if (idx % 2 == 1 && idx + 1 < 2 * num_blocks()) {
                    pages = Base::load_pages(params, work, block + BLOCK, keys());
                }
            }
            ptx::cp_async_commit();
        }

        DEVICE void copy_cells(u32 slot, u32 block, bool is_v) {
            constexpr u32 RUNS = CELLS * PIECES;  // of a warp, for 32 keys
            const u8* cells[2];
            UNROLL for (u32 half = 0; half < 2; half++) {
                u32 idx = is_v ? Base::v_octet(half) : Base::k_octet(half);
                Octet octet = Base::octet(params, work, block, pages, idx, keys());
                cells[half] = is_v ? Base::v_cells(octet) : Base::k_cells(octet);
            }
            UNROLL for (u32 i = 0; i < div_up(2 * RUNS, C::WARPS); i++) {
                u32 run = i * C::WARPS + ptx::warp_idx();
                if (2 * RUNS % C::WARPS == 0 || run < 2 * RUNS) {
                    const u8* from = run < RUNS ? cells[0] : cells[1];
                    ptx::cp_async_16(slot + run * 512 + ptx::lane_idx() * 16,
                                     from + run % RUNS * pages::PIECE_BYTES);
                }
            }
        }

        // Parameters of keys and values by one warp.
        DEVICE void copy_params(u32 slot, u32 block) {
            if constexpr (QUANTIZED) {
                u32 lane = ptx::lane_idx();
                Octet octet = Base::octet(params, work, block, pages, lane % 16 / 2, keys());
                u32 at = lane < 16 ? Layout::K_PARAMS_OFFSET : Layout::V_PARAMS_OFFSET;
                if (ptx::warp_idx() == C::WARPS - 1) {
                    ptx::cp_async_16(slot + PARAMS_OFFSET + lane * 16,
                                     octet.head + at + octet.idx * 32 + lane % 2 * 16);
                }
            }
        }

        DEVICE void read_params(u32 slot, Params& k, Params& v) {
            if constexpr (QUANTIZED) {
                UNROLL for (u32 half = 0; half < 2; half++) {
                    u32 at = slot + PARAMS_OFFSET + half * 128 + ptx::lane_idx() / 4 * 16;
                    k.half[half] = ptx::load_shared<u32x4>(at);
                    v.half[half] = ptx::load_shared<u32x4>(at + 4 * BLOCK);
                }
            }
        }

        DEVICE void attend(u32 idx, const u32 (&q)[CELLS][NT][4], const float (&q_sums)[NT][2],
                           State& chunk) {
            u32 block = (first_block() + idx) * BLOCK;
            u32 at = slot(2 * idx);
            advance(2 * idx);
            Scores s = {};
            UNROLL for (u32 i = 0; i < 2 * CELLS; i++) {
                Base::add_scores(at + i * FRAGMENT_BYTES, q[i % CELLS], s[i / CELLS]);
            }
            Params k_params, v_params;
            read_params(at, k_params, v_params);
            if constexpr (QUANTIZED) {
                Base::scale_scores(k_params, q_sums, s);
            }
            if (!is_common(block)) {
                Base::mask(work, first_column(), block, keys(), v_params, s);
            }
            typename Base::Stats stats;
            float powers[NT][2], factors[NT][2];
            Probabilities p;
            Base::softmax(params.scale * LOG2_E, v_params, s, stats, powers, p);
            Base::raise(stats, chunk, factors);
            UNROLL for (u32 i = 0; i < 2 * NT; i++) {
                factors[i / 2][i % 2] *= powers[i / 2][i % 2];
            }
            bool partial = block < keys().begin || block + BLOCK > keys().end;
            at = slot(2 * idx + 1);
            advance(2 * idx + 1);
            if (partial) {
                add_values<true>(at, block, p, factors, chunk);
            } else {
                add_values<false>(at, block, p, factors, chunk);
            }
        }

        template <bool MASK>
        DEVICE void add_values(u32 at, u32 block, const Probabilities& p,
                               const float (&factors)[NT][2], State& chunk) {
            UNROLL for (u32 cell = 0; cell < CELLS; cell++) {
                u32 first = at + cell * FRAGMENT_BYTES;
                Base::template add_values<MASK>(first, first + CELLS * FRAGMENT_BYTES, cell, block,
                                                keys(), p, factors, chunk);
            }
        }

        // Divides by the sums of probabilities and writes the rows.
        DEVICE void finish(State& total) {
            UNROLL for (u32 nt = 0; nt < NT; nt++) {
                const float center[2] = {total.stats.center[nt][0], total.stats.center[nt][1]};
                const float inverse[2] = {ptx::rcp(total.stats.sum[nt][0]),
                                          ptx::rcp(total.stats.sum[nt][1])};
                UNROLL for (u32 i = 0; i < 8 * CELLS; i++) {
                    float& x = total.o[i / 4][nt][i % 4];
                    x = (x + center[i % 2]) * inverse[i % 2];
                }
                if constexpr (C::Kv::BITS == 4) {
                    hadamard(nt, total);
                }
                write(nt, total);
            }
        }

        // Dimension 16 d + 8 h + g is element 2h + e of o[d] in lanes 4g + t.
        DEVICE void hadamard(u32 nt, State& total) {
            constexpr u32 SIZE = pages::hadamard_size(C::HEAD_DIM);
            UNROLL for (u32 mask = 1; mask < 8 && mask < SIZE; mask *= 2) {
                UNROLL for (u32 i = 0; i < 8 * CELLS; i++) {
                    float& x = total.o[i / 4][nt][i % 4];
                    float other = ptx::shfl_xor(x, 4 * mask);
                    x = ptx::lane_idx() / 4 & mask ? other - x : x + other;
                }
            }
            UNROLL for (u32 step = 1; 8 * step < SIZE; step *= 2) {
                UNROLL for (u32 i = 0; i < 8 * CELLS; i++) {
                    u32 run = i / 2, e = i % 2;
                    if ((run & step) == 0) {
                        float& low = total.o[run / 2][nt][run % 2 * 2 + e];
                        float& high = total.o[(run + step) / 2][nt][(run + step) % 2 * 2 + e];
                        float sum = low + high;
                        high = low - high;
                        low = sum;
                    }
                }
            }
            UNROLL for (u32 i = 0; i < 8 * CELLS; i++) {
                total.o[i / 4][nt][i % 4] *= pages::hadamard_factor(C::HEAD_DIM);
            }
        }

        DEVICE void write(u32 nt, const State& total) {
            u32 column = first_column() + nt * 8 + ptx::lane_idx() / 4;
            u32 head = work.kv_head * Base::GROUP + Base::head(work, column);
            u64 at = (u64(work.item.first_row + Base::row(column)) * C::HEADS + head) * C::HEAD_DIM;
            bool used = Base::is_used(work, column);
            u16* out = static_cast<u16*>(params.out) + at;
            UNROLL for (u32 i = 0; i < 4 * CELLS; i++) {
                const float(&x)[4] = total.o[i / 2][nt];
                u32 pair = Base::Rows::pack(x[i % 2 * 2], x[i % 2 * 2 + 1]);
                pair = ptx::movmatrix_trans(pair);
                u32 dim = i * 8 + ptx::lane_idx() % 4 * 2;
                if (used && dim < C::HEAD_DIM) {
                    ptx::store(reinterpret_cast<u32*>(out + dim), pair);
                }
            }
        }
    };
};

}  // namespace paged_attention
