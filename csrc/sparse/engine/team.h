// Threads that go through rounds of work together. Each takes items of its own share first, in order, so that it
// finds in its cache what it wrote in the round before; then what others have left. However many threads there
// really are, all items are done. Who waits spins for a moment, and then lets others run.
#pragma once

#include <ATen/Parallel.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace drive::engine {

class Team {
 public:
  Team(int threads, int64_t rounds)
      : threads_(threads), shares_(new Share[rounds * threads]), done_(new Done[rounds]) {}

  // work(thread) calls `round` for every round, in the same order.
  template <class Work>
  void run(const Work& work) {
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t) { work(static_cast<int>(begin)); });
  }

  // item(i) for those of the round's items that fall to this thread; returns when all are done.
  template <class Item>
  void round(int64_t round, int thread, int64_t items, const Item& item) {
    int64_t mine = 0;
    for (int other = 0; other < threads_; ++other) {
      const int t = (thread + other) % threads_;
      Share& share = shares_[round * threads_ + t];
      const int64_t begin = items * t / threads_, end = items * (t + 1) / threads_;
      if (other > 0 && share.taken.load(std::memory_order_relaxed) >= end - begin) continue;
      for (int64_t i; (i = begin + share.taken.fetch_add(1, std::memory_order_relaxed)) < end; ++mine) item(i);
    }
    std::atomic<int64_t>& done = done_[round].items;
    done.fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 0; done.load(std::memory_order_acquire) < items;) {
      if (++spins < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some 30 us: a round's usual wait is shorter

  struct alignas(64) Share {
    std::atomic<int64_t> taken{0};
  };
  struct alignas(64) Done {
    std::atomic<int64_t> items{0};
  };

  static void pause() {
#if defined(__SSE2__)
    _mm_pause();
#endif
  }

  int threads_;
  std::unique_ptr<Share[]> shares_;
  std::unique_ptr<Done[]> done_;
};

}  // namespace drive::engine
