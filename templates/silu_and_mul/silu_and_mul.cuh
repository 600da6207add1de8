// `out = silu(gate) · up` on 16-bit rows.
//
// Bound: reads 4 · INTERMEDIATE bytes a row and writes half of it, at the speed of memory (of L2
// for few rows).

#pragma once
#include "params.h"
#include "words.cuh"

namespace silu_and_mul {

// Constants: `Rows` (F16 or BF16), `INTERMEDIATE`, `THREADS`.
template <class C> struct Kernel {
    using Rows = typename C::Rows;
    // What a thread moves at once: 16 bytes, where rows are a multiple of that.
    static constexpr u32 WORDS = C::INTERMEDIATE % 8 == 0 ? 4 : 1;
    static constexpr u32 ROW_WORDS = C::INTERMEDIATE / 2;

    // Blocks walk over the words of all rows.
    DEVICE static void run(const SiluAndMulParams& params) {
        constexpr u32 STEPS = ROW_WORDS / WORDS;
        ptx::grid_wait();
        const u32* gate_up = static_cast<const u32*>(params.gate_up);
        u32* out = static_cast<u32*>(params.out);
        u32 total = params.num_rows * STEPS;
        u32 stride = ptx::num_blocks() * C::THREADS;
        for (u32 i = ptx::block_idx() * C::THREADS + ptx::thread_idx(); i < total; i += stride) {
            u64 row = i / STEPS;
            u32 word = i % STEPS * WORDS;
            u32 gate[WORDS], up[WORDS], result[WORDS];
            load_words(gate_up + row * 2 * ROW_WORDS + word, gate);
            load_words(gate_up + (row * 2 + 1) * ROW_WORDS + word, up);
            UNROLL for (u32 j = 0; j < WORDS; j++) {
                float first = silu(Rows::first(gate[j])) * Rows::first(up[j]);
                float second = silu(Rows::second(gate[j])) * Rows::second(up[j]);
                result[j] = Rows::pack(first, second);
            }
            store_words(out + row * ROW_WORDS + word, result);
        }
        ptx::grid_launch_dependents();
    }

private:
    DEVICE static float silu(float x) { return x * ptx::rcp(1.0f + ptx::ex2(-LOG2_E * x)); }
    static constexpr float LOG2_E = 1.44269504f;
};

}  // namespace silu_and_mul
