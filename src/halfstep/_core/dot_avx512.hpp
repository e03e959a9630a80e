// The steps of dot.hpp in AVX-512: the exact sum is rounded to odd by two fused multiply-adds, one
// down and one up, of which the odd one is taken; then to the grid.
#pragma once

#include "dot.hpp"
#include "lanes_avx512.hpp"

namespace halfstep {
namespace {

struct ToFp16 {
  __m512 operator()(__m512i sum) const {
    const __m256i half = _mm512_cvtps_ph(_mm512_castsi512_ps(sum), _MM_FROUND_TO_NEAREST_INT);
    return _mm512_cvtph_ps(half);
  }
};

struct ToGrid {
  Rounder<Avx512Lanes, Rounding::nearest, false> round;

  __m512 operator()(__m512i sum) const { return Avx512Lanes::number_of(round(sum, 0)); }
};

template <class Round>
struct Avx512Tile {
  // 6 x 2 sums: enough of them to hide one's latency, and all in registers
  static constexpr int rows = 6;
  static constexpr int vectors = 2;
  static constexpr int columns = 16 * vectors;
  static_assert(columns == dot_columns, "panels are made for all instruction sets alike");

  Round round;

  static __m512i add_to_odd(__m512 a, __m512 b, __m512 sum) {
    const __m512i down = _mm512_castps_si512(
        _mm512_fmadd_round_ps(a, b, sum, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const __m512i up = _mm512_castps_si512(
        _mm512_fmadd_round_ps(a, b, sum, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
    // an exact sum is the same in both, but zero: there it is the one rounded up, +0
    const __mmask16 odd = _mm512_test_epi32_mask(down, _mm512_set1_epi32(1));
    return _mm512_mask_mov_epi32(up, odd, down);
  }

  template <int count>
  void run(const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_column, const float* panel,
           std::size_t depth, float* out, std::size_t out_row, std::size_t used) const {
    __mmask16 mask[vectors];
    for (int v = 0; v < vectors; ++v) {
      const std::size_t start = std::size_t(16 * v);
      const std::size_t lanes = used <= start ? 0 : used - start;
      mask[v] = lanes >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << lanes) - 1);
    }
    __m512 sum[count][vectors];
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < vectors; ++v)
        sum[i][v] = _mm512_maskz_loadu_ps(mask[v], out + std::size_t(i) * out_row + 16 * v);
    for (std::size_t k = 0; k < depth; ++k, a += a_column) {
      __m512 b[vectors];
      for (int v = 0; v < vectors; ++v) b[v] = _mm512_loadu_ps(panel + k * columns + 16 * v);
      for (int i = 0; i < count; ++i) {
        const __m512 left = _mm512_set1_ps(a[std::ptrdiff_t(i) * a_row]);
        for (int v = 0; v < vectors; ++v) sum[i][v] = round(add_to_odd(left, b[v], sum[i][v]));
      }
    }
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < vectors; ++v)
        _mm512_mask_storeu_ps(out + std::size_t(i) * out_row + 16 * v, mask[v], sum[i][v]);
  }
};

void dot_avx512(const DotBlock& block, const Grid& grid, float* panel) {
  const bool fp16 = grid.mantissa_bits == 10 && grid.quantum_exponent == -24 &&
                    grid.overflow_up > grid.highest;  // to infinity, as the instruction does
  if (fp16) return dot_with(Avx512Tile<ToFp16>{}, block, panel);
  dot_with(Avx512Tile<ToGrid>{{{Constants<Avx512Lanes>(grid), Key{}}}}, block, panel);
}

}  // namespace
}  // namespace halfstep
