// The steps of dot.hpp for every accumulator: all sums in double, rounded to odd, then to the grid.
// Vectors of the compiler's, so that one text serves every instruction set.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lanes_portable.hpp"
#include "random.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

#if defined(__AVX512F__)
constexpr int careful_bytes = 64;
#elif defined(__AVX2__)
constexpr int careful_bytes = 32;
#else
constexpr int careful_bytes = 16;
#endif
constexpr std::size_t careful_width = careful_bytes / sizeof(double);
typedef double Doubles __attribute__((vector_size(careful_bytes)));
typedef std::int64_t Longs __attribute__((vector_size(careful_bytes)));
typedef float Floats __attribute__((vector_size(careful_bytes / 2)));

inline Longs bits_of(Doubles x) { return (Longs)x; }
inline Doubles spread(double x) { return x - Doubles{}; }
inline Longs spread_bits(std::int64_t x) { return x - Longs{}; }
inline Doubles select(Longs mask, Doubles yes, Doubles no) {
  return (Doubles)((mask & bits_of(yes)) | (~mask & bits_of(no)));
}
inline Doubles absolute(Doubles x) {
  return (Doubles)(bits_of(x) & spread_bits(std::int64_t(~(std::uint64_t(1) << 63))));
}

// Which of a step's roundings: each has random bits of its own; as in halfstep/ops/summation.py.
enum Slot { slot_sum, slot_product, slot_chunk, slot_part, slot_less, slot_gained, slot_lost, slot_start, slot_levels };
constexpr std::uint32_t slot_distance = 0x9E3779B9u;

// As in halfstep/ops/summation.py, which says why.
inline std::uint32_t rounding_of(int slot, std::size_t k) {
  return std::uint32_t(slot) * slot_distance + std::uint32_t(k);
}

// x + y, and where that is not exact the neighbour whose last bit is 1.
template <bool down>
inline Doubles add_to_odd(Doubles x, Doubles y) {
  Doubles total = x + y;
  const Doubles part = total - x;  // Knuth's two-sum: total + error is x + y exactly
  const Doubles error = (x - (total - part)) + (y - part);
  const Longs exponent = spread_bits(0x7FF0000000000000);
  const Longs finite = (bits_of(total) & exponent) != exponent;
  const Longs moves = (error != 0.0) & finite & ((bits_of(total) & 1) == 0);
  // toward the error: the magnitude grows where the signs agree
  const Longs shrinks = (bits_of(error) ^ bits_of(total)) < 0;
  total = (Doubles)(bits_of(total) + (moves & (1 + (shrinks & -2))));
  if (down) {  // IEEE 754, section 6.3: x + (-x) is -0 in this rounding only
    const Longs differ = (bits_of(x) ^ bits_of(y)) < 0;
    total = select((total == 0.0) & differ, spread(-0.0), total);
  }
  return total;
}

// Random numbers for the elements of one vector.
struct Elements {
  std::uint64_t first;
  std::uint64_t step;

  Doubles uniform(Key key, std::uint32_t rounding) const {  // in units of 2^-32
    Doubles numbers{};
    for (std::size_t i = 0; i < careful_width; ++i) {
      const std::uint64_t index = first + i * step;
      const Key own{key.low, key.high + (rounding + std::uint32_t(index >> 32)) * stride};
      numbers[i] = double(random_bits<Portable32>(own, std::uint32_t(index)));
    }
    return numbers;
  }
};

// Rounds numbers of float64 to a grid; see round.hpp. Beyond the largest exponent the grid goes on.
struct CarefulGrid {
  explicit CarefulGrid(const Grid& grid)
      : even_below(std::ldexp(1.0, grid.quantum_exponent + grid.mantissa_bits)),
        magic(std::ldexp(1.5, 52 - grid.mantissa_bits)),
        units(std::ldexp(1.0, -grid.mantissa_bits)),
        g(grid) {}

  double even_below;  // the smallest power of two whose binade has the quantum of zero
  double magic;       // times a power of two: a number whose last bit is worth one quantum there
  double units;       // times a power of two: the quantum there
  Grid g;

  template <Rounding rounding>
  Doubles round(Doubles x, Key key, std::uint32_t which, Elements elements) const {
    if (rounding == Rounding::stochastic)  // in two steps
      x = __builtin_convertvector(__builtin_convertvector(x, Floats), Doubles);
    const Longs sign_bit = spread_bits(std::int64_t(std::uint64_t(1) << 63));
    const Longs sign = bits_of(x) & sign_bit;
    const Doubles magnitude = absolute(x);
    Doubles power = (Doubles)(bits_of(x) & spread_bits(0x7FF0000000000000));
    power = select(power < even_below, spread(even_below), power);
    const Doubles shift = power * magic;
    Doubles result = (magnitude + shift) - shift;
    if (rounding != Rounding::nearest) {
      const Doubles quantum = power * units;
      const Doubles zero{};
      Doubles whole = result - select(result > magnitude, quantum, zero);  // rounded down
      const Doubles rest = magnitude - whole;
      Longs grows{};
      if (rounding == Rounding::away) grows = rest + rest >= quantum;
      if (rounding == Rounding::up) grows = (rest > 0.0) & (sign == 0);
      if (rounding == Rounding::down) grows = (rest > 0.0) & (sign != 0);
      if (rounding == Rounding::stochastic) {
        Doubles scaled = rest / quantum * 4294967296.0;
        const Doubles large = spread(0x1p52);
        const Doubles near = (scaled + large) - large;
        scaled = near - select(near > scaled, spread(1.0), zero);
        grows = scaled + elements.uniform(key, which) >= 4294967296.0;
      }
      result = whole + select(grows, quantum, zero);
    }
    result = (Doubles)(bits_of(result) | sign);
    if (!g.negative_zero) result = result + 0.0;
    const Longs infinite = magnitude == double(INFINITY);
    const Longs above = (result > g.highest) & ~infinite, beneath = (result < g.lowest) & ~infinite;
    result = select(above, spread(g.overflow_up), result);
    result = select(beneath, spread(g.overflow_down), result);
    const Doubles edge = select(sign != 0, spread(g.infinity_down), spread(g.infinity_up));
    return select(infinite, edge, result);
  }
};

// One strip of columns of one row: the sums under way, in the order that the accumulator says.
constexpr std::size_t careful_columns = 16;
constexpr std::size_t careful_vectors = careful_columns / careful_width;
constexpr std::size_t careful_rows = 32;
constexpr std::size_t careful_levels = 33;
constexpr std::size_t careful_slots = careful_levels + 3;
struct Strip {
  Doubles v[careful_vectors];
};

template <Rounding rounding>
struct Careful {
  explicit Careful(const DotSum& sum) : s(sum), adder(sum.adder), between(sum.between) {}

  const DotSum& s;
  CarefulGrid adder;
  CarefulGrid between;

  Doubles rounded(Doubles x, Slot slot, std::size_t k, Elements e) const {
    return adder.round<rounding>(x, s.key, rounding_of(slot, k), e);
  }
  Doubles added(Doubles x, Doubles y, int slot, std::size_t k, Elements e) const {
    const Doubles exact = add_to_odd<rounding == Rounding::down>(x, y);
    return adder.round<rounding>(exact, s.key, rounding_of(slot, k), e);
  }
  Doubles added_between(Doubles x, Doubles y, Slot slot, std::size_t k, Elements e) const {
    if (!s.between_differs) return added(x, y, slot, k, e);
    return between.round<Rounding::nearest>(add_to_odd<false>(x, y), s.key, 0, e);
  }

  // sums[0]: of the products at hand, [1]: of the chunks of a part, [2]: of the parts; from [3] on a
  // second number of Kahan's, or the tree's sums that wait for a right neighbour, one a level.
  void row(Strip* sums, const float* a, const float* panel, std::size_t first, std::size_t depth,
           std::size_t total_depth, std::uint64_t element, std::uint64_t element_column) const {
    const std::size_t part_length = (total_depth + s.split - 1) / s.split;
    for (std::size_t v = 0; v < careful_vectors; ++v) {
      const Elements e{element + v * careful_width * element_column, element_column};
      Doubles inner = sums[0].v[v], chunks = sums[1].v[v], parts = sums[2].v[v];
      for (std::size_t k = first; k < first + depth; ++k) {
        const std::size_t part_first = k / part_length * part_length;
        const std::size_t part_last = part_first + part_length < total_depth ? part_first + part_length : total_depth;
        const std::size_t chunk_first = s.chunk ? k - (k - part_first) % s.chunk : part_first;
        const std::size_t chunk_last =
            s.chunk && chunk_first + s.chunk < part_last ? chunk_first + s.chunk : part_last;
        Floats right;
        std::memcpy(&right, panel + (k - first) * careful_columns + v * careful_width, sizeof right);
        Doubles product = double(a[k - first]) * __builtin_convertvector(right, Doubles);
        if (s.products_rounded) product = rounded(product, slot_product, k, e);
        if (s.order == Order::sequential) {
          inner = added(inner, product, slot_sum, k, e);
        } else if (s.order == Order::compensated) {
          Doubles& lost = sums[3].v[v];
          if (k == chunk_first) lost = Doubles{};
          const Doubles term = added(product, -lost, slot_less, k, e);
          const Doubles sum = added(inner, term, slot_sum, k, e);
          lost = added(added(sum, -inner, slot_gained, k, e), -term, slot_lost, k, e);
          inner = sum;
        } else {
          inner = grown(sums + 3, v, inner, product, k, chunk_first, k + 1 == chunk_last, e);
        }
        if (k + 1 != chunk_last) continue;
        if (s.chunk) {
          chunks = added_between(chunks, inner, slot_chunk, chunk_first, e);
          inner = Doubles{};
        }
        if (k + 1 != part_last || s.split == 1) continue;
        parts = added_between(parts, s.chunk ? chunks : inner, slot_part, part_first, e);
        inner = chunks = Doubles{};
      }
      sums[0].v[v] = inner;
      sums[1].v[v] = chunks;
      sums[2].v[v] = parts;
    }
  }

  // The tree as a binary counter: a node waits at its level for its right neighbour. Returns `start`
  // until the last product came; then what waits is added up from the right, and to `start`.
  Doubles grown(Strip* waiting, std::size_t v, Doubles start, Doubles node, std::size_t k, std::size_t first,
                bool last, Elements e) const {
    const std::size_t count = k - first;  // of the products before this one
    std::size_t level = 0;
    for (; count >> level & 1; ++level) {
      const std::size_t left = first + (count >> (level + 1) << (level + 1));
      node = added(waiting[level].v[v], node, slot_levels + int(level), left, e);
    }
    waiting[level].v[v] = node;
    if (!last) return start;
    const std::size_t all = count + 1;
    for (++level; all >> level; ++level)
      if (all >> level & 1) {
        const std::size_t left = first + (all >> (level + 1) << (level + 1));
        node = added(waiting[level].v[v], node, slot_levels + int(level), left, e);
      }
    return added(start, node, slot_start, first, e);
  }
};

// All of `work`, from what its `out` holds.
template <Rounding rounding>
void careful_with(const DotWork& work, const DotSum& sum) {
  const Careful<rounding> careful(sum);
  const std::size_t at = sum.split > 1 ? 2 : sum.chunk ? 1 : 0;  // where the start belongs
  float* panel = work.scratch;
  float* left = panel + careful_columns * dot_depth;
  Strip* strips = reinterpret_cast<Strip*>(left + careful_rows * dot_depth);
  for (std::size_t column = 0; column < work.columns; column += careful_columns)
    for (std::size_t row = 0; row < work.rows; row += careful_rows) {
      const std::size_t columns = work.columns - column < careful_columns ? work.columns - column : careful_columns;
      const std::size_t rows = work.rows - row < careful_rows ? work.rows - row : careful_rows;
      float* out = work.out + std::ptrdiff_t(row) * work.out_row + std::ptrdiff_t(column) * work.out_column;
      for (std::size_t i = 0; i < rows; ++i) {
        std::memset(static_cast<void*>(strips + i * careful_slots), 0, careful_slots * sizeof(Strip));
        for (std::size_t j = 0; j < columns; ++j)
          strips[i * careful_slots + at].v[j / careful_width][j % careful_width] =
              double(out[std::ptrdiff_t(i) * work.out_row + std::ptrdiff_t(j) * work.out_column]);
      }
      for (std::size_t first = 0; first < work.depth; first += dot_depth) {
        const std::size_t depth = work.depth - first < dot_depth ? work.depth - first : dot_depth;
        for (std::size_t k = 0; k < depth; ++k) {
          const float* from = work.b + std::ptrdiff_t(first + k) * work.b_row + std::ptrdiff_t(column) * work.b_column;
          for (std::size_t j = 0; j < careful_columns; ++j)
            panel[k * careful_columns + j] = j < columns ? from[std::ptrdiff_t(j) * work.b_column] : 0.0f;
        }
        work.round_b(panel, depth * careful_columns);
        for (std::size_t i = 0; i < rows; ++i) {
          const float* from = work.a + std::ptrdiff_t(row + i) * work.a_row + std::ptrdiff_t(first) * work.a_column;
          for (std::size_t k = 0; k < depth; ++k) left[i * depth + k] = from[std::ptrdiff_t(k) * work.a_column];
        }
        work.round_a(left, rows * depth);
        for (std::size_t i = 0; i < rows; ++i)
          careful.row(strips + i * careful_slots, left + i * depth, panel, first, depth, work.depth,
                      work.element + (row + i) * work.element_row + column * work.element_column,
                      work.element_column);
      }
      for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t j = 0; j < columns; ++j)
          out[std::ptrdiff_t(i) * work.out_row + std::ptrdiff_t(j) * work.out_column] =
              float(strips[i * careful_slots + at].v[j / careful_width][j % careful_width]);
    }
}

void dot_careful(const DotWork& work, const DotSum& sum) {
  switch (sum.rounding) {
    case Rounding::nearest: return careful_with<Rounding::nearest>(work, sum);
    case Rounding::stochastic: return careful_with<Rounding::stochastic>(work, sum);
    case Rounding::toward_zero: return careful_with<Rounding::toward_zero>(work, sum);
    case Rounding::up: return careful_with<Rounding::up>(work, sum);
    case Rounding::down: return careful_with<Rounding::down>(work, sum);
    case Rounding::away: return careful_with<Rounding::away>(work, sum);
  }
}

}  // namespace
}  // namespace halfstep
