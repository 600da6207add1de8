// Layout of the KV cache: pages of one layer, as `rope` writes and `paged_attention` reads them.
//
// A page holds PAGE token slots of every KV head, head after head. The block of one head is
//
//   K cells  [PAGE / 8][DIMS / 32]     a cell is 8 tokens × 32 dimensions
//   V cells  [PAGE / 8][DIMS / 32]
//   int8, int4 only: K parameters [PAGE], V parameters [PAGE]: float16 scale, float16 minimum
//
// with DIMS = head_dim rounded up to 32; what is beyond head_dim is zero. Inside of a cell the
// elements lie as registers of `mma` want them, so that no thread ever moves an element to another:
// PIECES runs of 8 · 16 bytes, of which lane 0..8 takes 16 bytes each. What a lane holds of a cell
// is a 4 × 8 matrix (j, i), row after row:
//
//   K  lane 4p + t   tokens p + 2j,  dimensions 8t + i
//   V  lane g        dimensions g + 8j,  tokens i
//
// Four cells that follow each other in tokens are the operand of a warp: 32 tokens × 32 dimensions
// are two by two tiles of m16n8k16, in which rows and inner indices stand in an order of their own.
// The other operand is put into the same order, which costs nothing: eight consecutive dimensions of
// a query per lane, and scores come out of the tensor core in the order in which V wants them.
//
// int8 and int4 are unsigned levels, per token and head: value = level · scale + minimum. int4
// holds heads multiplied by a Hadamard matrix (queries too, which leaves scores alone): keys have a
// few dimensions far larger than the others, which would take all of the 16 levels.
//
//   int8  a byte each, in order
//   int4  K: a word for each j, dimension i in nibble i / 2 + 4 (i % 2)
//         V: two words for each two j, tokens 0..4 and 4..8; token i in byte i / 2 % 2 + 2 (i % 2),
//            the even j in its low nibble. A byte never belongs to two tokens, and so tokens may be
//            written at the same time.
//
// Parameters of a page stand in the order of tokens 0 2 4 6 1 3 5 7 of every eight: those that a
// lane needs for its keys are 16 bytes.

#pragma once
#include "types.cuh"

namespace pages {

constexpr u32 OCTET = 8;          // tokens of a cell
constexpr u32 CELL_DIMS = 32;     // dimensions of a cell
constexpr u32 PIECE_BYTES = 128;  // 16 bytes of eight lanes

// Element types. `Mma` is what their values are multiplied as; rows j = 2 tile and + 1 of a lane's
// part of a cell are unpacked to `x[j % 2][i / 2]`, pairs of `Mma` with elements i and i + 1. Of
// quantized types these are level - CENTER, without scale and minimum: numbers around zero, so that
// what is multiplied with them may be rounded to 16 bits.

template <class T> struct Plain {
    static constexpr u32 BITS = 16;
    static constexpr u32 CENTER = 0;
    using Mma = T;
    DEVICE static void unpack(u32 tile, const u32x4 (&pieces)[4], u32 (&x)[2][4]) {
        UNROLL for (u32 j = 0; j < 2; j++) {
            const u32x4& piece = pieces[2 * tile + j];
            x[j][0] = piece.x, x[j][1] = piece.y, x[j][2] = piece.z, x[j][3] = piece.w;
        }
    }
    DEVICE static void unpack_k(u32 tile, const u32x4 (&pieces)[4], u32 (&x)[2][4]) {
        unpack(tile, pieces, x);
    }
    DEVICE static void unpack_v(u32 tile, const u32x4 (&pieces)[4], u32 (&x)[2][4]) {
        unpack(tile, pieces, x);
    }
};

struct KvF16 : Plain<F16> {};
struct KvBF16 : Plain<BF16> {};

// Levels are multiplied as float16, which holds them exactly. 0x6400 is 1024 in float16, and the
// last bit of its mantissa counts 1: an integer n below 1024 in its place is 1024 + n.
constexpr u32 MAGIC = 0x64006400;

struct KvI8 {
    static constexpr u32 BITS = 8;
    static constexpr u32 CENTER = 128;
    using Mma = F16;
    DEVICE static void unpack_four(u32 bytes, u32& first, u32& second) {
        constexpr u32 OFFSET = MAGIC + CENTER * 0x00010001;
        first = ptx::sub_f16x2(ptx::prmt(bytes, MAGIC, 0x5150), OFFSET);
        second = ptx::sub_f16x2(ptx::prmt(bytes, MAGIC, 0x5352), OFFSET);
    }
    DEVICE static void unpack(u32 tile, const u32x4 (&pieces)[2], u32 (&x)[2][4]) {
        unpack_four(pieces[tile].x, x[0][0], x[0][1]);
        unpack_four(pieces[tile].y, x[0][2], x[0][3]);
        unpack_four(pieces[tile].z, x[1][0], x[1][1]);
        unpack_four(pieces[tile].w, x[1][2], x[1][3]);
    }
    DEVICE static void unpack_k(u32 tile, const u32x4 (&pieces)[2], u32 (&x)[2][4]) {
        unpack(tile, pieces, x);
    }
    DEVICE static void unpack_v(u32 tile, const u32x4 (&pieces)[2], u32 (&x)[2][4]) {
        unpack(tile, pieces, x);
    }
};

struct KvI4 {
    static constexpr u32 BITS = 4;
    static constexpr u32 CENTER = 8;
    using Mma = F16;
    // Nibbles n and n + 4 of the word, for n = 0..4.
    DEVICE static void unpack_eight(u32 word, u32& a, u32& b, u32& c, u32& d) {
        a = low(word), b = high(word);
        c = low(word >> 8), d = high(word >> 8);
    }
    DEVICE static void unpack_k(u32 tile, const u32x4 (&pieces)[1], u32 (&x)[2][4]) {
        UNROLL for (u32 j = 0; j < 2; j++) {
            unpack_eight(word(pieces[0], 2 * tile + j), x[j][0], x[j][1], x[j][2], x[j][3]);
        }
    }
    DEVICE static void unpack_v(u32 tile, const u32x4 (&pieces)[1], u32 (&x)[2][4]) {
        UNROLL for (u32 i = 0; i < 2; i++) {
            unpack_eight(word(pieces[0], 2 * tile + i), x[0][2 * i], x[1][2 * i],
                         x[0][2 * i + 1], x[1][2 * i + 1]);
        }
    }

private:
    DEVICE static u32 word(const u32x4& piece, u32 i) {
        return i < 2 ? (i == 0 ? piece.x : piece.y) : (i == 2 ? piece.z : piece.w);
    }
    static constexpr u32 AND_OR = 0xea;
    DEVICE static u32 low(u32 word) {
        constexpr u32 OFFSET = MAGIC + CENTER * 0x00010001;
        return ptx::sub_f16x2(ptx::lop3<AND_OR>(word, 0x000f000f, MAGIC), OFFSET);
    }
    // (1024 + 16 · level) / 16 - (64 + CENTER)
    DEVICE static u32 high(u32 word) {
        return ptx::fma_f16x2(ptx::lop3<AND_OR>(word, 0x00f000f0, MAGIC), 0x2c002c00, 0xd480d480);
    }
};

// Offsets in bytes. Constants: `Kv`, `KV_HEADS`, `HEAD_DIM`, `PAGE`.
template <class C> struct Layout {
    static constexpr u32 BITS = C::Kv::BITS;
    static constexpr bool QUANTIZED = BITS <= 8;
    static constexpr u32 DIMS = (C::HEAD_DIM + CELL_DIMS - 1) / CELL_DIMS * CELL_DIMS;
    static constexpr u32 CELLS = DIMS / CELL_DIMS;
    static constexpr u32 PIECES = BITS / 4;
    static constexpr u32 CELL_BYTES = PIECES * PIECE_BYTES;
    static constexpr u32 OCTET_BYTES = CELLS * CELL_BYTES;
    static constexpr u32 V_OFFSET = C::PAGE / OCTET * OCTET_BYTES;
    static constexpr u32 K_PARAMS_OFFSET = 2 * V_OFFSET;
    static constexpr u32 V_PARAMS_OFFSET = K_PARAMS_OFFSET + 4 * C::PAGE;
    static constexpr u32 HEAD_BYTES = K_PARAMS_OFFSET + (QUANTIZED ? 8 * C::PAGE : 0);
    static constexpr u32 PAGE_BYTES = C::KV_HEADS * HEAD_BYTES;
    static_assert(C::PAGE % 16 == 0 && C::HEAD_DIM % 8 == 0, "whole octets and runs");

    DEVICE static u64 head_offset(u32 page, u32 kv_head) {
        return u64(page) * PAGE_BYTES + kv_head * HEAD_BYTES;
    }

    // Eight dimensions of K from `dim` on, a multiple of 8, of a token: BITS bytes.
    DEVICE static u32 k_offset(u32 place, u32 dim) {
        u32 lane = place % 2 * 4 + dim % CELL_DIMS / 8;
        return cell_offset(place, dim) + lane_offset(lane, place % OCTET / 2 * BITS);
    }

    // An element of V: two bytes, one, or the byte of a dimension and the one 8 further.
    DEVICE static u32 v_offset(u32 place, u32 dim) {
        u32 j = dim % CELL_DIMS / 8, i = place % OCTET;
        u32 at;
        if constexpr (BITS == 4) {
            at = (j / 2 * 2 + i / 4) * 4 + i / 2 % 2 + i % 2 * 2;
        } else {
            at = (j * OCTET + i) * (BITS / 8);
        }
        return V_OFFSET + cell_offset(place, dim) + lane_offset(dim % 8, at);
    }

    // From K_PARAMS_OFFSET or V_PARAMS_OFFSET.
    DEVICE static u32 param_offset(u32 place) {
        return (place / OCTET * OCTET + place % 2 * 4 + place % OCTET / 2) * 4;
    }

private:
    DEVICE static u32 cell_offset(u32 place, u32 dim) {
        return place / OCTET * OCTET_BYTES + dim / CELL_DIMS * CELL_BYTES;
    }

    // Byte `at` of what lane `lane` holds of a cell.
    DEVICE static u32 lane_offset(u32 lane, u32 at) {
        return at / 16 * PIECE_BYTES + lane * 16 + at % 16;
    }
};

// The power of two that divides a head: the size of its Hadamard matrices.
DEVICE constexpr u32 hadamard_size(u32 head_dim) { return head_dim & (~head_dim + 1); }

// 1 / sqrt(hadamard_size)
DEVICE constexpr float hadamard_factor(u32 head_dim) {
    float factor = 1.0f;
    u32 size = hadamard_size(head_dim);
    for (; size >= 4; size /= 4) {
        factor *= 0.5f;
    }
    return size == 2 ? factor * 0.70710678f : factor;
}

}  // namespace pages
