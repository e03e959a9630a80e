// Which kernels this processor can run, and which are in use.
#pragma once

#include <atomic>
#include <cstring>
#include <vector>

#include "types.hpp"

namespace halfstep {

// Best first. What the operating system does not save (XCR0) counts as not there.
inline std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#ifdef HALFSTEP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512_kernels);
  if (avx2) found.push_back(&avx2_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

inline std::atomic<const Kernels*>& kernels_in_use() {
  static std::atomic<const Kernels*> in_use{available_kernels().front()};
  return in_use;
}

// For tests. False if there are none of that name here.
inline bool use_kernels(const char* name) {
  for (const Kernels* kernels : available_kernels())
    if (std::strcmp(kernels->name, name) == 0) {
      kernels_in_use() = kernels;
      return true;
    }
  return false;
}

}  // namespace halfstep
