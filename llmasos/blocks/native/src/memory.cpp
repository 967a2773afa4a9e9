#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmasos {

namespace {
constexpr size_t HUGE_PAGE = size_t{2} << 20;
}

void* allocate(size_t bytes) {
    // Huge pages only from four of them on: the last one is not filled, and small models would pay for air.
    const size_t alignment = bytes >= 4 * HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    const size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, rounded ? rounded : ALIGNMENT) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == HUGE_PAGE) madvise(memory, rounded, MADV_HUGEPAGE);  // advice: a kernel without them goes on
#endif
    std::memset(memory, 0, rounded);
    return memory;
}

void release(void* memory) noexcept { std::free(memory); }

}  // namespace llmasos
