// Work split over threads: those that torch's own operations run on, where they are to be had. Why:
// docs/decisions/0011.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#ifdef HALFSTEP_X86
#include <immintrin.h>
#endif

namespace halfstep {

// The processor's floating-point mode as IEEE 754 has it: rounding to nearest, subnormals kept
// (torch.set_flush_denormal changes it). The old mode comes back at the end.
class DefaultFloatMode {
 public:
#ifdef HALFSTEP_X86
  DefaultFloatMode() : old_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatMode() { _mm_setcsr(old_); }

 private:
  unsigned old_;
#endif
};

// The entry point of the OpenMP runtime that torch has loaded; null where it has none of GNU's.
using TeamRun = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

inline TeamRun team_run() {
#if defined(__unix__) || defined(__APPLE__)
  static const TeamRun found = reinterpret_cast<TeamRun>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// body(data) on `threads` threads, this one among them; on fewer where they cannot be had.
inline void on_team(void (*body)(void*), void* data, unsigned threads) {
  if (threads <= 1) return body(data);
  if (const TeamRun run = team_run()) return run(body, data, threads, 0);
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    while (helpers.size() + 1 < threads) helpers.emplace_back(body, data);
  } catch (const std::system_error&) {
  }
  body(data);
  for (std::thread& helper : helpers) helper.join();
}

// f(begin, end) for pieces of `grain` that make up [0, n), on at most `threads` threads, each taking
// the next piece when it is done with one: a busy core takes fewer. f must not throw.
template <class F>
void parallel_for(std::size_t n, std::size_t grain, int threads, const F& f) {
  struct Work {
    const F& f;
    std::size_t n, grain;
    std::atomic<std::size_t> next{0};
  } work{f, n, grain};
  const std::size_t pieces = (n + grain - 1) / grain;
  if (pieces == 0) return;
  const auto body = [](void* data) {
    Work& work = *static_cast<Work*>(data);
    const DefaultFloatMode mode;
    for (;;) {
      const std::size_t begin = work.next.fetch_add(1) * work.grain;
      if (begin >= work.n) return;
      work.f(begin, std::min(work.n, begin + work.grain));
    }
  };
  on_team(body, &work, unsigned(std::min<std::size_t>(pieces, std::size_t(std::max(threads, 1)))));
}

// Elements that a thread takes at a time, and the bytes from which an output that is not in a
// cache anyway is written past them; both measured, see docs/decisions/0011.
constexpr std::size_t grain = std::size_t(1) << 16;
constexpr std::size_t stream_from = std::size_t(1) << 22;

// f(array, begin, end) over all arrays; a thread takes about `grain` elements at a time, of one array or
// of many small ones.
template <class F>
void over_arrays(const std::vector<std::size_t>& sizes, int threads, const F& f) {
  struct Piece {
    std::size_t array, begin, end;
  };
  std::vector<Piece> pieces;
  std::vector<std::size_t> portions{0};  // where each thread's next pieces begin
  std::size_t elements = 0;
  for (std::size_t array = 0; array < sizes.size(); ++array)
    for (std::size_t begin = 0; begin < sizes[array]; begin += grain) {
      const std::size_t end = std::min(sizes[array], begin + grain);
      pieces.push_back({array, begin, end});
      elements += end - begin;
      if (elements >= grain) {
        portions.push_back(pieces.size());
        elements = 0;
      }
    }
  if (portions.back() != pieces.size()) portions.push_back(pieces.size());
  parallel_for(portions.size() - 1, 1, threads, [&](std::size_t from, std::size_t to) {
    for (std::size_t i = portions[from]; i < portions[to]; ++i)
      f(pieces[i].array, pieces[i].begin, pieces[i].end);
  });
}

}  // namespace halfstep
