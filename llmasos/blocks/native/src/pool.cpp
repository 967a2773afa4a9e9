#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llmasos {

namespace {

constexpr int SPINS = 2000;  // 20 - 40 microseconds, longer than a barrier takes when nobody is in the way

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void Turn::advance() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    // Under the lock, so that nobody is between looking and sleeping.
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
}

void Turn::wait_beyond(uint32_t seen, int spins) {
    for (int i = 0; i < spins; i++) {
        if (now() != seen) return;
        pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

Pool::Pool(int threads)
    : threads_(threads > 0 ? threads : 1),
      spins_(static_cast<unsigned>(threads_) <= std::thread::hardware_concurrency() ? SPINS : 0),
      missing_(threads_) {}

Pool::~Pool() {
    closing_.store(true);
    begun_.advance();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Work work, void* argument) {
    work_ = work;
    argument_ = argument;
    for (int thread = static_cast<int>(workers_.size()) + 1; thread < threads_; thread++)
        workers_.emplace_back([this, thread, seen = begun_.now()] { serve(thread, seen); });
    if (threads_ > 1) begun_.advance();
    work(argument, 0);
    meet();
}

void Pool::serve(int thread, uint32_t seen) {
    for (;;) {
        begun_.wait_beyond(seen, spins_);
        seen = begun_.now();
        if (closing_.load()) return;
        work_(argument_, thread);
        meet();
    }
}

void Pool::meet() {
    if (threads_ == 1) return;
    const uint32_t seen = met_.now();
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        missing_.store(threads_, std::memory_order_relaxed);
        met_.advance();
    } else {
        met_.wait_beyond(seen, spins_);
    }
}

}  // namespace llmasos
