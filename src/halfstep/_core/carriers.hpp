// From the carrier of a tensor to float32 or float64, where it is rounded, and back.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

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

inline std::uint16_t round_half(float number) {  // to nearest, ties to even
  const std::uint32_t bits = word_of(number);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return std::uint16_t(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu));
  if (magnitude >= 0x477FF000u) return std::uint16_t(sign | 0x7C00u);
  if (magnitude < 0x38800000u)  // the spacing of subnormal halves is that of floats from 1/2 on
    return std::uint16_t(sign | (word_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
  return std::uint16_t(sign | (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13);
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

// Integers, exactly; those that a float64 does not hold are rounded to odd, so that the rounding that
// follows is the rounding of the integer (S. Boldo, G. Melquiond, IEEE Trans. Computers 57(4), 2008).
inline double to_odd(std::int64_t integer) {
  int exponent;
  std::frexp(double(integer), &exponent);
  const int excess = exponent > 53 ? exponent - 53 : 0;
  const bool inexact = (integer & ((std::int64_t(1) << excess) - 1)) != 0;
  // of the two neighbours, the one below and the next
  return std::ldexp(double((integer >> excess) | std::int64_t(inexact)), excess);
}

template <class From, class Number>
void convert(const void* x, Number* to, std::size_t n) {
  const auto* from = static_cast<const From*>(x);
  for (std::size_t i = 0; i < n; ++i) {
    if constexpr (sizeof(From) == 8 && sizeof(Number) == 8 && !std::is_same_v<From, double>)
      to[i] = to_odd(from[i]);
    else
      to[i] = Number(from[i]);
  }
}

template <class Number>
void to_wide(const void* x, Carrier carrier, Number* to, std::size_t n) {
  switch (carrier) {
    case Carrier::float32: return convert<float>(x, to, n);
    case Carrier::float64: return convert<double>(x, to, n);
    case Carrier::int8: return convert<std::int8_t>(x, to, n);
    case Carrier::uint8: return convert<std::uint8_t>(x, to, n);
    case Carrier::int16: return convert<std::int16_t>(x, to, n);
    case Carrier::int32: return convert<std::int32_t>(x, to, n);
    case Carrier::int64: return convert<std::int64_t>(x, to, n);
    case Carrier::float16:
    case Carrier::bfloat16: break;
  }
  if constexpr (sizeof(Number) == 4) {
    to_float32(x, carrier, to, n);
  } else {
    alignas(64) float numbers[8192 / sizeof(Number)];
    to_float32(x, carrier, numbers, n);
    convert<float>(numbers, to, n);
  }
}

template <class Number>
void from_wide(const Number* from, void* out, Carrier carrier, std::size_t n) {
  if (carrier == Carrier::float32) return convert<Number>(from, static_cast<float*>(out), n);
  if (carrier == Carrier::float64) return convert<Number>(from, static_cast<double*>(out), n);
  if constexpr (sizeof(Number) == 4) {
    from_float32(from, carrier, out, n);
  } else {
    alignas(64) float numbers[8192 / sizeof(Number)];
    convert<Number>(from, numbers, n);
    from_float32(numbers, carrier, out, n);
  }
}

}  // namespace
}  // namespace halfstep
