// Words of the CUDA templates: fixed-width integers, vectors as they are loaded, and the two 16-bit
// activation types behind one interface. A 16-bit pair is a `u32`, its first element low.

#pragma once
#include "ptx.cuh"

// float16 activations and weights.
struct F16 {
    DEVICE static u32 pack(float first, float second) { return ptx::cvt_f16x2(first, second); }
    DEVICE static float first(u32 pair) { return ptx::cvt_f32_f16(u16(pair)); }
    DEVICE static float second(u32 pair) { return ptx::cvt_f32_f16(u16(pair >> 16)); }
    DEVICE static float widen(u16 value) { return ptx::cvt_f32_f16(value); }
    DEVICE static u16 narrow(float value) { return u16(ptx::cvt_f16x2(value, 0.0f)); }
    DEVICE static void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        ptx::mma_m16n8k16_f16(d, a, b);
    }
};

// bfloat16 activations and weights.
struct BF16 {
    DEVICE static u32 pack(float first, float second) { return ptx::cvt_bf16x2(first, second); }
    DEVICE static float first(u32 pair) { return ptx::as_float(pair << 16); }
    DEVICE static float second(u32 pair) { return ptx::as_float(pair & 0xffff0000u); }
    DEVICE static float widen(u16 value) { return ptx::as_float(u32(value) << 16); }
    DEVICE static u16 narrow(float value) { return u16(ptx::cvt_bf16x2(value, 0.0f)); }
    DEVICE static void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        ptx::mma_m16n8k16_bf16(d, a, b);
    }
};

// float32 elements, of embedding tables and logits only.
struct F32 {};

DEVICE constexpr u32 div_up(u32 a, u32 b) { return (a + b - 1) / b; }
DEVICE constexpr u32 round_up(u32 a, u32 b) { return div_up(a, b) * b; }
template <class T> DEVICE constexpr T min_of(T a, T b) { return a < b ? a : b; }
template <class T> DEVICE constexpr T max_of(T a, T b) { return a > b ? a : b; }
