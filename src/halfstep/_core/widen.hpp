// 16-bit numbers as float32, over a scale, in one pass. Plain loops; the compiler makes vectors of
// them in each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "types.hpp"

namespace halfstep {
namespace {

inline std::uint32_t word_of(float f) {
  std::uint32_t w;
  std::memcpy(&w, &f, sizeof w);
  return w;
}

inline float float_of(std::uint32_t w) {
  float f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}

struct FromBfloat16 {
  static float widen(std::uint16_t h) { return float_of(std::uint32_t(h) << 16); }
};

struct FromFloat16 {
  static constexpr std::uint16_t exponent = 0x7C00;
  // The exponent's bias differs by 112: a product by 2^112 sets normal and subnormal numbers right.
  static float widen(std::uint16_t h) {
    const std::uint32_t magnitude = std::uint32_t(h & 0x7FFF) << 13;
    std::uint32_t bits = word_of(float_of(magnitude) * 0x1p112f);
    bits |= (h & exponent) == exponent ? 0x7F800000u : 0u;
    return float_of(bits | std::uint32_t(h & 0x8000) << 16);
  }
};

template <class From>
void widen_range(const std::uint16_t* x, float* out, std::size_t n, float scale) {
  if (scale == 1.0f) {
    for (std::size_t i = 0; i < n; ++i) out[i] = From::widen(x[i]);
  } else {
    for (std::size_t i = 0; i < n; ++i) out[i] = From::widen(x[i]) / scale;
  }
}

void widen(const void* x, float* out, std::size_t n, Carrier carrier, float scale) {
  const auto* words = static_cast<const std::uint16_t*>(x);
  if (carrier == Carrier::float16) {
    widen_range<FromFloat16>(words, out, n, scale);
  } else {
    widen_range<FromBfloat16>(words, out, n, scale);
  }
}

}  // namespace
}  // namespace halfstep
