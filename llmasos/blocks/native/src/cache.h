// Cache: keys and values of one session, in pages of 64 positions.
//
// Laws:
// - Pages are made when the first of their positions is written and freed when the last is cut off.
// - A page holds, for each kv head, the keys as (head_dim, 64) and the values as (64, head_dim padded to 16): the way
//   the kernels read them as weights. Values behind the last position are finite.
// - A page may be shared with caches that were forked from this one. Nobody writes to a shared page: positions are
//   written behind the last one only, and the page that holds the end is copied when it is cut back to there.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace llmasos {

class Cache {
  public:
    Cache(int layers, int kv_heads, int head_dim) : kv_heads_(kv_heads), head_dim_(head_dim), pages_(layers) {}
    ~Cache();
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;

    // Room for `tokens` positions in the layers [first, last). Throws std::bad_alloc; nothing is lost then.
    void reserve(int first, int last, int64_t tokens);
    // Forget the positions from `tokens` on, in all layers.
    void truncate(int64_t tokens);

    // A cache that holds the first `tokens` positions, which must be whole pages; no byte of them is copied. Throws
    // std::bad_alloc.
    std::unique_ptr<Cache> fork(int64_t tokens) const;

    float* const* pages(int layer) const { return pages_[layer].data(); }
    int64_t keys_at(int kv_head) const { return kv_head * page_floats(head_dim_); }
    int64_t values_at(int kv_head) const { return keys_at(kv_head) + int64_t{PAGE_TOKENS} * head_dim_; }

    // One position of one kv head, head_dim floats each.
    void write(int layer, int kv_head, int64_t position, const float* key, const float* value);

    int64_t page_bytes() const { return kv_heads_ * page_floats(head_dim_) * int64_t{sizeof(float)}; }
    int64_t nbytes() const;

  private:
    float* make_page() const;

    int kv_heads_, head_dim_;
    std::vector<std::vector<float*>> pages_;  // by layer
};

}  // namespace llmasos
