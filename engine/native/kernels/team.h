// The threads of one step: who does which part, and where they wait for each other.
#pragma once
#include <atomic>
#include <sched.h>
#include <stdint.h>

namespace zs {

constexpr int kSpinsBeforeYield = 4000;

// All threads wait until the last arrives. Spins first: the waits inside a step are microseconds long, and
// waking a sleeping thread is not.
class Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
      if (spins < kSpinsBeforeYield) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

struct Range {
  int first, last;
  int size() const { return last - first; }
};

ZS_INLINE Range share(Range all, int index, int count) {
  return {all.first + (int)((int64_t)all.size() * index / count), all.first + (int)((int64_t)all.size() * (index + 1) / count)};
}

}  // namespace zs
