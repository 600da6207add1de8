// Rows of the embedding table as float32.
//
// Bound: reads one table row and writes one float32 row a token, at the speed of memory.

#pragma once
#include "params.h"
#include "words.cuh"

namespace embed {

// How elements are read: `FLOATS` at once, 16 bytes of the table where they divide its rows.
template <class Table, u32 HIDDEN> struct Source {
    static constexpr u32 FLOATS = HIDDEN % 8 == 0 ? 8 : 1;

    DEVICE static void load(const void* table, u64 element, u32 (&out)[FLOATS]) {
        if constexpr (FLOATS == 1) {
            u16 bits = ptx::load_constant(static_cast<const u16*>(table) + element);
            out[0] = ptx::as_bits(Table::widen(bits));
        } else {
            u32 words[FLOATS / 2];
            load_constant_words(static_cast<const u32*>(table) + element / 2, words);
            UNROLL for (u32 i = 0; i < FLOATS / 2; i++) {
                out[2 * i] = ptx::as_bits(Table::first(words[i]));
                out[2 * i + 1] = ptx::as_bits(Table::second(words[i]));
            }
        }
    }
};

template <u32 HIDDEN> struct Source<F32, HIDDEN> {
    static constexpr u32 FLOATS = HIDDEN % 4 == 0 ? 4 : 1;

    DEVICE static void load(const void* table, u64 element, u32 (&out)[FLOATS]) {
        load_constant_words(static_cast<const u32*>(table) + element, out);
    }
};

// Constants: `Table` (F32, F16 or BF16), `HIDDEN`, `THREADS`.
template <class C> struct Kernel {
    using Elements = Source<typename C::Table, C::HIDDEN>;

    // A block a row, and on to the next.
    DEVICE static void run(const EmbedParams& params) {
        ptx::grid_wait();
        for (u32 row = ptx::block_idx(); row < params.num_rows; row += ptx::num_blocks()) {
            u64 from = u64(ptx::load(params.tokens + row)) * C::HIDDEN;
            u32* out = reinterpret_cast<u32*>(params.out) + u64(row) * C::HIDDEN;
            constexpr u32 STEP = Elements::FLOATS;
            for (u32 i = ptx::thread_idx() * STEP; i < C::HIDDEN; i += C::THREADS * STEP) {
                u32 values[STEP];
                Elements::load(params.table, from + i, values);
                store_words(out + i, values);
            }
        }
        ptx::grid_launch_dependents();
    }
};

}  // namespace embed
