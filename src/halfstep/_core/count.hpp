// Counting what is not finite: numbers whose exponent field is all ones. Plain loops; the compiler
// makes vectors of them in each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.hpp"

namespace halfstep {
namespace {

template <class Word>
std::size_t count_ones(const void* x, std::size_t n, Word exponent) {
  const Word* words = static_cast<const Word*>(x);
  std::size_t count = 0;
  while (n > 0) {
    // a counter as wide as the words keeps as many lanes busy; it cannot overflow in one block
    const std::size_t block = n < 32768 ? n : 32768;
    Word part = 0;
    for (std::size_t i = 0; i < block; ++i) part += Word((words[i] & exponent) == exponent);
    count += std::size_t(part);
    words += block;
    n -= block;
  }
  return count;
}

std::size_t count_nonfinite(const void* x, std::size_t n, Carrier carrier) {
  switch (carrier) {
    case Carrier::float32: return count_ones<std::uint32_t>(x, n, 0x7F800000u);
    case Carrier::float64: return count_ones<std::uint64_t>(x, n, 0x7FF0000000000000u);
    case Carrier::float16: return count_ones<std::uint16_t>(x, n, 0x7C00u);
    case Carrier::bfloat16: return count_ones<std::uint16_t>(x, n, 0x7F80u);
    default: return 0;  // integers are finite
  }
}

}  // namespace
}  // namespace halfstep
