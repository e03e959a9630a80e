// Work split over threads that live for one call. Why no pool: docs/decisions/0011.
#pragma once

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

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

// f(begin, end) for pieces that make up [0, n): at most `threads`, none shorter than `grain` but
// the last, each boundary a multiple of `grain`. A thread that cannot be started is done without.
template <class F>
void parallel_for(std::size_t n, std::size_t grain, int threads, const F& f) {
  const auto run = [&f](std::size_t begin, std::size_t end) {
    const DefaultFloatMode mode;
    f(begin, end);
  };
  const std::size_t grains = (n + grain - 1) / grain;
  const std::size_t pieces = std::min<std::size_t>(grains, std::max(threads, 1));
  if (pieces == 0) return;
  const auto boundary = [&](std::size_t p) { return std::min(n, grains * p / pieces * grain); };
  std::vector<std::thread> helpers;
  helpers.reserve(pieces - 1);
  std::size_t started = 1;
  try {
    for (; started < pieces; ++started)
      helpers.emplace_back(run, boundary(started), boundary(started + 1));
  } catch (const std::system_error&) {
  }
  run(0, boundary(1));
  if (started < pieces) run(boundary(started), n);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace halfstep
