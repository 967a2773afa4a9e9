#include "cache.h"

#include <cstring>

#include "memory.h"

namespace llmasos {

namespace {
int64_t pages_for(int64_t tokens) { return (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS; }
}  // namespace

Cache::~Cache() { truncate(0); }

void Cache::reserve(int first, int last, int64_t tokens) {
    for (int layer = first; layer < last; layer++) {
        std::vector<float*>& pages = pages_[layer];
        const size_t wanted = static_cast<size_t>(pages_for(tokens));
        if (wanted > pages.capacity()) pages.reserve(wanted > 2 * pages.capacity() ? wanted : 2 * pages.capacity());
        while (pages.size() < wanted) pages.push_back(static_cast<float*>(allocate(size_t(page_bytes()))));
    }
}

void Cache::truncate(int64_t tokens) {
    const size_t kept = static_cast<size_t>(pages_for(tokens));
    const int64_t used = tokens % PAGE_TOKENS;
    for (std::vector<float*>& pages : pages_) {
        while (pages.size() > kept) {
            release(pages.back());
            pages.pop_back();
        }
        if (kept == 0) std::vector<float*>().swap(pages);
        // What is cut off may have overflowed, and zero times infinity is not zero.
        if (used == 0 || pages.size() < kept) continue;
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
