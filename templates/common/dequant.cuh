// int4 weights and their zeros to 16-bit integers, exactly.
//
// A word holds a lane's A fragment of m16n8k16: register r has its two elements in nibbles r and
// r + 4. Put under the exponent of 2^m, where 2^m is the weight of the mantissa's last bit, a nibble
// q reads as 2^m + q; subtracting 2^m + zero leaves q − zero, without rounding.
//
// The zero of the tile's rows 0..8 (registers 0 and 2) and of rows 8..16 (registers 1 and 3) is
// stored as the number that is added.

#pragma once
#include "types.cuh"

namespace dequant {

// (a & b) | c
constexpr u32 AND_OR = 0xea;

template <class Rows> struct Int4;

// Nibbles 0 and 4 are the last bits of the mantissas of 1024; one nibble higher they count 16-fold,
// which the fused multiply-add takes back. Zeros are −(1024 + zero) and −(64 + zero).
template <> struct Int4<F16> {
    static constexpr u32 EXPONENT = 0x64006400;
    static constexpr u32 SIXTEENTH = 0x2c002c00;

    DEVICE static void fragment(u32 (&a)[4], u32 q, u32 low_zero, u32 high_zero) {
        u32 next = q >> 8;
        a[0] = ptx::add_f16x2(ptx::lop3<AND_OR>(q, 0x000f000f, EXPONENT), low_zero);
        a[1] = ptx::fma_f16x2(ptx::lop3<AND_OR>(q, 0x00f000f0, EXPONENT), SIXTEENTH, high_zero);
        a[2] = ptx::add_f16x2(ptx::lop3<AND_OR>(next, 0x000f000f, EXPONENT), low_zero);
        a[3] = ptx::fma_f16x2(ptx::lop3<AND_OR>(next, 0x00f000f0, EXPONENT), SIXTEENTH, high_zero);
    }
};

// The mantissa has 7 bits: 128 + q is the only exact form. Zeros are −(128 + zero).
template <> struct Int4<BF16> {
    static constexpr u32 EXPONENT = 0x43004300;
    static constexpr u32 ONE = 0x3f803f80;

    DEVICE static void fragment(u32 (&a)[4], u32 q, u32 low_zero, u32 high_zero) {
        a[0] = number(q, low_zero);
        a[1] = number(q >> 4, high_zero);
        a[2] = number(q >> 8, low_zero);
        a[3] = number(q >> 12, high_zero);
    }

private:
    DEVICE static u32 number(u32 q, u32 zero) {
        return ptx::fma_bf16x2(ptx::lop3<AND_OR>(q, 0x000f000f, EXPONENT), ONE, zero);
    }
};

}  // namespace dequant
