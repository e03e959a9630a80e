// Codes as numbers again, times the scales of their blocks; for any lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "block_codes.hpp"
#include "block_scales.hpp"
#include "types.hpp"

#if defined(__F16C__) && defined(__AVX2__)
#define HALFSTEP_HALVES
#include <immintrin.h>
#endif

namespace halfstep {
namespace {

inline float total_of(const BlockPlan& plan, const BlockArrays& arrays, std::size_t scale) {
  const float found = plan.scale_is_byte
                          ? arrays.scale_table[static_cast<const std::uint8_t*>(arrays.scales)[scale]]
                          : static_cast<const float*>(arrays.scales)[scale];
  return plan.given_scale != 0 ? plan.given_scale : found * plan.tensor_scale;
}

// The codes of a format that lies within float16, but for a power of two, are float16 numbers when they
// are moved to that type's places, sign, exponent and mantissa; subnormal ones too.
struct CodesAsHalves {
  explicit CodesAsHalves(const BlockPlan& plan)
      : magnitudes((1u << (plan.element_bits - 1)) - 1), max_code(plan.max_magnitude_code) {
    const int mantissa = plan.element.mantissa_bits, up = 10 - mantissa;
    to_top = 16 - plan.element_bits;
    down = 5 - (plan.element_bits - 1 - mantissa);
    possible = !plan.element_is_fixed && up >= 0 && down >= 0 && max_code << up < 0x7C00u &&
               std::abs(15 - plan.element_bias) < 64;
    if (!possible) return;
    kept = std::uint16_t(0x8000u | magnitudes << up);
    raise = float(std::ldexp(1.0, 15 - plan.element_bias));
  }

  // No code among these is an infinity or a NaN.
  bool takes(const std::uint8_t* codes, std::size_t n) const {
    if (!possible || max_code == magnitudes) return possible;
    std::uint8_t top = 0;
    for (std::size_t i = 0; i < n; ++i) top = std::max(top, std::uint8_t(codes[i] & magnitudes));
    return top <= max_code;
  }

  // As many of n numbers of one block, whose scale is no NaN, as fill whole vectors; how many.
  std::size_t decode(const std::uint8_t* codes, std::size_t n, float total, float* out,
                     bool stream) const {
    std::size_t i = 0;
#if defined(HALFSTEP_HALVES)
    const auto put = [&](float* to, __m128i halves) {
      const __m256 number = _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(raise));
      const __m256 result = _mm256_mul_ps(number, _mm256_set1_ps(total));
      stream ? _mm256_stream_ps(to, result) : _mm256_storeu_ps(to, result);
    };
    stream = stream && reinterpret_cast<std::uintptr_t>(out) % 32 == 0;
    const __m128i left = _mm_cvtsi32_si128(to_top), right = _mm_cvtsi32_si128(down);
    for (; i + 16 <= n; i += 16) {
      const __m256i words = _mm256_cvtepu8_epi16(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      const __m256i halves = _mm256_and_si256(
          _mm256_sra_epi16(_mm256_sll_epi16(words, left), right), _mm256_set1_epi16(short(kept)));
      put(out + i, _mm256_castsi256_si128(halves));
      put(out + i + 8, _mm256_extracti128_si256(halves, 1));
    }
#else
    (void)codes, (void)n, (void)total, (void)out, (void)stream;
#endif
    return i;
  }

 private:
  std::uint32_t magnitudes, max_code;
  int to_top, down;
  bool possible;
  std::uint16_t kept = 0;
  float raise = 1;
};

// Numbers that codes mean, times the scale.
template <class L, bool each>
void decode_run(const BlockCodes<L>& codes, const std::uint8_t* bytes, std::size_t n,
                const float* total, float* out, bool stream) {
  constexpr std::size_t width = L::width;
  const auto step = [&](const std::uint8_t* from, typename L::Float scale) {
    const typename L::Bits result =
        L::bits(L::times(L::number_of(codes.decode(L::load_bytes(from))), scale));
    const typename L::Bits magnitude = L::and_(L::bits(scale), L::set(0x7FFFFFFFu));
    return L::select(L::less(L::set(float_infinity), magnitude), L::set(float_nan), result);
  };
  stream = stream && reinterpret_cast<std::uintptr_t>(out) % (4 * width) == 0;
  std::size_t i = 0;
  for (; i + width <= n; i += width) {
    const auto scale = each ? L::number_of(L::load(total + i)) : L::set_number(*total);
    const typename L::Bits result = step(bytes + i, scale);
    if (stream) {
      L::stream(out + i, result);
    } else {
      L::store(out + i, result);
    }
  }
  if (i == n) return;
  std::uint8_t some[width] = {};
  float totals[width] = {}, results[width];
  for (std::size_t k = 0; i + k < n; ++k) {
    some[k] = bytes[i + k];
    totals[k] = each ? total[i + k] : *total;
  }
  L::store(results, step(some, L::number_of(L::load(totals))));
  std::copy_n(results, n - i, out + i);
}

}  // namespace
}  // namespace halfstep
