// The C interface that library.py speaks. Handles are pointers; 0 or null says that memory or threads ran out. Nothing
// else fails: arguments are checked on the other side.
#include <exception>

#include "head.h"
#include "memory.h"
#include "stack.h"

#define API extern "C" __attribute__((visibility("default")))

using llmasos::Cache;
using llmasos::Chunk;
using llmasos::Head;
using llmasos::Kernels;
using llmasos::Matrix;
using llmasos::Stack;

namespace {

constexpr int VARIANTS = 3;

// From the fastest to the one that runs everywhere; null where this machine cannot run it.
const Kernels* variant(int index) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (index == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
                   ? &llmasos::kernels_avx512
                   : nullptr;
    if (index == 1) return avx2 ? &llmasos::kernels_avx2 : nullptr;
#endif
    return index == VARIANTS - 1 ? &llmasos::kernels_portable : nullptr;
}

template <class Work>
int succeeded(Work work) {
    try {
        work();
        return 1;
    } catch (const std::exception&) {
        return 0;
    }
}

}  // namespace

// Of the sources that it was built from.
API const char* llmasos_digest() { return LLMASOS_DIGEST; }

// Name of the variant, or null where it does not run here.
API const char* llmasos_variant(int index) {
    const Kernels* found = index >= 0 && index < VARIANTS ? variant(index) : nullptr;
    return found ? found->name : nullptr;
}

// For passes to come, while nobody waits for one.
API void llmasos_prepare() { llmasos::prepare(); }

API Matrix* llmasos_matrix_new(int kind, int outputs, int inputs, const float* weight, const float* bias) {
    Matrix* matrix = nullptr;
    succeeded([&] {
        matrix = new Matrix(llmasos::make_matrix(llmasos::Kind(kind), outputs, inputs, bias != nullptr));
        llmasos::pack(*matrix, weight, bias);
    });
    return matrix;
}

API void llmasos_matrix_unpack(const Matrix* matrix, float* weight) { llmasos::unpack(*matrix, weight); }

API int64_t llmasos_matrix_bytes(const Matrix* matrix) { return matrix->nbytes; }

API void llmasos_matrix_free(Matrix* matrix) {
    llmasos::free_matrix(*matrix);
    delete matrix;
}

API Stack* llmasos_stack_new(const llmasos::Geometry* geometry, int threads, int variant_index) {
    Stack* stack = nullptr;
    succeeded([&] { stack = new Stack(*geometry, threads, *variant(variant_index)); });
    return stack;
}

API void llmasos_stack_free(Stack* stack) { delete stack; }

API int llmasos_stack_add(Stack* stack, const llmasos::LayerSpec* spec) {
    return succeeded([&] { stack->add(*spec); });
}

API int llmasos_stack_rotary(Stack* stack, int table, const float* cosines, const float* sines, int64_t positions,
                             int width) {
    return succeeded([&] { stack->set_rotary(table, cosines, sines, positions, width); });
}

API int64_t llmasos_stack_bytes(const Stack* stack) { return stack->weight_bytes(); }

API int llmasos_stack_forward(Stack* stack, int first, int last, const Chunk* chunks, int count, float* rows) {
    return succeeded([&] { stack->forward(first, last, chunks, count, rows); });
}

API Head* llmasos_head_new(Matrix* matrix, int threads, int variant_index) {
    Head* head = nullptr;
    succeeded([&] { head = new Head(matrix, threads, *variant(variant_index)); });
    return head;
}

API void llmasos_head_free(Head* head) { delete head; }

API int64_t llmasos_head_bytes(const Head* head) { return head->weight_bytes(); }

API int llmasos_head_forward(Head* head, const float* x, int64_t rows, float* y) {
    return succeeded([&] { head->forward(x, rows, y); });
}

API Cache* llmasos_cache_new(const Stack* stack) {
    Cache* cache = nullptr;
    const llmasos::Geometry& g = stack->geometry();
    succeeded([&] { cache = new Cache(stack->layers(), g.kv_heads, g.head_dim); });
    return cache;
}

API void llmasos_cache_free(Cache* cache) { delete cache; }

API Cache* llmasos_cache_fork(const Cache* cache, int64_t tokens) {
    Cache* forked = nullptr;
    succeeded([&] { forked = cache->fork(tokens).release(); });
    return forked;
}

API int llmasos_cache_truncate(Cache* cache, int64_t tokens) {
    return succeeded([&] { cache->truncate(tokens); });
}

API int64_t llmasos_cache_bytes(const Cache* cache) { return cache->nbytes(); }
