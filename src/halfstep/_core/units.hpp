// What a matrix unit adds: blocks of exact products and the running sum, aligned to the largest
// exponent, truncated, added, truncated. The twin of halfstep/ops/unit_sums.py; the rule is in
// halfstep/format/units.py.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "unit_types.hpp"
#include "widen.hpp"

namespace halfstep {
namespace {

constexpr std::int32_t exponent_of_zero = -(1 << 14);  // two of them are below every other sum
constexpr std::int32_t exponent_of_special = 128;       // of infinities and NaN

// x = digits * 2^exponent with |digits| < 2 and no exponent below `least`. What is not finite keeps
// its value as its digits.
inline void split(float x, std::int32_t least, float& digits, std::int32_t& exponent) {
  const std::uint32_t bits = word_of(x) & 0x7FFFFFFF;
  const std::int32_t field = std::int32_t(bits >> 23);
  std::int32_t e = (field < 1 ? 1 : field) - 127;
  e = e < least ? least : e;
  // in two steps, as 2^-127 is no normal number
  const std::int32_t half = e >> 1;
  const float scaled = x * float_of(std::uint32_t(127 - half) << 23) *
                       float_of(std::uint32_t(127 - (e - half)) << 23);
  digits = field == 255 ? x : scaled;
  exponent = bits == 0 ? exponent_of_zero : e;
}

// Operands of one block of the result: digits and exponents, [row][k] of a and [k][column] of b.
struct Operands {
  const float* a_digits;
  const std::int32_t* a_exponent;
  const float* b_digits;
  const std::int32_t* b_exponent;
};

// total * 2^last with so many fraction bits as a float, toward zero.
inline float truncated(std::int64_t total, int last, int result_bits) {
  if (total == 0) return 0.0f;
  std::uint64_t magnitude = std::uint64_t(total < 0 ? -total : total);
  int size = last;
  for (std::uint64_t rest = magnitude; rest >>= 1;) ++size;
  const int drop = (size < -126 ? -126 : size) - result_bits - last;
  if (drop > 0) magnitude = drop > 62 ? 0 : magnitude >> drop << drop;
  const double value = std::ldexp(double(magnitude), last);
  const float result = value >= 0x1p128 ? std::numeric_limits<float>::infinity() : float(value);
  return total < 0 ? -result : result;
}

// The fp16 number next to x, ties to even: adding a number whose last bit is worth the spacing rounds.
inline float nearest_half(double x) {
  const double magnitude = std::fabs(x);
  std::uint64_t binade;
  std::memcpy(&binade, &magnitude, sizeof binade);
  const std::uint64_t least = std::uint64_t(1023 - 14) << 52;
  binade = (binade >> 52) << 52;
  binade = (binade < least ? least : binade) + (std::uint64_t(52 - 10) << 52);
  double magic;
  std::memcpy(&magic, &binade, sizeof magic);
  const double rounded = (magnitude + magic) - magic;
  const float result = rounded >= 65536.0 ? std::numeric_limits<float>::infinity() : float(rounded);
  return x < 0 ? -result : result;
}

inline float result_of(const UnitRule& rule, std::int64_t total, int last) {
  if (rule.result_is_half) return nearest_half(std::ldexp(double(total), last));
  return truncated(total, last, rule.result_bits);
}

inline std::int32_t least_exponent_of_sums(const UnitRule& rule) {
  return rule.result_is_half ? -14 : -126;
}

// digits * 2^by, toward zero; by < 40.
inline std::int64_t aligned(double digits, int by) {
  return by < -64 ? 0 : std::int64_t(std::ldexp(digits, by));
}

// One block of one element: c and `count` products of a row and a column.
inline float add_block(const UnitRule& rule, const float* a_digits, const std::int32_t* a_exponent,
                       const float* b_digits, const std::int32_t* b_exponent, std::size_t b_stride,
                       std::size_t count, float c) {
  float c_digits;
  std::int32_t c_exponent;
  split(c, least_exponent_of_sums(rule), c_digits, c_exponent);
  std::int32_t largest = rule.lowest_exponent;
  if (c_exponent > largest) largest = c_exponent;
  float special = c_digits - c_digits;  // 0, or NaN where c is not finite
  for (std::size_t k = 0; k < count; ++k) {
    const std::int32_t e = a_exponent[k] + b_exponent[k * b_stride];
    if (e > largest) largest = e;
    const float product = a_digits[k] * b_digits[k * b_stride];
    special += product - product;
  }
  if (special != special) {
    float sum = c;
    for (std::size_t k = 0; k < count; ++k) sum += a_digits[k] * b_digits[k * b_stride];
    return sum != sum ? float_of(rule.result_is_half ? 0x7FFFE000 : 0x7FFFFFFF) : sum;
  }
  std::int64_t total = aligned(c_digits, c_exponent - largest + rule.fraction_bits);
  for (std::size_t k = 0; k < count; ++k)
    total += aligned(a_digits[k] * b_digits[k * b_stride],
                     a_exponent[k] + b_exponent[k * b_stride] - largest + rule.fraction_bits);
  return result_of(rule, total, largest - rule.fraction_bits);
}

// The elements of one row, for operands or sums that are not finite.
inline void add_one_by_one(const UnitRule& rule, const Operands& of, std::size_t first, float* sums) {
  for (std::size_t j = 0; j < unit_columns; ++j)
    sums[j] = add_block(rule, of.a_digits + first, of.a_exponent + first,
                        of.b_digits + first * unit_columns + j,
                        of.b_exponent + first * unit_columns + j, unit_columns,
                        std::size_t(rule.block), sums[j]);
}

struct Vectors16 {
  typedef std::int32_t Ints __attribute__((vector_size(16), may_alias));
  typedef float Floats __attribute__((vector_size(16), may_alias));
};
struct Vectors32 {
  typedef std::int32_t Ints __attribute__((vector_size(32), may_alias));
  typedef float Floats __attribute__((vector_size(32), may_alias));
};
struct Vectors64 {
  typedef std::int32_t Ints __attribute__((vector_size(64), may_alias));
  typedef float Floats __attribute__((vector_size(64), may_alias));
};

// The same, all at once, in vectors of an instruction set, by the same C++ in each: terms are scaled by a power of two that is made
// of exponent bits, converted to integers, which truncates, and added as integers.
template <class Vectors>
struct UnitRow {
  using Ints = typename Vectors::Ints;
  using Floats = typename Vectors::Floats;
  static constexpr std::size_t vectors = unit_columns * 4 / sizeof(Ints);

  static Ints larger(Ints x, Ints y) { return x > y ? x : y; }

  alignas(64) std::int32_t largest[unit_columns];
  alignas(64) std::int32_t bias[unit_columns];
  alignas(64) double total[unit_columns];

  void find_largest(const Operands& of, std::size_t first, std::size_t block, std::int32_t lowest) {
    Ints found[vectors];
    for (std::size_t v = 0; v < vectors; ++v) found[v] = Ints{} + lowest;
    for (std::size_t k = first; k < first + block; ++k) {
      const auto* b = reinterpret_cast<const Ints*>(of.b_exponent + k * unit_columns);
      for (std::size_t v = 0; v < vectors; ++v)
        found[v] = larger(found[v], of.a_exponent[k] + b[v]);
    }
    for (std::size_t v = 0; v < vectors; ++v) reinterpret_cast<Ints*>(largest)[v] = found[v];
  }

  // `total` becomes the running sums in units of their last digits. False where one is not finite.
  bool take_sums(const UnitRule& rule, const float* sums) {
    const std::int32_t lowest = rule.lowest_exponent, fraction = rule.fraction_bits;
    const std::int32_t least = least_exponent_of_sums(rule);
    std::int32_t top = 0;
    for (std::size_t j = 0; j < unit_columns; ++j) {
      const std::int32_t word = std::int32_t(word_of(sums[j]));
      const std::int32_t field = word >> 23 & 255;
      top = field > top ? field : top;
      const std::int32_t digits = (word & 0x7FFFFF) | (field > 0 ? 0x800000 : 0);
      const std::int32_t exponent = (field > 1 ? field : 1) - 127;
      const std::int32_t raised = exponent > least ? exponent : least;
      const std::int32_t counts = digits != 0 ? raised : lowest;
      const std::int32_t e = largest[j] > counts ? largest[j] : counts;
      const std::int32_t by = exponent - e + fraction - 23;
      const std::int32_t up = by > 0 ? by : 0;
      const std::int32_t down = up - by < 31 ? up - by : 31;
      const std::int32_t moved = (digits << up) >> down;
      total[j] = double((moved ^ (word >> 31)) - (word >> 31));
      bias[j] = 127 - e + fraction;
    }
    return top < 255;
  }

  // At most 16 products, whose sum fits 32 bits: each is less than 4 * 2^25.
  void add_products(const Operands& of, std::size_t first, std::size_t count) {
    Ints sum[vectors] = {};
    Ints offset[vectors];
    for (std::size_t v = 0; v < vectors; ++v) offset[v] = reinterpret_cast<const Ints*>(bias)[v];
    for (std::size_t k = first; k < first + count; ++k) {
      const auto* b = reinterpret_cast<const Floats*>(of.b_digits + k * unit_columns);
      const auto* b_exponent = reinterpret_cast<const Ints*>(of.b_exponent + k * unit_columns);
      for (std::size_t v = 0; v < vectors; ++v) {
        const Ints field = larger(of.a_exponent[k] + b_exponent[v] + offset[v], Ints{});
        const Floats term = of.a_digits[k] * b[v] * Floats(field << 23);
        sum[v] += __builtin_convertvector(term, Ints);
      }
    }
    alignas(64) std::int32_t sums[unit_columns];
    for (std::size_t v = 0; v < vectors; ++v) reinterpret_cast<Ints*>(sums)[v] = sum[v];
    for (std::size_t j = 0; j < unit_columns; ++j) total[j] += sums[j];
  }

  void give_sums(const UnitRule& rule, float* sums) const {
    const std::uint64_t digits = ~std::uint64_t(0) << (52 - rule.result_bits);
    std::int32_t rare = 0;
    for (std::size_t j = 0; j < unit_columns; ++j) {
      const std::int32_t last = 127 - bias[j];
      const std::uint64_t power = std::uint64_t(std::int64_t(last) + 1023) << 52;
      double scale;
      std::memcpy(&scale, &power, sizeof scale);
      const double exact = total[j] * scale;
      if (rule.result_is_half) {
        sums[j] = nearest_half(exact);
        continue;
      }
      std::uint64_t word;
      std::memcpy(&word, &exact, sizeof word);
      word &= digits;
      double kept;
      std::memcpy(&kept, &word, sizeof kept);
      sums[j] = float(kept);
      const double magnitude = std::fabs(exact);
      rare |= std::int32_t(magnitude >= 0x1p128) | std::int32_t(magnitude < 0x1p-126);
    }
    if (rare)
      for (std::size_t j = 0; j < unit_columns; ++j)
        sums[j] = truncated(std::int64_t(total[j]), 127 - bias[j], rule.result_bits);
  }
};

// depth products of a row and unit_columns columns onto sums.
template <class Vectors>
void add_row(const UnitRule& rule, const Operands& of, std::size_t depth, bool special, float* sums) {
  const std::size_t block = std::size_t(rule.block);
  UnitRow<Vectors> row;
  for (std::size_t first = 0; first < depth; first += block) {
    if (!special) {
      row.find_largest(of, first, block, rule.lowest_exponent);
      if (row.take_sums(rule, sums)) {
        for (std::size_t done = 0; done < block; done += 16)
          row.add_products(of, first + done, block - done < 16 ? block - done : 16);
        row.give_sums(rule, sums);
        continue;
      }
    }
    add_one_by_one(rule, of, first, sums);
  }
}

// True where something is not finite.
inline bool split_rows(const UnitTask& task, std::size_t first, std::size_t depth, std::size_t padded,
                       float* digits, std::int32_t* exponent) {
  bool special = false;
  for (std::size_t i = 0; i < task.rows; ++i) {
    const float* from = task.a + std::ptrdiff_t(i) * task.a_row + std::ptrdiff_t(first) * task.a_column;
    for (std::size_t k = 0; k < depth; ++k) {
      const float x = from[std::ptrdiff_t(k) * task.a_column];
      split(x, task.rule.a_least, digits[i * padded + k], exponent[i * padded + k]);
      special |= exponent[i * padded + k] == exponent_of_special;
    }
    for (std::size_t k = depth; k < padded; ++k) {
      digits[i * padded + k] = 0.0f;
      exponent[i * padded + k] = exponent_of_zero;
    }
  }
  return special;
}

inline bool split_columns(const UnitTask& task, std::size_t first, std::size_t depth,
                          std::size_t padded, std::size_t column, std::size_t used, float* digits,
                          std::int32_t* exponent) {
  const float* from =
      task.b + std::ptrdiff_t(first) * task.b_row + std::ptrdiff_t(column) * task.b_column;
  std::memset(digits, 0, padded * unit_columns * sizeof *digits);
  if (task.b_row == 1) {  // along the memory, which is down a column here
    for (std::size_t j = 0; j < used; ++j)
      for (std::size_t k = 0; k < depth; ++k)
        digits[k * unit_columns + j] = from[std::ptrdiff_t(j) * task.b_column + std::ptrdiff_t(k)];
  } else if (task.b_column == 1) {
    for (std::size_t k = 0; k < depth; ++k)
      std::memcpy(digits + k * unit_columns, from + std::ptrdiff_t(k) * task.b_row,
                  used * sizeof *digits);
  } else {
    for (std::size_t k = 0; k < depth; ++k)
      for (std::size_t j = 0; j < used; ++j)
        digits[k * unit_columns + j] =
            from[std::ptrdiff_t(k) * task.b_row + std::ptrdiff_t(j) * task.b_column];
  }
  std::int32_t top = 0;
  const std::int32_t least = task.rule.b_least;
  for (std::size_t i = 0; i < padded * unit_columns; ++i) {
    const float x = digits[i];
    float kept;
    std::int32_t e;
    split(x, least, kept, e);
    digits[i] = kept;
    exponent[i] = e;
    top = top > e ? top : e;
  }
  return top == exponent_of_special;
}

template <class Vectors>
void unit_task(const UnitTask& task, UnitScratch& scratch) {
  const std::size_t block = std::size_t(task.rule.block);
  const std::size_t panel = task.chunk ? task.chunk : unit_depth;
  for (std::size_t first = 0; first < task.depth; first += panel) {
    const std::size_t left = task.depth - first;
    const std::size_t depth = left < panel ? left : panel;
    const std::size_t padded = (depth + block - 1) / block * block;
    const bool a_special =
        split_rows(task, first, depth, padded, scratch.a_digits, scratch.a_exponent);
    for (std::size_t column = 0; column < task.columns; column += unit_columns) {
      const std::size_t rest = task.columns - column;
      const std::size_t used = rest < unit_columns ? rest : unit_columns;
      const bool b_special = split_columns(task, first, depth, padded, column, used,
                                           scratch.b_digits, scratch.b_exponent);
      for (std::size_t i = 0; i < task.rows; ++i) {
        float* sums = scratch.sums + i * unit_columns;
        const float* out = task.out + i * task.out_row + column;
        for (std::size_t j = 0; j < unit_columns; ++j)
          sums[j] = j < used && task.chunk == 0 ? out[j] : 0.0f;
      }
      for (std::size_t i = 0; i < task.rows; ++i)
        add_row<Vectors>(task.rule,
                       {scratch.a_digits + i * padded, scratch.a_exponent + i * padded,
                        scratch.b_digits, scratch.b_exponent},
                       padded, a_special || b_special, scratch.sums + i * unit_columns);
      for (std::size_t i = 0; i < task.rows; ++i) {
        const float* sums = scratch.sums + i * unit_columns;
        float* out = task.out + i * task.out_row + column;
        for (std::size_t j = 0; j < used; ++j) out[j] = task.chunk ? out[j] + sums[j] : sums[j];
      }
    }
  }
}

}  // namespace
}  // namespace halfstep
