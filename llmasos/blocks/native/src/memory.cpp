#include "memory.h"

#include <algorithm>
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
constexpr size_t AHEAD = 2 * HUGE_PAGE;  // so much is kept ready

struct Region {
    uint8_t* base;
    size_t size, used, live;  // bytes, bytes given out once, blocks that are not released
    size_t touched;           // bytes that the system has found memory for, if `prepare` was first
};

// In front of every block; as long as ALIGNMENT.
struct alignas(ALIGNMENT) Header {
    Region* region;
    size_t bytes;  // of the block, this header included
    Header* next;  // while it is unused
};

std::mutex mutex;
Region* current = nullptr;         // the one that new blocks are cut from
Region* following = nullptr;       // the one after it, where that has been prepared
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
// Advice, both: a kernel that does not take it finds memory when it is written to, and keeps what it has found.
void touch(void* base, size_t bytes) { madvise(base, bytes, MADV_POPULATE_WRITE); }
void empty(void* base, size_t bytes) { madvise(base, bytes, MADV_DONTNEED); }
#else
void* map(size_t bytes) {
    void* base = nullptr;
    if (posix_memalign(&base, ALIGNMENT, bytes) != 0) throw std::bad_alloc();
    return base;
}
void unmap(void* base, size_t) { std::free(base); }
void touch(void*, size_t) {}
void empty(void*, size_t) {}
#endif

Region* make_region(size_t bytes) {
    const size_t rounded = (bytes + SMALL_PAGE - 1) / SMALL_PAGE * SMALL_PAGE;
    return new Region{static_cast<uint8_t*>(map(rounded)), rounded, 0, 0, 0};
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
    if (!current || current->size - current->used < bytes) {
        current = following ? following : make_region(REGION);
        following = nullptr;
    }
    return cut(current, bytes);
}

void give_back(Region* region) {
    for (auto& [bytes, first] : unused)
        for (Header** link = &first; *link;)
            if ((*link)->region == region)
                *link = (*link)->next;
            else
                link = &(*link)->next;
    if (region == current && REGION) {  // the next text begins where this one did
        region->used = 0;
        region->touched = std::min(region->touched, AHEAD);
        return empty(region->base + AHEAD, region->size - AHEAD);
    }
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

void prepare() noexcept {
    Region* region;
    size_t from, to;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (!current) return;
        region = current;
        if (region->size - region->used < AHEAD) {
            if (!following) try {
                following = make_region(REGION);
            } catch (const std::bad_alloc&) {
                return;  // whoever needs it will say so
            }
            region = following;
        }
        from = std::max(region->touched, (region->used + SMALL_PAGE - 1) / SMALL_PAGE * SMALL_PAGE);
        to = from / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE;  // one page, or what is left of one that has been begun
        if (from >= region->used + AHEAD || to > region->size) return;
        region->touched = to;
        region->live++;  // it stays while it is touched
    }
    touch(region->base + from, to - from);
    std::lock_guard<std::mutex> lock(mutex);
    if (--region->live == 0 && region != following) give_back(region);
}

}  // namespace llmasos
