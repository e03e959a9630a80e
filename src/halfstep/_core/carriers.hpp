// 16-bit tensors: widened to float32, rounded there, narrowed again; both exact, because what a
// tensor is rounded to fits it. Piece by piece, so that the float32 numbers stay in the first cache.
#pragma once

#include <cstdint>

#include "types.hpp"
#include "widen.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace halfstep {
namespace {

inline std::uint16_t narrow_half(float number) {  // of one that a half can be
  const std::uint32_t bits = word_of(number);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x7F800000u)
    return std::uint16_t(sign | 0x7C00u | (magnitude >> 13 & 0x3FFu));
  const float scaled = float_of(magnitude) * float_of((127u - 112u) << 23);
  return std::uint16_t(sign | word_of(scaled) >> 13);
}

void to_float32(const void* x, Carrier carrier, float* to, std::size_t n) {
  const auto* from = static_cast<const std::uint16_t*>(x);
  if (carrier == Carrier::bfloat16) {
    for (std::size_t i = 0; i < n; ++i) to[i] = FromBfloat16::widen(from[i]);
    return;
  }
  std::size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                 reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = FromFloat16::widen(from[i]);
}

void from_float32(const float* from, Carrier carrier, void* out, std::size_t n) {
  auto* to = static_cast<std::uint16_t*>(out);
  if (carrier == Carrier::bfloat16) {
    for (std::size_t i = 0; i < n; ++i) to[i] = std::uint16_t(word_of(from[i]) >> 16);
    return;
  }
  std::size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = narrow_half(from[i]);
}

// Elements [begin, end), from one carrier to another, rounded by `round` in float32.
template <class Round>
void round_through_float32(const void* x, Carrier from, void* out, Carrier to, std::size_t begin,
                           std::size_t end, const Grid& grid, Rounding rounding, Key key,
                           const Round& round) {
  constexpr std::size_t piece = 2048;
  alignas(64) float numbers[piece];
  for (std::size_t i = begin; i < end; i += piece) {
    const std::size_t n = end - i < piece ? end - i : piece;
    const float* source = static_cast<const float*>(x) + i;
    if (from != Carrier::float32) {
      to_float32(static_cast<const std::uint16_t*>(x) + i, from, numbers, n);
      source = numbers;
    }
    float* target = to == Carrier::float32 ? static_cast<float*>(out) + i : numbers;
    // element k of this piece is element i + k of the array
    round(source - i, target - i, i, i + n, grid, rounding, key, false);
    if (to != Carrier::float32)
      from_float32(numbers, to, static_cast<std::uint16_t*>(out) + i, n);
  }
}

}  // namespace
}  // namespace halfstep
