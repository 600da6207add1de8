// `out = x · weightᵀ + bias` with int4 weights, `weight = (q − zero) · scale` per group of inputs.
//
// Layout of the weights: [N / 64][K / 64][4 tiles][32 lanes][4 words]; word k of a lane is its A
// fragment of inputs 16 k .. 16 k + 16, in the order that dequant.cuh describes.
// Layout of the scales: [N / 64][K / SCALE_GROUP][4 tiles][8][2] words, the last two index row
// r % 8 and r / 8 of the tile's 16: the scale as float16, and above it the zero as dequant.cuh adds
// it. SCALE_GROUP is the group where that is a multiple of 64, else the greatest common divisor of
// both, so that a block of 64 inputs has whole scale groups or is inside one.
//
// Products of integers and rows are summed up in chains of at most 64 inputs that share a scale,
// and each chain is scaled as it is added to its slice, in float32: nothing is rounded to 16 bits.
// See matmul.cuh for the rest, constants and bound.

#pragma once
#include "dequant.cuh"
#include "matmul.cuh"

namespace awq_gemm {

// Constants beside those of `matmul::Matmul`: `Rows` (F16 or BF16), SCALE_GROUP.
template <class C> struct Weights {
    static constexpr u32 TILE_BYTES = 512;
    // Inputs of a chain, and chains of a block of 64 inputs, each with its record of scales.
    static constexpr u32 CHAIN = min_of(C::SCALE_GROUP, matmul::BLOCK_K);
    static constexpr u32 NUM_CHAINS = matmul::BLOCK_K / CHAIN;
    static_assert(matmul::BLOCK_K % CHAIN == 0 && CHAIN % 16 == 0, "chains are whole mmas");
    static constexpr u32 RECORD_BYTES = 64;
    static constexpr u32 SCALE_BYTES = NUM_CHAINS * RECORD_BYTES;

    // Record `chain` of a tile's first 64 inputs. In shared memory records lie [chain][tile].
    DEVICE static const u8* scales(const LinearParams& params, u32 tile, u32 chain) {
        constexpr u32 NUM_GROUPS = round_up(C::PACKED_K, 64) / C::SCALE_GROUP;
        u64 record = u64(tile / 4 * NUM_GROUPS + chain) * 4 + tile % 4;
        return static_cast<const u8*>(params.scales) + record * RECORD_BYTES;
    }

    // How many bytes further the records of inputs 64 kb .. 64 kb + 64 are.
    DEVICE static u32 scales_at(u32 kb) {
        return kb * matmul::BLOCK_K / C::SCALE_GROUP * (4 * RECORD_BYTES);
    }

    template <u32 BLOCK_TILES>
    DEVICE static void multiply(matmul::Sums (&acc)[C::ROW_TILES],
                                const matmul::RowFragments (&b)[C::ROW_TILES], u32 weights,
                                u32 scales, u32 tile) {
        u32 lane = ptx::lane_idx();
        u32x4 words = ptx::load_shared<u32x4>(weights + tile * TILE_BYTES + lane * 16);
        u32 q[4] = {words.x, words.y, words.z, words.w};
        UNROLL
        for (u32 chain = 0; chain < NUM_CHAINS; chain++) {
            u32 record = scales + (chain * BLOCK_TILES + tile) * RECORD_BYTES + lane / 4 * 8;
            u32x2 scale = ptx::load_shared<u32x2>(record);
            matmul::Sums part[C::ROW_TILES] = {};
            UNROLL
            for (u32 k = chain * CHAIN / 16; k < (chain + 1) * CHAIN / 16; k++) {
                u32 a[4];
                dequant::Int4<typename C::Rows>::fragment(a, q[k], zeros(scale.x), zeros(scale.y));
                UNROLL
                for (u32 j = 0; j < C::ROW_TILES; j++) C::Rows::mma(part[j], a, b[j][k]);
            }
            UNROLL
            for (u32 j = 0; j < C::ROW_TILES; j++) add_scaled(acc[j], part[j], scale);
        }
    }

private:
    // The zero of a record's word, twice.
    DEVICE static u32 zeros(u32 word) { return ptx::prmt(word, 0, 0x3232); }

    DEVICE static void add_scaled(matmul::Sums& acc, const matmul::Sums& part, u32x2 scale) {
        float low = ptx::cvt_f32_f16(u16(scale.x)), high = ptx::cvt_f32_f16(u16(scale.y));
        acc[0] = ptx::fma(part[0], low, acc[0]);
        acc[1] = ptx::fma(part[1], low, acc[1]);
        acc[2] = ptx::fma(part[2], high, acc[2]);
        acc[3] = ptx::fma(part[3], high, acc[3]);
    }
};

template <class C> struct Kernel : matmul::Matmul<C, Weights<C>> {};

}  // namespace awq_gemm
