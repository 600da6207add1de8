// `residual += delta; out = residual / rms(residual) · weight`, row by row.
//
// Bound: reads 4 bytes of the residual and 2 of delta an element, writes 4 and 2, at the speed of
// memory; a row stays in registers between its two uses.

#pragma once
#include "params.h"
#include "words.cuh"

namespace rms_norm {

// Constants: `Rows` (F16 or BF16), `HIDDEN`, `THREADS`.
template <class C> struct Kernel {
    using Rows = typename C::Rows;
    // Elements that a thread moves at once: 16 bytes of 16-bit rows, where that divides them.
    static constexpr u32 WIDTH = C::HIDDEN % 8 == 0 ? 8 : 1;
    // Such runs of a thread.
    static constexpr u32 RUNS = div_up(C::HIDDEN, C::THREADS * WIDTH);
    static constexpr u32 WARPS = C::THREADS / 32;

    // A block a row, and on to the next.
    DEVICE static void run(const RmsNormParams& params) {
        u32 weight[RUNS][WIDTH];
        for_runs([&](u32 run, u32 i) {
            load_constant_words(reinterpret_cast<const u32*>(params.weight) + i, weight[run]);
        });
        ptx::grid_wait();
        u32 buffer = 0;
        for (u32 row = ptx::block_idx(); row < params.num_rows; row += ptx::num_blocks()) {
            u64 source = params.select ? ptx::load(params.select + row) : row;
            float x[RUNS][WIDTH];
            float squares = block_sum(load_row(params, source * C::HIDDEN, x), buffer);
            float factor = ptx::rsqrt(squares / float(C::HIDDEN) + params.epsilon);
            store_row(params.out, u64(row) * C::HIDDEN, x, factor, weight);
            buffer ^= 1;
        }
        ptx::grid_launch_dependents();
    }

private:
    // The residual, `delta` added to it; returns this thread's sum of squares.
    DEVICE static float load_row(const RmsNormParams& params, u64 at, float (&x)[RUNS][WIDTH]) {
        u32* residual = reinterpret_cast<u32*>(params.residual) + at;
        float squares = 0.0f;
        for_runs([&](u32 run, u32 i) {
            u32 words[WIDTH];
            load_words(residual + i, words);
            UNROLL for (u32 j = 0; j < WIDTH; j++) x[run][j] = ptx::as_float(words[j]);
            if (params.delta) {
                add_delta(params.delta, at + i, x[run]);
                UNROLL for (u32 j = 0; j < WIDTH; j++) words[j] = ptx::as_bits(x[run][j]);
                store_words(residual + i, words);
            }
            UNROLL for (u32 j = 0; j < WIDTH; j++) {
                squares = ptx::fma(x[run][j], x[run][j], squares);
            }
        });
        return squares;
    }

    DEVICE static void add_delta(const void* delta, u64 at, float (&x)[WIDTH]) {
        if constexpr (WIDTH == 1) {
            x[0] += Rows::widen(ptx::load(static_cast<const u16*>(delta) + at));
        } else {
            u32 words[WIDTH / 2];
            load_words(static_cast<const u32*>(delta) + at / 2, words);
            UNROLL for (u32 j = 0; j < WIDTH / 2; j++) {
                x[2 * j] += Rows::first(words[j]);
                x[2 * j + 1] += Rows::second(words[j]);
            }
        }
    }

    DEVICE static void store_row(void* out, u64 at, const float (&x)[RUNS][WIDTH], float factor,
                                 const u32 (&weight)[RUNS][WIDTH]) {
        for_runs([&](u32 run, u32 i) {
            float y[WIDTH];
            UNROLL for (u32 j = 0; j < WIDTH; j++) {
                y[j] = x[run][j] * factor * ptx::as_float(weight[run][j]);
            }
            if constexpr (WIDTH == 1) {
                ptx::store(static_cast<u16*>(out) + at + i, Rows::narrow(y[0]));
            } else {
                u32 words[WIDTH / 2];
                UNROLL for (u32 j = 0; j < WIDTH / 2; j++) {
                    words[j] = Rows::pack(y[2 * j], y[2 * j + 1]);
                }
                store_words(static_cast<u32*>(out) + (at + i) / 2, words);
            }
        });
    }

    // Calls `body(run, element)` for this thread's runs of a row.
    template <class Body> DEVICE static void for_runs(Body body) {
        UNROLL for (u32 run = 0; run < RUNS; run++) {
            u32 i = (run * C::THREADS + ptx::thread_idx()) * WIDTH;
            if (i < C::HIDDEN) body(run, i);
        }
    }

    // The sum over all threads, the same in each, always added up in the same order.
    // NOTE: a second buffer lets a row begin while other warps still read the first's sums.
    DEVICE static float block_sum(float value, u32 buffer) {
        UNROLL for (u32 mask = 16; mask > 0; mask /= 2) value += ptx::shfl_xor(value, mask);
        if constexpr (WARPS == 1) return value;
        u32 sums = ptx::shared_base() + buffer * WARPS * 4;
        if (ptx::lane_idx() == 0) ptx::store_shared(sums + ptx::thread_idx() / 32 * 4, value);
        ptx::block_sync();
        float total = 0.0f;
        UNROLL for (u32 warp = 0; warp < WARPS; warp++) {
            total += ptx::load_shared<float>(sums + warp * 4);
        }
        return total;
    }
};

}  // namespace rms_norm
