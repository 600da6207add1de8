// QK-norm where the model has it, rotary embedding of q (in place) and k, and the append of K and V
// to their pages, quantized where the KV cache is.
//
// Rotation as in Hugging Face models: element `i` of the first half of the rotary dimensions pairs
// with element `i` of the second half; dimensions beyond them pass through.
//
// A warp takes one head of one row. Lane l holds the pairs of elements 2 (l + 32 i), + 1.
//
// Bound: reads the rows of q, k, v and writes q and the pages once, at the speed of memory (of L2
// for few rows).

#pragma once
#include "pages.cuh"
#include "params.h"
#include "types.cuh"

namespace rope {

// Constants: `Rows` (F16 or BF16), `Kv`, `HEADS`, `KV_HEADS`, `HEAD_DIM`, `ROTARY_DIM`, `PAGE`,
// `QK_NORM`, `WARPS`.
template <class C> struct Kernel {
    using Rows = typename C::Rows;
    using Kv = typename C::Kv;
    using Layout = pages::Layout<C>;
    static constexpr u32 BITS = Kv::BITS;
    static constexpr u32 DIMS = Layout::DIMS;
    static constexpr u32 UNITS = C::HEADS + 2 * C::KV_HEADS;  // heads of a row
    static constexpr u32 PAIRS = div_up(DIMS, 64);            // of a lane
    static constexpr u32 WARP_BYTES = PAIRS * 64 * 4;
    static constexpr u32 SHARED_BYTES = C::WARPS * WARP_BYTES;
    static_assert(C::ROTARY_DIM % 2 == 0 && C::ROTARY_DIM <= C::HEAD_DIM, "halves of a head");

    DEVICE static void run(const RopeParams& params) {
        u32 buffer = ptx::shared_base() + ptx::warp_idx() * WARP_BYTES;
        u32 num_units = params.num_rows * UNITS;
        ptx::grid_wait();
        for (u32 unit = ptx::block_idx() * C::WARPS + ptx::warp_idx(); unit < num_units;
             unit += ptx::num_blocks() * C::WARPS) {
            run_head(params, unit / UNITS, unit % UNITS, buffer);
        }
        ptx::grid_launch_dependents();
    }

private:
    DEVICE static void run_head(const RopeParams& params, u32 row, u32 unit, u32 buffer) {
        u32* x16 = static_cast<u32*>(params.qkv) + (u64(row) * UNITS + unit) * (C::HEAD_DIM / 2);
        bool is_q = unit < C::HEADS, is_v = unit >= C::HEADS + C::KV_HEADS;
        float x[PAIRS][2];
        read(x16, x);
        if (!is_v) {
            if constexpr (C::QK_NORM) {
                normalize(is_q ? params.q_norm : params.k_norm, params.epsilon, x);
            }
            rotate(params.cos_sin + u64(row) * C::ROTARY_DIM, buffer, x);
        }
        if constexpr (BITS == 4) {
            hadamard(x);
        }
        if (is_q) {
            write(x16, x);
            return;
        }
        u32 slot = ptx::load(params.slots + row);
        u32 kv_head = (unit - C::HEADS) % C::KV_HEADS;
        u8* head = static_cast<u8*>(params.kv_cache) +
                   Layout::head_offset(slot / C::PAGE, kv_head);
        append(head, slot % C::PAGE, is_v, buffer, x);
    }

    DEVICE static u32 dim(u32 i) { return 2 * (ptx::lane_idx() + 32 * i); }

    // Elements beyond the head are zero.
    DEVICE static void read(const u32* x16, float (&x)[PAIRS][2]) {
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            u32 pair = dim(i) < C::HEAD_DIM ? ptx::load(x16 + dim(i) / 2) : 0;
            x[i][0] = Rows::first(pair);
            x[i][1] = Rows::second(pair);
        }
    }

    DEVICE static void write(u32* x16, const float (&x)[PAIRS][2]) {
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            if (dim(i) < C::HEAD_DIM) {
                ptx::store(x16 + dim(i) / 2, Rows::pack(x[i][0], x[i][1]));
            }
        }
    }

    DEVICE static void normalize(const float* weight, float epsilon, float (&x)[PAIRS][2]) {
        float squares = 0.0f;
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            squares = ptx::fma(x[i][0], x[i][0], squares);
            squares = ptx::fma(x[i][1], x[i][1], squares);
        }
        UNROLL for (u32 mask = 16; mask > 0; mask /= 2) {
            squares += ptx::shfl_xor(squares, mask);
        }
        float factor = ptx::rsqrt(ptx::fma(squares, 1.0f / C::HEAD_DIM, epsilon));
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            if (dim(i) < C::HEAD_DIM) {
                x[i][0] = x[i][0] * factor * ptx::load_constant(weight + dim(i));
                x[i][1] = x[i][1] * factor * ptx::load_constant(weight + dim(i) + 1);
            }
        }
    }

    // The head in shared memory, for lanes that need each other's elements.
    DEVICE static void share(u32 buffer, const float (&x)[PAIRS][2]) {
        ptx::warp_sync();
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            ptx::store_shared(buffer + dim(i) * 4, u32x2{ptx::as_bits(x[i][0]),
                                                         ptx::as_bits(x[i][1])});
        }
        ptx::warp_sync();
    }

    DEVICE static float shared(u32 buffer, u32 dim) {
        return ptx::load_shared<float>(buffer + dim * 4);
    }

    DEVICE static void rotate(const float* cos_sin, u32 buffer, float (&x)[PAIRS][2]) {
        constexpr u32 HALF = C::ROTARY_DIM / 2;
        share(buffer, x);
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            UNROLL for (u32 e = 0; e < 2; e++) {
                u32 d = dim(i) + e;
                if (d < C::ROTARY_DIM) {
                    bool first = d < HALF;
                    u32 angle = first ? d : d - HALF;
                    float other = shared(buffer, first ? d + HALF : d - HALF);
                    float sine = ptx::load(cos_sin + HALF + angle);
                    x[i][e] = ptx::fma(x[i][e], ptx::load(cos_sin + angle),
                                       other * (first ? -sine : sine));
                }
            }
        }
    }

    // Element 2 (l + 32 i) + e has the number (i, l, e) in bits.
    DEVICE static void hadamard(float (&x)[PAIRS][2]) {
        constexpr u32 SIZE = pages::hadamard_size(C::HEAD_DIM);
        constexpr float FACTOR = pages::hadamard_factor(C::HEAD_DIM);
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            float sum = x[i][0] + x[i][1];
            x[i][1] = x[i][0] - x[i][1];
            x[i][0] = sum;
        }
        UNROLL for (u32 mask = 1; mask < 32 && 2 * mask < SIZE; mask *= 2) {
            UNROLL for (u32 i = 0; i < PAIRS * 2; i++) {
                float other = ptx::shfl_xor(x[i / 2][i % 2], mask);
                float own = x[i / 2][i % 2];
                x[i / 2][i % 2] = ptx::lane_idx() & mask ? other - own : own + other;
            }
        }
        UNROLL for (u32 step = 1; 64 * step < SIZE; step *= 2) {
            UNROLL for (u32 i = 0; i < PAIRS * 2; i++) {
                if ((i / 2 & step) == 0) {
                    float& low = x[i / 2][i % 2];
                    float& high = x[i / 2 + step][i % 2];
                    float sum = low + high;
                    high = low - high;
                    low = sum;
                }
            }
        }
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            x[i][0] *= FACTOR;
            x[i][1] *= FACTOR;
        }
    }

    DEVICE static void append(u8* head, u32 place, bool is_v, u32 buffer, float (&x)[PAIRS][2]) {
        if constexpr (Layout::QUANTIZED) {
            u32 param = quantize(x);
            if (ptx::lane_idx() == 0) {
                u32 at = is_v ? Layout::V_PARAMS_OFFSET : Layout::K_PARAMS_OFFSET;
                at += Layout::param_offset(place);
                ptx::store(reinterpret_cast<u32*>(head + at), param);
            }
        }
        share(buffer, x);
        if (is_v) {
            append_v(head, place, buffer);
        } else {
            append_k(head, place, buffer);
        }
    }

    // Replaces the head by its levels; returns scale and minimum as a pair. Levels are counted in
    // the scale as it is stored.
    DEVICE static u32 quantize(float (&x)[PAIRS][2]) {
        constexpr float LEVEL_MAX = (1 << BITS) - 1, LARGEST = 65504.0f;
        float low = 3.0e38f, high = -3.0e38f;
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            if (dim(i) < C::HEAD_DIM) {
                low = ptx::min(low, ptx::min(x[i][0], x[i][1]));
                high = ptx::max(high, ptx::max(x[i][0], x[i][1]));
            }
        }
        UNROLL for (u32 mask = 16; mask > 0; mask /= 2) {
            low = ptx::min(low, ptx::shfl_xor(low, mask));
            high = ptx::max(high, ptx::shfl_xor(high, mask));
        }
        u32 min16 = F16::narrow(ptx::max(ptx::min(low, LARGEST), -LARGEST));
        float min = F16::widen(u16(min16));
        float wanted = ptx::max(ptx::min((high - min) / LEVEL_MAX, LARGEST), 0.0f);
        u32 scale16 = F16::narrow(wanted);
        // Rounded up, or the highest level would not reach the maximum.
        scale16 += F16::widen(u16(scale16)) < wanted;
        float scale = F16::widen(u16(scale16));
        // A constant head is level 0 above its minimum.
        float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        UNROLL for (u32 i = 0; i < PAIRS; i++) {
            UNROLL for (u32 e = 0; e < 2; e++) {
                float level = ptx::cvt_rni_f32((x[i][e] - min) * inverse);
                bool inside = dim(i) < C::HEAD_DIM;
                x[i][e] = inside ? ptx::max(ptx::min(level, LEVEL_MAX), 0.0f) : 0.0f;
            }
        }
        return scale16 | min16 << 16;
    }

    // A lane writes eight dimensions at once.
    DEVICE static void append_k(u8* head, u32 place, u32 buffer) {
        for (u32 run = ptx::lane_idx(); run < DIMS / 8; run += 32) {
            u32x4 a = ptx::load_shared<u32x4>(buffer + run * 32);
            u32x4 b = ptx::load_shared<u32x4>(buffer + run * 32 + 16);
            const float x[8] = {ptx::as_float(a.x), ptx::as_float(a.y), ptx::as_float(a.z),
                                ptx::as_float(a.w), ptx::as_float(b.x), ptx::as_float(b.y),
                                ptx::as_float(b.z), ptx::as_float(b.w)};
            store_run(head + Layout::k_offset(place, run * 8), x);
        }
    }

    DEVICE static void store_run(u8* at, const float (&x)[8]) {
        if constexpr (BITS == 16) {
            using Element = typename Kv::Mma;
            ptx::store(reinterpret_cast<u32x4*>(at),
                       u32x4{Element::pack(x[0], x[1]), Element::pack(x[2], x[3]),
                             Element::pack(x[4], x[5]), Element::pack(x[6], x[7])});
        } else if constexpr (BITS == 8) {
            ptx::store(reinterpret_cast<u32x2*>(at),
                       u32x2{bytes(x[0], x[1], x[2], x[3]), bytes(x[4], x[5], x[6], x[7])});
        } else {
            u32 word = 0;
            UNROLL for (u32 i = 0; i < 8; i++) {
                word |= u32(x[i]) << (i / 2 + i % 2 * 4) * 4;
            }
            ptx::store(reinterpret_cast<u32*>(at), word);
        }
    }

    DEVICE static u32 bytes(float a, float b, float c, float d) {
        return u32(a) | u32(b) << 8 | u32(c) << 16 | u32(d) << 24;
    }

    DEVICE static void append_v(u8* head, u32 place, u32 buffer) {
        if constexpr (BITS == 4) {
            for (u32 i = ptx::lane_idx(); i < DIMS / 2; i += 32) {
                u32 d = i / 8 * 16 + i % 8;
                u32 levels = u32(shared(buffer, d)) | u32(shared(buffer, d + 8)) << 4;
                ptx::store(head + Layout::v_offset(place, d), u8(levels));
            }
        } else {
            for (u32 d = ptx::lane_idx(); d < DIMS; d += 32) {
                u8* at = head + Layout::v_offset(place, d);
                if constexpr (BITS == 8) {
                    ptx::store(at, u8(shared(buffer, d)));
                } else {
                    ptx::store(reinterpret_cast<u16*>(at), Kv::Mma::narrow(shared(buffer, d)));
                }
            }
        }
    }
};

}  // namespace rope
