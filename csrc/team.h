// The threads of one call: they share tasks through counters and meet at barriers, inside one parallel region of the
// OpenMP runtime that the process already has (a second pool would fight with the first).
#pragma once

#include <stdint.h>

#include <atomic>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace teal {

class Team {
 public:
  // Runs `function(task)` for every task in [0, count) on whichever thread is free; returns when all are done.
  // Every thread of the team calls it, the first time with `stage` 0, then 1, 0, 1, ...
  template <class Function>
  void share(int stage, int size, int64_t count, Function function) {
    std::atomic<int64_t>& next = next_[stage];
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) function(task);
    wait(size, next_[1 - stage]);
  }

 private:
  // The last to arrive resets the counter of the stage before, which everybody has left.
  void wait(int size, std::atomic<int64_t>& counter) {
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      counter.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < 4000) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

  std::atomic<int64_t> next_[2] = {};
  std::atomic<int> arrived_{0}, generation_{0};
};

// One thread's view of its team.
class Member {
 public:
  Member(Team& team, int size, int rank) : team_(team), size_(size), rank_(rank) {}

  template <class Function>
  void share(int64_t count, Function function) {
    team_.share(stage_, size_, count, function);
    stage_ = 1 - stage_;
  }
  bool first() const { return rank_ == 0; }

 private:
  Team& team_;
  const int size_, rank_;
  int stage_ = 0;
};

inline int threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 0;
#endif
}

// Calls `function(member)` once per thread; on one thread if there is little to do.
template <class Function>
void with_team(bool little, Function function) {
  Team team;
#if defined(_OPENMP)
  if (!little && threads() > 1) {
#pragma omp parallel
    {
      Member member(team, omp_get_num_threads(), omp_get_thread_num());
      function(member);
    }
    return;
  }
#endif
  (void)little;
  Member member(team, 1, 0);
  function(member);
}

}  // namespace teal
