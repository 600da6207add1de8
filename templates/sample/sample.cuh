// Maximum, its smallest index and log-sum-exp of rows of logits; NaN counts as −∞.
//
// Bound: reads a row from memory, and once more from L2; about 8 instructions an element.

#pragma once
#include "params.h"
#include "words.cuh"

namespace sample {

// A value and where it is; `NONE` is after every index.
struct Best {
    float value;
    u32 index;
    static constexpr u32 NONE = 0xffffffffu;
};

// The larger value; of equal ones, the smaller index.
DEVICE Best better(Best a, Best b) {
    bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return second ? b : a;
}

// Constants: `VOCAB`, `THREADS`.
template <class C> struct Kernel {
    // Logits that a thread reads at once.
    static constexpr u32 WIDTH = C::VOCAB % 4 == 0 ? 4 : 1;
    static constexpr u32 WARPS = C::THREADS / 32;
    // Shared memory: the best of each warp, then the sum of each.
    static constexpr u32 SUMS = WARPS * 8;

    // A block a row, and on to the next.
    DEVICE static void run(const SampleParams& params) {
        ptx::grid_wait();
        for (u32 row = ptx::block_idx(); row < params.num_rows; row += ptx::num_blocks()) {
            const u32* logits =
                reinterpret_cast<const u32*>(params.logits) + u64(row) * C::VOCAB;
            Best best = block_best(thread_best(logits));
            float sum = block_sum(thread_sum(logits, best.value));
            if (ptx::thread_idx() == 0) store_stats(params.out + row, best, sum);
        }
        ptx::grid_launch_dependents();
    }

private:
    // NOTE: NaN is neither larger than anything nor equal to it.
    DEVICE static Best thread_best(const u32* logits) {
        Best best = {-INFINITE, Best::NONE};
        for_logits(logits, [&](float value, u32 i) { best = better(best, {value, i}); });
        return best;
    }

    // Σ e^(x − max); of nothing where that would be NaN.
    DEVICE static float thread_sum(const u32* logits, float max) {
        float sum = 0.0f;
        if (ptx::abs(max) == INFINITE) return sum;
        for_logits(logits, [&](float value, u32) {
            float exponential = ptx::ex2((value - max) * LOG2_E);
            sum += value == value ? exponential : 0.0f;
        });
        return sum;
    }

    DEVICE static void store_stats(LogitStatsOut* out, Best best, float sum) {
        u32* words = reinterpret_cast<u32*>(out);
        bool finite = ptx::abs(best.value) != INFINITE;
        float log_sum_exp = finite ? best.value + ptx::lg2(sum) * LN_2 : best.value;
        ptx::store(words, ptx::as_bits(best.value));
        ptx::store(words + 1, best.index == Best::NONE ? 0 : best.index);
        ptx::store(words + 2, ptx::as_bits(log_sum_exp));
    }

    // Calls `body(logit, index)` for this thread's logits, in ascending order.
    template <class Body> DEVICE static void for_logits(const u32* logits, Body body) {
        _Pragma("unroll 4")
        for (u32 i = ptx::thread_idx() * WIDTH; i < C::VOCAB; i += C::THREADS * WIDTH) {
            u32 words[WIDTH];
            load_words(logits + i, words);
            UNROLL for (u32 j = 0; j < WIDTH; j++) body(ptx::as_float(words[j]), i + j);
        }
    }

    // The best of all threads, in each of them.
    DEVICE static Best block_best(Best best) {
        UNROLL for (u32 mask = 16; mask > 0; mask /= 2) {
            best = better(best, {ptx::shfl_xor(best.value, mask), ptx::shfl_xor(best.index, mask)});
        }
        u32 bests = ptx::shared_base();
        if (ptx::lane_idx() == 0) {
            u32x2 words = {ptx::as_bits(best.value), best.index};
            ptx::store_shared(bests + ptx::thread_idx() / 32 * 8, words);
        }
        ptx::block_sync();
        UNROLL for (u32 warp = 0; warp < WARPS; warp++) {
            u32x2 words = ptx::load_shared<u32x2>(bests + warp * 8);
            best = better(best, {ptx::as_float(words.x), words.y});
        }
        return best;
    }

    // The sum over all threads, always added up in the same order.
    // NOTE: between two uses of either place in shared memory lies the barrier of the other.
    DEVICE static float block_sum(float value) {
        UNROLL for (u32 mask = 16; mask > 0; mask /= 2) value += ptx::shfl_xor(value, mask);
        u32 sums = ptx::shared_base() + SUMS;
        if (ptx::lane_idx() == 0) ptx::store_shared(sums + ptx::thread_idx() / 32 * 4, value);
        ptx::block_sync();
        float total = 0.0f;
        UNROLL for (u32 warp = 0; warp < WARPS; warp++) {
            total += ptx::load_shared<float>(sums + warp * 4);
        }
        return total;
    }

    static constexpr float INFINITE = __builtin_huge_valf();
    static constexpr float LOG2_E = 1.44269504f;
    static constexpr float LN_2 = 0.693147181f;
};

}  // namespace sample
