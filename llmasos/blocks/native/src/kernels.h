// Kernels: what is compiled once per instruction set, as a table of functions.
//
// Laws:
// - A result is a function of its own row, and for attention of its own session's kv. No sum is cut otherwise when
//   there are more rows, other tiles or more threads: one order of summation per output element, everywhere.
// - Rows are padded with zeros to a multiple of GROUP floats, and their widths here are those real ones.
// - Nothing here allocates, locks or fails. Buffers do not overlap unless it is said.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace llmasos {

enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

constexpr int PAGE_TOKENS = 64;  // positions of a kv page; attention sums page by page
constexpr int TILE_ROWS = 12;    // most rows of x, or queries, that a tile of registers holds

// Rows of x times a matrix.
struct LinearJob {
    const Matrix* matrix;
    const float* x;  // (rows, padded inputs), stride x_stride
    int64_t x_stride;
    int rows;
    float* y;  // (rows, outputs), stride y_stride
    int64_t y_stride;
    const float* residual;  // added to y where not null; same stride, may be y itself
};

// Some queries of one session that share a kv head and a page of positions.
struct AttentionJob {
    int queries;  // 1 … TILE_ROWS
    const float* query[TILE_ROWS];  // head_dim each
    float* out[TILE_ROWS];          // head_dim each; may be the query
    int64_t position[TILE_ROWS];    // all in the same page: position / PAGE_TOKENS is one number
    const float* const* pages;      // of one session and block
    int64_t keys_at, values_at;     // where the kv head begins in each page
    int head_dim;
    int64_t window;  // a query sees this many positions, itself included; huge where there is no window
    float scale;
    float softcap;  // 0: none
    float* scratch;  // attention_scratch(head_dim) floats
};

// A page of one kv head: keys as (head_dim, PAGE_TOKENS), values as (PAGE_TOKENS, padded head_dim).
constexpr int64_t value_width(int head_dim) { return rounded_up(head_dim, 16); }
constexpr int64_t page_floats(int head_dim) { return PAGE_TOKENS * (head_dim + value_width(head_dim)); }

constexpr int64_t attention_scratch(int head_dim) {
    return TILE_ROWS * (rounded_up(head_dim, 16) + PAGE_TOKENS + value_width(head_dim));
}
// A panel as float32 (only where it is another kind), and a tile of results.
constexpr int64_t linear_scratch(int padded_inputs) { return (int64_t{padded_inputs} + 4 * TILE_ROWS) * PANEL; }

struct Kernels {
    const char* name;

    // Panels [begin, end) of a job.
    void (*linear)(const LinearJob& job, int begin, int end, float* scratch);

    // y = x / rms(x) * weight (+ residual): `width` counts, up to `padded` all is zero. y may be x or the residual.
    void (*rms_norm)(const float* x, const float* weight, float eps, int width, int padded, const float* residual,
                     float* y);

    // The same for a head of any width, in place; `weight` has rounded_up(width, 16) floats, `scratch` as many.
    void (*head_norm)(float* head, const float* weight, float eps, int width, float* scratch);

    // The first `width` numbers of a head, in place: x * cos + rotate_half(x) * sin.
    void (*rotate)(float* head, const float* cos, const float* sin, int width);

    // From (16 gates, 16 ups) pairs to act(gate) * up: `pairs` of them.
    void (*gate)(Activation activation, const float* gates_and_ups, int pairs, float* out);

    void (*attend)(const AttentionJob& job);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace llmasos
