// Operands of a dot product side by side, as its steps read them, and what their numbers have in common.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "types.hpp"
#include "widen.hpp"

namespace halfstep {
namespace {

// What the numbers of a panel have in common.
struct Survey {
  std::uint32_t largest = 0;            // word, sign left out
  std::uint32_t least = 0xFFFFFFFFu;    // of those that are not zero, less one
  std::uint32_t digits_used = 0;        // or of all mantissas

  bool is_zero() const { return largest == 0; }
  bool is_finite() const { return largest < 0x7F800000u; }
  int digits() const { return 24 - __builtin_ctz(digits_used | 0x800000u); }
  // all numbers are multiples of 2^this
  int last_bit() const {
    const int field = int((least + 1) >> 23);
    return std::max(field, 1) - 150 + __builtin_ctz(digits_used | 0x800000u);
  }

  // Writes the numbers over `to`, scaled.
  void take(const float* from, float* to, std::size_t n, float scale) {
    std::uint32_t most = largest, least_yet = least, used = digits_used;
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint32_t word = word_of(from[i]) & 0x7FFFFFFFu;
      most = std::max(most, word);
      least_yet = std::min(least_yet, word - 1);
      used |= word & 0x7FFFFFu;
      to[i] = from[i] * scale;
    }
    largest = most;
    least = least_yet;
    digits_used = used;
  }
};

inline void copy_row(const float* from, std::ptrdiff_t stride, std::size_t n, float* to) {
  if (stride == 1) {
    std::copy(from, from + n, to);
  } else {
    for (std::size_t k = 0; k < n; ++k) to[k] = from[std::ptrdiff_t(k) * stride];
  }
}

// a[rows, depth] as rows that follow each other.
inline void pack_rows(const DotWork& work, std::size_t first, std::size_t depth, float* to) {
  for (std::size_t i = 0; i < work.rows; ++i)
    copy_row(work.a + std::ptrdiff_t(i) * work.a_row + std::ptrdiff_t(first) * work.a_column, work.a_column, depth,
             to + i * depth);
}

inline void transpose_eight(const float* from, std::ptrdiff_t stride, float* to, std::size_t to_stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

constexpr std::ptrdiff_t rows_ahead = 16;  // each on a page of its own: no prefetcher follows

// b[depth, columns from `column`] as panel[k][columns].
inline void pack_columns(const DotWork& work, std::size_t first, std::size_t depth, std::size_t column,
                         std::size_t columns, float* panel) {
  const float* from = work.b + std::ptrdiff_t(first) * work.b_row + std::ptrdiff_t(column) * work.b_column;
  if (columns == 1) return copy_row(from, work.b_row, depth, panel);
  if (work.b_column == 1 && columns % 8 == 0) {
    for (std::size_t k = 0; k < depth; ++k) {
      const float* row = from + std::ptrdiff_t(k) * work.b_row;
      const float* ahead = row + (first + k + rows_ahead < work.depth ? rows_ahead * work.b_row : 0);
      for (std::size_t j = 0; j < columns; j += 8) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + j), _MM_HINT_T0);
        _mm256_storeu_ps(panel + k * columns + j, _mm256_loadu_ps(row + j));
      }
    }
    return;
  }
  std::size_t done = 0;  // columns
  if (work.b_row == 1 && work.b_column != 1)
    for (; done + 8 <= columns; done += 8) {
      std::size_t k = 0;
      for (; k + 8 <= depth; k += 8)
        transpose_eight(from + std::ptrdiff_t(done) * work.b_column + k, work.b_column, panel + k * columns + done,
                        columns);
      for (; k < depth; ++k)
        for (std::size_t j = done; j < done + 8; ++j)
          panel[k * columns + j] = from[std::ptrdiff_t(j) * work.b_column + std::ptrdiff_t(k)];
    }
  if (done == columns) return;
  for (std::size_t k = 0; k < depth; ++k) {
    const float* row = from + std::ptrdiff_t(k) * work.b_row;
    copy_row(row + std::ptrdiff_t(done) * work.b_column, work.b_column, columns - done, panel + k * columns + done);
  }
}

// panel[k][columns] becomes panel[k][width], a multiple of 8, zeros where there was nothing; from the end, in place.
inline void spread_columns(float* panel, std::size_t depth, std::size_t columns, std::size_t width) {
  alignas(32) std::int32_t lanes[8];
  for (int lane = 0; lane < 8; ++lane) lanes[lane] = lane < int(columns % 8) ? -1 : 0;
  const __m256i some = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
  for (std::size_t k = depth; k-- > 0;) {
    const float* from = panel + k * columns;
    float* to = panel + k * width;
    std::size_t j = columns / 8 * 8;
    for (std::size_t beyond = j + 8; beyond < width; beyond += 8) _mm256_storeu_ps(to + beyond, _mm256_setzero_ps());
    _mm256_storeu_ps(to + j, _mm256_maskload_ps(from + j, some));
    for (; j > 0; j -= 8) _mm256_storeu_ps(to + j - 8, _mm256_loadu_ps(from + j - 8));
  }
}

}  // namespace
}  // namespace halfstep
