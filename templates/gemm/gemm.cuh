// `out = x · weightᵀ + bias` with 16-bit weights of the rows' type.
//
// Weights are packed as A fragments of m16n8k16: [N / 64][K / 64][4 tiles][4 k16][32 lanes]
// [4 registers], so that a lane's fragment is one load of 16 bytes.
//
// Each slice of K is one chain of mma in the order of k; see matmul.cuh for the rest, constants
// and bound.

#pragma once
#include "matmul.cuh"

namespace gemm {

// Constants beside those of `matmul::Matmul`: `Rows` (F16 or BF16).
template <class C> struct Weights {
    static constexpr u32 FRAGMENT_BYTES = 512;
    static constexpr u32 TILE_BYTES = 4 * FRAGMENT_BYTES;
    static constexpr u32 SCALE_BYTES = 0;

    template <u32 BLOCK_TILES>
    DEVICE static void multiply(matmul::Sums (&acc)[C::ROW_TILES],
                                const matmul::RowFragments (&b)[C::ROW_TILES], u32 weights,
                                u32 /* scales */, u32 tile) {
        u32 address = weights + tile * TILE_BYTES + ptx::lane_idx() * 16;
        UNROLL
        for (u32 k = 0; k < 4; k++) {
            u32x4 w = ptx::load_shared<u32x4>(address + k * FRAGMENT_BYTES);
            u32 a[4] = {w.x, w.y, w.z, w.w};
            UNROLL
            for (u32 j = 0; j < C::ROW_TILES; j++) C::Rows::mma(acc[j], a, b[j][k]);
        }
    }
};

template <class C> struct Kernel : matmul::Matmul<C, Weights<C>> {};

}  // namespace gemm
