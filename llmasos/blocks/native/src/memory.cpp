#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmasos {

namespace {

constexpr size_t HUGE_PAGE = size_t{2} << 20, SMALL_PAGE = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t REGION = 0;  // every block a region of its own, so that the sanitizer sees its ends
#else
constexpr size_t REGION = size_t{32} << 20;
#endif

struct Region {
    uint8_t* base;
    size_t size, used, live;  // bytes, bytes given out once, blocks that are not released
};

// In front of every block; as long as ALIGNMENT.
struct alignas(ALIGNMENT) Header {
    Region* region;
    size_t bytes;  // of the block, this header included
    Header* next;  // while it is unused
};

std::mutex mutex;
Region* current = nullptr;          // the one that new blocks are cut from
std::map<size_t, Header*> unused;  // released blocks of regions that still live, by size

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
// From the kernel and back to it: what malloc is given it may keep, however large it is.
void* map(size_t bytes) {
    // Few blocks are no reason to take a huge page: small models would pay for air.
    const bool huge = bytes >= HUGE_PAGE;
    const size_t slack = huge ? HUGE_PAGE : 0;
    void* found = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    if (!huge) return found;
    auto* begin = static_cast<uint8_t*>(found);
    auto* base = begin + (HUGE_PAGE - reinterpret_cast<uintptr_t>(begin) % HUGE_PAGE) % HUGE_PAGE;
    if (base > begin) munmap(begin, size_t(base - begin));
    if (base < begin + slack) munmap(base + bytes, size_t(begin + slack - base));
    madvise(base, bytes, MADV_HUGEPAGE);  // advice: a kernel without them goes on
    return base;
}
void unmap(void* base, size_t bytes) { munmap(base, bytes); }
#else
void* map(size_t bytes) {
    void* base = nullptr;
    if (posix_memalign(&base, ALIGNMENT, bytes) != 0) throw std::bad_alloc();
    return base;
}
void unmap(void* base, size_t) { std::free(base); }
#endif

Region* make_region(size_t bytes) {
    const size_t rounded = (bytes + SMALL_PAGE - 1) / SMALL_PAGE * SMALL_PAGE;
    return new Region{static_cast<uint8_t*>(map(rounded)), rounded, 0, 0};
}

Header* cut(Region* region, size_t bytes) {
    auto* header = new (region->base + region->used) Header{region, bytes, nullptr};
    region->used += bytes;
    return header;
}

Header* find(size_t bytes) {
    Header*& first = unused[bytes];  // made here, where there may be no memory for it, and not when a block is released
    if (Header* header = first) {
        first = header->next;
        return header;
    }
    if (bytes > REGION / 4) return cut(make_region(bytes), bytes);
    if (!current || current->size - current->used < bytes) current = make_region(REGION);
    return cut(current, bytes);
}

void give_back(Region* region) {
    if (region == current) current = nullptr;
    for (auto& [bytes, first] : unused)
        for (Header** link = &first; *link;)
            if ((*link)->region == region)
                *link = (*link)->next;
            else
                link = &(*link)->next;
    unmap(region->base, region->size);
    delete region;
}

}  // namespace

void* allocate(size_t bytes) {
    const size_t rounded = sizeof(Header) + (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Header* header;
    {
        std::lock_guard<std::mutex> lock(mutex);
        header = find(rounded);
        header->region->live++;
    }
    std::memset(header + 1, 0, rounded - sizeof(Header));
    return header + 1;
}

void release(void* memory) noexcept {
    if (!memory) return;
    Header* header = static_cast<Header*>(memory) - 1;
    std::lock_guard<std::mutex> lock(mutex);
    if (--header->region->live == 0) return give_back(header->region);
    Header*& first = unused[header->bytes];
    header->next = first;
    first = header;
}

}  // namespace llmasos
