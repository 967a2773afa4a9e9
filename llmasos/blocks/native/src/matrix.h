// Matrix: the weight of a linear layer, in the order in which the kernels read it.
//
// Laws:
// - y[n] = bias[n] + sum over k of x[k] * w[n][k]; n counts outputs, k inputs.
// - Outputs lie in panels of 32, and a panel holds all its k one after another, 32 outputs side by side. So a kernel
//   that computes 32 outputs for any number of rows reads one stream from end to end.
// - Missing outputs of the last panel and missing k up to a multiple of GROUP are zero weights.
// - Once packed it does not change, and any number of threads may read it.
//
// One panel, by kind, for each k (K is padded_inputs):
//   FLOAT32   32 floats                                                           K * 128 bytes
//   BFLOAT16  32 words for two k: the lower half of a word is the even one         K *  64 bytes
//   INT8      32 signed bytes; a scale per output is applied to the sum            K *  32 bytes
//   INT4      for 32 k: 32 words of (scale, minimum) in bfloat16, then 4 times     K *  20 bytes
//             32 words of 8 k each, the first in the lowest four bits;
//             a weight is minimum + scale * (0 … 15)
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmasos {

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

constexpr int PANEL = 32;  // outputs of a panel
constexpr int GROUP = 32;  // k that share a scale in INT4, as in GGUF; every length of k is padded to it

constexpr int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Matrix {
    Kind kind;
    int32_t outputs;
    int32_t inputs;
    int32_t padded_inputs;
    int32_t panels;
    int64_t panel_bytes;
    uint8_t* data;   // panels * panel_bytes, aligned to 64
    float* scales;   // INT8: panels * PANEL; else null
    float* bias;     // panels * PANEL, or null
    int64_t nbytes;  // of all of it

    const uint8_t* panel(int index) const { return data + index * panel_bytes; }
};

// Memory for a matrix without weights. Throws std::bad_alloc.
Matrix make_matrix(Kind kind, int outputs, int inputs, bool with_bias);
void free_matrix(Matrix& matrix);

// Pack (and quantise) all outputs from row-major float32, (outputs, inputs). Throws std::exception.
void pack(Matrix& matrix, const float* weight, const float* bias);

// The weights as the kernels use them, row-major float32: what `pack` was given, after rounding.
void unpack(const Matrix& matrix, float* weight);

}  // namespace llmasos
