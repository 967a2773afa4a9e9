#include "head.h"

#include <cstring>

namespace llmasos {

Head::Head(Matrix* matrix, int threads, const Kernels& kernels) : matrix_(matrix), kernels_(kernels), pool_(threads) {}

Head::~Head() {
    free_matrix(*matrix_);
    delete matrix_;
}

void Head::forward(const float* x, int64_t rows, float* y) {
    const Matrix& m = *matrix_;
    Floats padded(rows * m.padded_inputs);
    for (int64_t row = 0; row < rows; row++)
        std::memcpy(padded.data() + row * m.padded_inputs, x + row * m.inputs, size_t(m.inputs) * sizeof(float));
    while (int(scratch_.size()) < pool_.threads()) scratch_.emplace_back(linear_scratch(m.padded_inputs));
    struct Work {
        Head* head;
        LinearJob job;
    } work{this, {&m, padded.data(), m.padded_inputs, int(rows), y, m.outputs, nullptr}};
    pool_.run(
        [](void* argument, int thread) {
            const auto& [head, job] = *static_cast<Work*>(argument);
            const int64_t panels = job.matrix->panels, threads = head->pool_.threads();
            head->kernels_.linear(job, int(panels * thread / threads), int(panels * (thread + 1) / threads),
                                  head->scratch_[size_t(thread)].data());
        },
        &work);
}

}  // namespace llmasos
