#include "cache.h"

#include <atomic>
#include <cstring>

#include "memory.h"

namespace llmasos {

namespace {

int64_t pages_for(int64_t tokens) { return (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS; }

// How many caches hold a page: in front of it, on a line of its own.
using Holders = std::atomic<int64_t>;
static_assert(sizeof(Holders) <= ALIGNMENT, "the holders of a page do not fit in front of it");

Holders* holders(float* page) { return reinterpret_cast<Holders*>(reinterpret_cast<char*>(page) - ALIGNMENT); }

void let_go(float* page) {
    // Whoever is last frees it, and must see what the others did to it before.
    if (holders(page)->fetch_sub(1, std::memory_order_acq_rel) == 1) release(holders(page));
}

}  // namespace

float* Cache::make_page() const {
    auto* memory = static_cast<char*>(allocate(ALIGNMENT + size_t(page_bytes())));
    new (memory) Holders(1);
    return reinterpret_cast<float*>(memory + ALIGNMENT);
}

std::unique_ptr<Cache> Cache::fork(int64_t tokens) const {
    auto forked = std::make_unique<Cache>(int(pages_.size()), kv_heads_, head_dim_);
    const size_t count = static_cast<size_t>(tokens / PAGE_TOKENS);
    for (size_t layer = 0; layer < pages_.size(); layer++) {
        if (pages_[layer].empty()) continue;  // of blocks that the session does not run through
        std::vector<float*>& pages = forked->pages_[layer];
        pages.reserve(count);
        for (size_t page = 0; page < count; page++) {
            holders(pages_[layer][page])->fetch_add(1, std::memory_order_relaxed);
            pages.push_back(pages_[layer][page]);
        }
    }
    return forked;
}

Cache::~Cache() { truncate(0); }

void Cache::reserve(int first, int last, int64_t tokens) {
    for (int layer = first; layer < last; layer++) {
        std::vector<float*>& pages = pages_[layer];
        const size_t wanted = static_cast<size_t>(pages_for(tokens));
        if (wanted > pages.capacity()) pages.reserve(wanted > 2 * pages.capacity() ? wanted : 2 * pages.capacity());
        while (pages.size() < wanted) pages.push_back(make_page());
    }
}

void Cache::truncate(int64_t tokens) {
    const size_t kept = static_cast<size_t>(pages_for(tokens));
    const int64_t used = tokens % PAGE_TOKENS;
    for (std::vector<float*>& pages : pages_) {
        while (pages.size() > kept) {
            let_go(pages.back());
            pages.pop_back();
        }
        if (kept == 0) std::vector<float*>().swap(pages);
        // What is cut off may have overflowed, and zero times infinity is not zero.
        if (used == 0 || pages.size() < kept) continue;
        if (holders(pages.back())->load(std::memory_order_acquire) > 1) {
            float* own = make_page();
            std::memcpy(own, pages.back(), size_t(page_bytes()));
            let_go(pages.back());
            pages.back() = own;
        }
        for (int head = 0; head < kv_heads_; head++) {
            const int64_t width = value_width(head_dim_);
            float* values = pages[kept - 1] + values_at(head);
            std::memset(values + used * width, 0, sizeof(float) * size_t((PAGE_TOKENS - used) * width));
        }
    }
}

void Cache::write(int layer, int kv_head, int64_t position, const float* key, const float* value) {
    float* page = pages_[layer][size_t(position / PAGE_TOKENS)];
    const int64_t slot = position % PAGE_TOKENS;
    float* keys = page + keys_at(kv_head) + slot;
    for (int d = 0; d < head_dim_; d++) keys[int64_t{d} * PAGE_TOKENS] = key[d];
    std::memcpy(page + values_at(kv_head) + slot * value_width(head_dim_), value, sizeof(float) * size_t(head_dim_));
}

int64_t Cache::nbytes() const {
    int64_t count = 0;
    for (const std::vector<float*>& pages : pages_) count += static_cast<int64_t>(pages.size());
    return count * page_bytes();
}

}  // namespace llmasos
