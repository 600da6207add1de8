// 16-bit floating point on the CPU, and the approximate functions of the device at the accuracy of
// the C library.

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace number {

template <class To, class From> inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// A 16-bit format: bits of the exponent and of the stored mantissa.
struct F16 {
    static constexpr int EXPONENT = 5, MANTISSA = 10;
};
struct BF16 {
    static constexpr int EXPONENT = 8, MANTISSA = 7;
};

// Exact.
template <class F> inline float widen(uint16_t bits) {
    if constexpr (F::EXPONENT == 8) return bit_cast<float>(uint32_t(bits) << 16);
    uint32_t sign = uint32_t(bits & 0x8000) << 16;
    uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent > 0) return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

// To nearest, ties to even. NaN becomes the device's canonical one.
template <class F> inline uint16_t round(double value) {
    constexpr int BIAS = (1 << (F::EXPONENT - 1)) - 1;
    constexpr uint16_t INFINITE = ((1 << F::EXPONENT) - 1) << F::MANTISSA;
    uint64_t bits = bit_cast<uint64_t>(value);
    uint16_t sign = bits >> 63 << 15;
    if (value != value) return 0x7fff;
    int exponent = int(bits >> 52 & 2047) - 1023;
    if (exponent > BIAS) return sign | INFINITE;
    // The mantissa with its leading one, to be cut by `shift` bits.
    uint64_t mantissa = (bits & 0xfffffffffffff) | (uint64_t(exponent > -1023) << 52);
    int shift = 52 - F::MANTISSA;
    if (exponent < 1 - BIAS) shift += 1 - BIAS - exponent;
    if (shift > 54) return sign;
    uint64_t kept = mantissa >> shift, rest = mantissa & ((uint64_t(1) << shift) - 1);
    uint64_t tie = uint64_t(1) << (shift - 1);
    kept += rest > tie || (rest == tie && (kept & 1));
    // A leading one that is kept counts once too often in the exponent field.
    uint64_t field = exponent < 1 - BIAS ? 0 : uint64_t(exponent + BIAS - 1);
    uint64_t result = (field << F::MANTISSA) + kept;
    return sign | uint16_t(result > INFINITE ? INFINITE : result);
}

template <class F> inline uint32_t round_pair(float first, float second) {
    return round<F>(first) | uint32_t(round<F>(second)) << 16;
}

// a + b in float64, rounded to odd: rounding that once more to 16 bits is rounding the exact sum.
inline double add_to_odd(double a, double b) {
    double sum = a + b;
    double b_part = sum - a;
    double error = (a - (sum - b_part)) + (b - b_part);
    uint64_t bits = bit_cast<uint64_t>(sum);
    if (!(error != 0) || !isfinite(sum) || (bits & 1)) return sum;
    return bit_cast<double>(signbit(error) == signbit(sum) ? bits + 1 : bits - 1);
}

// `operation` on both halves of pairs, in float64, rounded once.
template <class F, class Operation>
inline uint32_t on_pairs(uint32_t a, uint32_t b, uint32_t c, Operation operation) {
    auto half = [&](int shift) -> uint32_t {
        return round<F>(operation(double(widen<F>(uint16_t(a >> shift))),
                                  double(widen<F>(uint16_t(b >> shift))),
                                  double(widen<F>(uint16_t(c >> shift)))));
    };
    return half(0) | half(16) << 16;
}

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

}  // namespace number
