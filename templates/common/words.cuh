// Runs of 32-bit words in global memory, moved 16 bytes at once where they are long enough.

#pragma once
#include "types.cuh"

// `N` is 1 or a multiple of 4; runs of 4 are aligned to 16 bytes.

template <u32 N> DEVICE void load_words(const u32* address, u32 (&words)[N]) {
    if constexpr (N == 1) {
        words[0] = ptx::load(address);
    } else {
        UNROLL for (u32 i = 0; i < N; i += 4) {
            u32x4 four = ptx::load(reinterpret_cast<const u32x4*>(address + i));
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
    }
}

template <u32 N> DEVICE void load_constant_words(const u32* address, u32 (&words)[N]) {
    if constexpr (N == 1) {
        words[0] = ptx::load_constant(address);
    } else {
        UNROLL for (u32 i = 0; i < N; i += 4) {
            u32x4 four = ptx::load_constant(reinterpret_cast<const u32x4*>(address + i));
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
    }
}

template <u32 N> DEVICE void store_words(u32* address, const u32 (&words)[N]) {
    if constexpr (N == 1) {
        ptx::store(address, words[0]);
    } else {
        UNROLL for (u32 i = 0; i < N; i += 4) {
            u32x4 four = {words[i], words[i + 1], words[i + 2], words[i + 3]};
            ptx::store(reinterpret_cast<u32x4*>(address + i), four);
        }
    }
}
