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
  // Runs `function(task)` for every task in [0, count): each thread takes those of its own part in order, then what is
  // left of the others'. Returns when all are done. Every thread calls it, the first time with `stage` 0, then 1, 0, 1, ...
  template <class Function>
  void share(int stage, int size, int rank, int64_t count, Function function) {
    const int parts = size < kParts ? size : kParts;
    for (int i = 0; i < parts; ++i) {
      const int part = (rank + i) % parts;
      const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
      std::atomic<int64_t>& next = next_[stage][part].count;
      for (int64_t task; (task = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) function(task);
    }
    wait(size, parts, next_[1 - stage]);
  }

 private:
  static constexpr int kParts = 64;
  struct alignas(64) Counter {
    std::atomic<int64_t> count{0};
  };

  // The last to arrive resets the counters of the stage before, which everybody has left.
  void wait(int size, int parts, Counter* counters) {
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      for (int part = 0; part < parts; ++part) counters[part].count.store(0, std::memory_order_relaxed);
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

  Counter next_[2][kParts];
  std::atomic<int> arrived_{0}, generation_{0};
};

// One thread's view of its team.
class Member {
 public:
  Member(Team& team, int size, int rank) : team_(team), size_(size), rank_(rank) {}

  template <class Function>
  void share(int64_t count, Function function) {
    team_.share(stage_, size_, rank_, count, function);
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
