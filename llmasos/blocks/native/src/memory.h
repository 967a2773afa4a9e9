// Memory for weights and kv, in huge pages: both are read from end to end for every token, and with pages of 4 KiB the
// processor spends up to half of that time on finding them (docs/log.md).
//
// Laws:
// - What is allocated is zeroed and aligned to ALIGNMENT. Any thread may allocate and release.
// - Blocks come out of regions. A released block is reused for one of the same size, which is what kv pages are; a
//   region goes back to the system when its last block is released, but for the beginning of the one in use.
// - What has not been touched is the system's to find when it is: on a virtual machine that took 4 ms for 2 MiB, of a
//   pass of 16 (docs/log.md). `prepare` touches the next blocks' memory while nobody waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace llmasos {

constexpr size_t ALIGNMENT = 64;  // a cache line, and an AVX-512 register

// Throws std::bad_alloc. A size of 0 gives a pointer that may be released.
void* allocate(size_t bytes);
// Null is allowed.
void release(void* memory) noexcept;
// Has the system find up to 2 MiB of what is allocated next. Does nothing, and quickly, where enough is there.
void prepare() noexcept;

// Zeroed floats, aligned.
class Floats {
  public:
    Floats() = default;
    explicit Floats(int64_t count) : data_(static_cast<float*>(allocate(size_t(count) * sizeof(float)))) {}
    Floats(Floats&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Floats& operator=(Floats&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~Floats() { release(data_); }
    float* data() const { return data_; }

  private:
    float* data_ = nullptr;
};

}  // namespace llmasos
