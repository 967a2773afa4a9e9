// Stack: the blocks of a span, and one forward pass of many sessions through some of them.
//
// Laws:
// - All blocks have one geometry (hidden, heads, kv heads, head width, intermediate); what else differs between them is in Layer.
// - A pass takes the rows of all sessions laid end to end, and gives as many. A session's rows are consecutive
//   positions behind what its cache holds. What they become does not depend on the other rows (see kernels.h).
// - Memory is taken before anything is computed: a pass that fails has changed no position of any session.
// - One thread calls forward at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "matrix.h"
#include "pool.h"

namespace llmasos {

struct Geometry {
    int32_t hidden, heads, kv_heads, head_dim;
};

// A norm that is not there has no weight.
struct Norm {
    const float* weight;
    float eps;
};

// As it comes in from outside. Norm weights are copied; matrices are taken over.
struct LayerSpec {
    Norm pre_attention, post_attention, pre_mlp, post_mlp;  // hidden floats each
    Norm query_norm, key_norm;                              // head_dim floats each
    Matrix* qkv;       // outputs: heads, then kv heads of keys, then of values; times head_dim
    Matrix* out;       // inputs: heads * head_dim
    Matrix* gate_up;   // outputs: 16 gates, 16 ups, and so on; padded with zeros to 32
    Matrix* down;      // inputs: intermediate
    int32_t activation;
    int32_t rotary;        // index of a rotary table, or -1
    int32_t rotary_width;  // how much of a head is rotated, from the front
    int64_t window;
    float scale, softcap;
};

// Rows of one session.
struct Chunk {
    Cache* cache;
    int64_t position;
    int64_t rows;
};

class Stack {
  public:
    Stack(Geometry geometry, int threads, const Kernels& kernels);
    ~Stack();
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    void add(const LayerSpec& spec);
    // Angles for the positions [0, positions): (positions, width) each. Borrowed until the next call for `table`.
    void set_rotary(int table, const float* cosines, const float* sines, int64_t positions, int width);

    int layers() const { return static_cast<int>(layers_.size()); }
    const Geometry& geometry() const { return geometry_; }
    int64_t weight_bytes() const { return weight_bytes_; }

    // Rows (sum of the chunks' rows, hidden), in place, through the layers [first, last). Throws std::bad_alloc.
    void forward(int first, int last, const Chunk* chunks, int count, float* rows);

  private:
    struct Layer;
    struct Rotary {
        const float *cosines, *sines;
        int64_t positions;
        int width;
    };
    // Rows of one session whose positions lie in one page, and one kv head.
    struct Piece {
        int chunk;
        int64_t row, rows;  // in the pass
        int64_t position;
        int kv_head;
    };
    struct Pass;
    struct Buffers;
    struct Scratch;

    void plan(const Chunk* chunks, int count, Pass& pass);
    void work(Pass& pass, int thread);
    void run_layer(Pass& pass, int index, int thread, Scratch& own);
    const float* normed(Pass& pass, const Norm& norm, int thread, Scratch& own);
    void project(Pass& pass, const Matrix& matrix, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                 const float* residual, int thread, Scratch& own);
    void add_branch(Pass& pass, const Matrix& matrix, const float* x, int64_t x_stride, const Norm& norm, int thread,
                    Scratch& own);
    void write_kv(Pass& pass, const Layer& layer, int index, int64_t row, int kv_head, Scratch& own);
    void attend(Pass& pass, const Layer& layer, int index, const Piece& piece, Scratch& own);
    void gate(Pass& pass, const Layer& layer, int thread);

    Geometry geometry_;
    const Kernels& kernels_;
    Pool pool_;
    std::vector<std::unique_ptr<Layer>> layers_;
    std::vector<Rotary> rotary_;
    std::unique_ptr<Buffers> buffers_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
    int64_t weight_bytes_ = 0;
};

}  // namespace llmasos
