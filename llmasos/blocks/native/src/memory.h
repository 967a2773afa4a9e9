// Aligned memory that asks for huge pages where it is large: weights are read from end to end for every token.
#pragma once

#include <cstddef>

namespace llmasos {

constexpr size_t ALIGNMENT = 64;  // a cache line, and an AVX-512 register

// Zeroed, aligned to ALIGNMENT. Throws std::bad_alloc. A size of 0 gives a pointer that may be freed.
void* allocate(size_t bytes);
void release(void* memory) noexcept;

}  // namespace llmasos
