// Launch parameters of the CUDA kernels, one struct an op, passed by value.
//
// The Rust side is `engine/src/backend/cuda/params.rs`, which bindgen derives from this file; a
// test compares the two. Device pointers are plain 64-bit numbers there.
//
// "16-bit rows" are rows of the kernel's activation type, float16 or bfloat16.

#pragma once
#include <stdint.h>

#if defined(__cplusplus)
#define BESPOKE_PTR(type) type*
#else
#define BESPOKE_PTR(type) uint64_t
#endif

// out[i] = table[tokens[i]]
typedef struct {
    BESPOKE_PTR(const void) table;       // [vocab, hidden] float32, float16 or bfloat16
    BESPOKE_PTR(const uint32_t) tokens;  // [num_rows]
    BESPOKE_PTR(float) out;              // [num_rows, hidden]
    uint32_t num_rows;
    uint32_t pad;
} EmbedParams;

// residual[s] += delta[s]; out[i] = rms_norm(residual[s]) · weight, with s = select[i] or i
typedef struct {
    BESPOKE_PTR(float) residual;         // [rows, hidden]
    BESPOKE_PTR(const void) delta;       // 16-bit [rows, hidden], or null
    BESPOKE_PTR(const float) weight;     // [hidden]
    BESPOKE_PTR(const uint32_t) select;  // [num_rows], or null for every row
    BESPOKE_PTR(void) out;               // 16-bit [num_rows, hidden]
    uint32_t num_rows;
    float epsilon;
} RmsNormParams;

// out = x · weightᵀ + bias; the same struct for dense and AWQ weights
typedef struct {
    BESPOKE_PTR(const void) weight;      // packed by the engine
    BESPOKE_PTR(const void) scales;      // AWQ: packed scales and zeros; null for dense weights
    BESPOKE_PTR(const float) bias;       // [n], or null
    BESPOKE_PTR(const void) x;           // 16-bit [num_rows, k]
    BESPOKE_PTR(void) out;               // [num_rows, n], 16-bit or float32
    BESPOKE_PTR(float) workspace;        // partial sums of blocks that share an output
    BESPOKE_PTR(uint32_t) counters;      // zero before and after every launch
    uint32_t num_rows;
    uint32_t pad;
} LinearParams;

// QK-norm, rotation of q in place, append of k and v to their pages
typedef struct {
    BESPOKE_PTR(void) qkv;               // 16-bit [num_rows, (heads + 2 kv_heads) · head_dim]
    BESPOKE_PTR(const float) cos_sin;    // [num_rows, rotary_dim]: cosines, then sines
    BESPOKE_PTR(const uint32_t) slots;   // [num_rows]: page · page size + place in the page
    BESPOKE_PTR(const float) q_norm;     // [head_dim], or null without QK-norm
    BESPOKE_PTR(const float) k_norm;     // [head_dim], or null
    BESPOKE_PTR(void) kv_cache;          // pages of the layer
    uint32_t num_rows;
    float epsilon;
} RopeParams;

// One sequence's rows of a batch, as in the engine's `SequenceSpan`.
typedef struct {
    uint32_t first_row;
    uint32_t num_rows;
    uint32_t first_page;                 // index into the page table
    uint32_t context_len;                // tokens of the sequence, these rows included
} AttentionSpan;

// A share of the work: `num_rows` query rows of a span against the keys
// first_key .. first_key + num_keys. Items of one span lie together, in the order of their keys.
typedef struct {
    uint32_t span;
    uint32_t first_row;                  // in the batch
    uint32_t num_rows;
    uint32_t first_key;
    uint32_t num_keys;
    uint32_t part;                       // which of the parts of these rows' keys this is
    uint32_t num_parts;                  // 1: the result is final
    uint32_t first_part;                 // place of part 0 in the workspace
} AttentionItem;

typedef struct {
    BESPOKE_PTR(const void) qkv;              // 16-bit [num_rows, (heads + 2 kv_heads) · head_dim]
    BESPOKE_PTR(const void) kv_cache;         // pages of the layer
    BESPOKE_PTR(const AttentionSpan) spans;
    BESPOKE_PTR(const AttentionItem) items;
    BESPOKE_PTR(const uint32_t) num_items;    // on the device, so that graphs can be replayed
    BESPOKE_PTR(const uint32_t) page_table;
    BESPOKE_PTR(void) out;                    // 16-bit [num_rows, heads · head_dim]
    BESPOKE_PTR(float) workspace;             // partial outputs, maxima and sums
    BESPOKE_PTR(uint32_t) counters;           // zero before and after every launch
    float scale;                              // of the scores
    uint32_t pad;
} PagedAttentionParams;

// out = silu(gate) · up
typedef struct {
    BESPOKE_PTR(const void) gate_up;     // 16-bit [num_rows, 2 · intermediate]
    BESPOKE_PTR(void) out;               // 16-bit [num_rows, intermediate]
    uint32_t num_rows;
    uint32_t pad;
} SiluAndMulParams;

// Statistics of a row of logits, as the engine's `LogitStats`.
typedef struct {
    float max;
    uint32_t argmax;                     // the lowest index of the maximum
    float log_sum_exp;
} LogitStatsOut;

typedef struct {
    BESPOKE_PTR(const float) logits;     // [num_rows, vocab]
    BESPOKE_PTR(LogitStatsOut) out;      // [num_rows]
    uint32_t num_rows;
    uint32_t pad;
} SampleParams;
