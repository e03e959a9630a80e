// Random bits by counter; the twin of halfstep/ops/random_bits.py, which says why.
#pragma once

#include "types.hpp"

namespace halfstep {
namespace {

constexpr std::uint32_t first_multiplier = 0x21F0AAADu;
constexpr std::uint32_t second_multiplier = 0x735A2D97u;
constexpr std::uint32_t stride = 0x9E3779B9u;

// The 32 bits of elements index, index + 1, ... that one vector holds; all in one block of 2^32.
template <class L>
inline typename L::Random random_bits(Key key, std::size_t index) {
  const std::uint32_t block = std::uint32_t(std::uint64_t(index) >> 32);
  typename L::Random h = L::xor_set(L::counter(std::uint32_t(index)), key.low);
  h = L::multiply(L::xor_shift(h, 16), first_multiplier);
  h = L::xor_set(L::xor_shift(h, 15), key.high + block * stride);
  h = L::multiply(h, second_multiplier);
  return L::and_set(L::xor_shift(h, 15), key.used);
}

}  // namespace
}  // namespace halfstep
