// The threads of one step, and how they share its work.
#pragma once
#include <atomic>
#include <sched.h>
#include <stdint.h>

namespace zs {

constexpr int kSpinsBeforeYield = 1000;

struct Range {
  int first, last;
  int size() const { return last - first; }
};

ZS_INLINE Range share(Range all, int index, int count) {
  return {all.first + (int)((int64_t)all.size() * index / count), all.first + (int)((int64_t)all.size() * (index + 1) / count)};
}

// A part of a step that threads do together: each takes items, one after the other, and goes on when all are done.
// Who gets which is left to the moment, so a thread that the system has put aside holds up the one item it has taken,
// and no more: the others do the rest without it, and it catches up.
class alignas(64) Part {
 public:
  static constexpr int kMostItems = 64;  // of `run_own_first`

  void reset() {
    taken_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
  }

  // Calls work(i) for items of [0, num_items) that no other thread has, in order. Afterwards, whatever any of them wrote
  // is seen.
  template <class Work>
  void run(int num_items, Work work) {
    int count = 0;
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < num_items; count++) work(i);
    finish(count, num_items);
  }

  // As `run`, but a thread takes its own share first, which lies in one piece, and then of the others' from their ends.
  template <class Work>
  void run_own_first(int num_items, int index, int threads, Work work) {
    const Range own = share({0, num_items}, index, threads);
    int count = 0;
    for (int i = own.first; i < own.last; i++)
      if (take(i)) work(i), count++;
    for (int i = num_items - 1; i >= 0; i--)
      if (take(i)) work(i), count++;
    finish(count, num_items);
  }

 private:
  bool take(int item) {
    const uint64_t bit = (uint64_t)1 << item;
    return !(taken_.load(std::memory_order_relaxed) & bit) && !(taken_.fetch_or(bit, std::memory_order_relaxed) & bit);
  }

  void finish(int count, int num_items) {
    if (count) done_.fetch_add(count, std::memory_order_acq_rel);
    // Spins first: such a wait is microseconds long, and waking a sleeping thread is not.
    for (int spins = 0; done_.load(std::memory_order_acquire) < num_items; spins++) {
      if (spins < kSpinsBeforeYield) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

  std::atomic<uint64_t> taken_{0};
  std::atomic<int> next_{0}, done_{0};
};

}  // namespace zs
