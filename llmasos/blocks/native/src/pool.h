// Pool: a few threads that run one function together and meet at barriers.
//
// Laws:
// - Who waits spins for some microseconds and then sleeps. Threads that spin for long take the cores of other
//   processes: two programs of two OpenMP threads each on two cores are ten times slower together than alone.
// - `run` is called by one thread at a time, which takes part as thread 0 and returns when all are done.
// - With one thread nothing is started and a barrier is free.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace llmasos {

// A number that grows, and may be waited for.
class Turn {
  public:
    uint32_t now() const { return value_.load(std::memory_order_acquire); }
    void advance();
    // Until `now()` is no longer `seen`; spins that often first.
    void wait_beyond(uint32_t seen, int spins);

  private:
    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

class Pool {
  public:
    using Work = void (*)(void* argument, int thread);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    // Throws std::system_error when a thread cannot be started; nothing has run then.
    void run(Work work, void* argument);
    // Inside of `run`: nobody passes before all have come.
    void meet();

  private:
    void serve(int thread, uint32_t seen);

    const int threads_;
    const int spins_;
    Turn begun_, met_;
    std::atomic<int> missing_;
    std::atomic<bool> closing_{false};
    Work work_ = nullptr;
    void* argument_ = nullptr;
    std::vector<std::thread> workers_;  // started at the first `run`
};

}  // namespace llmasos
