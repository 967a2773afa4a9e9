// Head: a linear layer by itself, with threads of its own.
//
// Laws:
// - It sees rows as they come, any number of them, and gives each what it would get alone.
// - Memory is taken before anything is computed. One thread calls forward at a time.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "memory.h"
#include "pool.h"

namespace llmasos {

class Head {
  public:
    // Takes the matrix over.
    Head(Matrix* matrix, int threads, const Kernels& kernels);
    ~Head();
    Head(const Head&) = delete;
    Head& operator=(const Head&) = delete;

    int64_t weight_bytes() const { return matrix_->nbytes; }

    // (rows, inputs) -> (rows, outputs), both tight. Throws std::bad_alloc.
    void forward(const float* x, int64_t rows, float* y);

  private:
    Matrix* const matrix_;
    const Kernels& kernels_;
    Pool pool_;
    std::vector<Floats> scratch_;  // of each thread
};

}  // namespace llmasos
