// What the sanitizers' tests share: exact arrays of random numbers, grids, and the comparison of the
// instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu.hpp"
#include "types.hpp"

namespace halfstep {

inline std::uint32_t next_random(std::uint32_t& seed) {
  seed = seed * 1664525u + 1013904223u;
  return seed >> 8;
}

// Exactly so many: one more is an error that the sanitizer reports.
inline std::vector<unsigned char> random_bytes(std::size_t n, std::uint32_t seed) {
  std::vector<unsigned char> bytes(n);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(next_random(seed) >> 8);
  return bytes;
}

// Numbers of a few bits over some binades, zeros among them; every 50th is no finite number if `special`.
inline std::vector<float> random_numbers(std::size_t n, std::uint32_t seed, bool special = false) {
  std::vector<float> numbers(n);
  for (auto& number : numbers) {
    const int whole = int(next_random(seed) % 4096) - 2048;
    number = std::ldexp(float(whole), int(next_random(seed) % 16) - 16);
    if (special && next_random(seed) % 50 == 0)
      number = next_random(seed) % 2 ? NAN : whole < 0 ? -INFINITY : INFINITY;
  }
  return numbers;
}

inline Grid float_grid(int bits, int least, double highest, Ends ends = Ends::gradual) {
  Grid grid{};
  grid.quantum_exponent = least;
  grid.mantissa_bits = bits;
  grid.highest = highest;
  grid.lowest = ends == Ends::no_zero ? 0 : -highest;
  grid.overflow_up = grid.infinity_up = INFINITY;
  grid.overflow_down = grid.infinity_down = -INFINITY;
  grid.negative_zero = true;
  grid.ends = ends;
  return grid;
}

// Bit for bit, but any NaN is as good as another.
template <class Number>
bool same_numbers(const std::vector<Number>& a, const std::vector<Number>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(Number)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i])))
      return false;
  return a.size() == b.size();
}

bool blocks_are_safe();
bool products_are_safe();
bool steps_are_safe();

}  // namespace halfstep
