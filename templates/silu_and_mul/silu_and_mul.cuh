// `out = silu(gate) · up` on 16-bit rows.
//
// Bound: reads 4 · INTERMEDIATE bytes a row and writes half of it, at the speed of memory (of L2
// for few rows).

#pragma once
#include "params.h"
#include "types.cuh"

namespace silu_and_mul {

// Constants: `Rows` (F16 or BF16), `INTERMEDIATE`, `THREADS`.
template <class C> struct Kernel {
    using Rows = typename C::Rows;

    // Blocks walk over the pairs of all rows.
    DEVICE static void run(const SiluAndMulParams& params) {
        constexpr u32 PAIRS = C::INTERMEDIATE / 2;
        ptx::grid_wait();
        const u32* gate_up = static_cast<const u32*>(params.gate_up);
        u32* out = static_cast<u32*>(params.out);
        u32 total = params.num_rows * PAIRS;
        u32 stride = ptx::num_blocks() * C::THREADS;
        for (u32 i = ptx::block_idx() * C::THREADS + ptx::thread_idx(); i < total; i += stride) {
            u64 row = i / PAIRS;
            u32 gate = ptx::load(gate_up + row * 2 * PAIRS + i % PAIRS);
            u32 up = ptx::load(gate_up + (row * 2 + 1) * PAIRS + i % PAIRS);
            float first = silu(Rows::first(gate)) * Rows::first(up);
            float second = silu(Rows::second(gate)) * Rows::second(up);
            ptx::store(out + i, Rows::pack(first, second));
        }
        ptx::grid_launch_dependents();
    }

private:
    DEVICE static float silu(float x) { return x * ptx::rcp(1.0f + ptx::ex2(-LOG2_E * x)); }
    static constexpr float LOG2_E = 1.44269504f;
};

}  // namespace silu_and_mul
