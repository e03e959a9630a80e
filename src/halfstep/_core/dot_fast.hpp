// Dot products in float32 lanes: which steps a work may take, and the walk over panels and tiles. What
// cannot go this way goes dot_careful.hpp's; both give the same bits.
#pragma once

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dot_careful.hpp"
#include "dot_pack.hpp"
#include "dot_steps.hpp"
#include "dot_steps_directed.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

// Steps for rows of `a` and a panel of `b` (depth x columns of the tile), from what `sums` holds.
using RunTile = void (*)(const StepFormat& format, const float* a, std::size_t a_row,
                         const float* panel, std::size_t depth, float* sums, std::size_t sums_row);

template <class V, class Step, int rows, int vectors>
[[gnu::noinline]] void run_tile(const StepFormat& format, const float* a, std::size_t a_row,
                                const float* panel, std::size_t depth, float* sums,
                                std::size_t sums_row) {
  const Step step(format);
  typename V::Numbers sum[rows][vectors];
  HALFSTEP_UNROLL
  for (int i = 0; i < rows; ++i) {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) sum[i][v] = V::load(sums + i * sums_row + v * V::width);
  }
  for (std::size_t k = 0; k < depth; ++k) {
    typename V::Numbers b[vectors];
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) b[v] = V::load(panel + (k * vectors + v) * V::width);
    HALFSTEP_UNROLL
    for (int i = 0; i < rows; ++i) {
      typename V::Numbers row[vectors];
      HALFSTEP_UNROLL
      for (int v = 0; v < vectors; ++v) row[v] = sum[i][v];
      step(row, V::repeat(a + i * a_row + k), b);
      HALFSTEP_UNROLL
      for (int v = 0; v < vectors; ++v) sum[i][v] = row[v];
    }
  }
  HALFSTEP_UNROLL
  for (int i = 0; i < rows; ++i) {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) V::store(sums + i * sums_row + v * V::width, sum[i][v]);
  }
}

// The tiles of one kind of step: [0] a wide one of one row, [n] of n rows.
struct Tiles {
  RunTile run[9];
  int most_rows;
  unsigned mode;  // the processor's rounding while they run
};

constexpr int wide_vectors = 8;

template <class V, class Step, int most>
const Tiles& tiles_of() {
  static const Tiles tiles = [] {
    Tiles t{};
    t.most_rows = most;
    t.mode = Step::mode;
    t.run[0] = run_tile<V, Step, 1, wide_vectors>;
    t.run[1] = run_tile<V, Step, 1, 2>;
    t.run[2] = run_tile<V, Step, 2, 2>;
    t.run[3] = run_tile<V, Step, 3, 2>;
    t.run[4] = run_tile<V, Step, 4, 2>;
    if constexpr (most >= 6) {
      t.run[5] = run_tile<V, Step, 5, 2>;
      t.run[6] = run_tile<V, Step, 6, 2>;
    }
    if constexpr (most >= 8) {
      t.run[7] = run_tile<V, Step, 7, 2>;
      t.run[8] = run_tile<V, Step, 8, 2>;
    }
    return t;
  }();
  return tiles;
}

// The processor rounds otherwise while this lives; what runs meanwhile is called by address.
class ProcessorMode {
 public:
  explicit ProcessorMode(unsigned mode) : old_(_mm_getcsr()), changed_(mode != 0) {
    if (changed_) _mm_setcsr((old_ & ~0x6000u) | mode);
  }
  ~ProcessorMode() {
    if (changed_) _mm_setcsr(old_);
  }
  ProcessorMode(const ProcessorMode&) = delete;
  ProcessorMode& operator=(const ProcessorMode&) = delete;

 private:
  unsigned old_;
  bool changed_;
};

template <class V>
const Tiles& stochastic_tiles() {
  static const Tiles tiles{{run_stochastic<V, 1, wide_vectors>, run_stochastic<V, 1, 2>, run_stochastic<V, 2, 2>,
                            run_stochastic<V, 3, 2>, run_stochastic<V, 4, 2>},
                           4,
                           0};
  return tiles;
}

template <class V>
const Tiles& products_tiles() {
  if constexpr (V::directed) {
    static const Tiles tiles{{run_products<V, 1, wide_vectors>, run_products<V, 1, 2>, run_products<V, 2, 2>,
                              run_products<V, 3, 2>, run_products<V, 4, 2>, run_products<V, 5, 2>, run_products<V, 6, 2>},
                             6,
                             0};
    return tiles;
  } else {
    return tiles_of<V, ProductsStep<V>, 4>();
  }
}

template <class V, bool full>
const Tiles& nearest_tiles() {
  if constexpr (V::directed) {
    static const Tiles tiles{{run_half_up<V, full, 1, wide_vectors>, run_half_up<V, full, 1, 2>, run_half_up<V, full, 2, 2>,
                              run_half_up<V, full, 3, 2>, run_half_up<V, full, 4, 2>},
                             4,
                             0x6000};
    return tiles;
  }
  static const Tiles tiles{{run_nearest<V, full, 1, wide_vectors>, run_nearest<V, full, 1, 2>, run_nearest<V, full, 2, 2>,
                            run_nearest<V, full, 3, 2>, run_nearest<V, full, 4, 2>},
                           4,
                           0};
  return tiles;
}

template <class V>
class FastDot {
 public:
  FastDot(const DotWork& work, const DotSum& sum) : w(work), s(sum), g(sum.adder) {
    const int m = g.mantissa_bits, least = g.quantum_exponent + m;
    nearest = s.rounding == Rounding::nearest;
    stochastic = s.rounding == Rounding::stochastic;
    const bool infinite = std::isinf(g.infinity_up);
    const bool float_range = infinite && least == -126 && std::ilogb(g.highest) == 127;
    plain = m == 23 && float_range && s.rounding != Rounding::away && !stochastic;
    products = s.products_rounded && nearest && !plain;
    bounded = !float_range;
    if (m > 23) return;  // fixed point
    scale = products || stochastic ? 0 : -126 - least;
    format.unscaling = std::ldexp(1.0f, -scale);
    format.mended = &mended;
    format.key = s.key;
    format.element_row = std::uint32_t(w.element_row);
    format.element_column = std::uint32_t(w.element_column);
    format.quanta = std::ldexp(1.0, -g.quantum_exponent);
    format.shift = 23 - m;
    odd_fits = V::directed && format.shift >= 13;
    format.largest = float(std::ldexp(g.highest, scale));
    format.beyond = word_of(float(std::isfinite(g.overflow_up) ? std::ldexp(g.overflow_up, scale) : g.overflow_up)) & 0x7FFFFFFFu;
    format.least_power = std::ldexp(1.0f, least);
    format.magic = std::ldexp(1.5f, 23 - m);
  }

  // False where the sums need more care than these steps take; nothing is written then.
  bool run() {
    if (!may_run()) return false;
    vectors = w.rows == 1 && w.columns > std::size_t(2 * V::width) ? wide_vectors : 2;
    width = std::size_t(vectors * V::width);
    across = (w.columns + width - 1) / width;
    padded = across * width;
    panels = w.scratch;
    rows = panels + padded * dot_depth;
    inner = rows + w.rows * dot_depth;
    chunks = inner + w.rows * padded;
    parts = chunks + w.rows * padded;
    if (!begin()) return false;
    for (std::size_t first = 0; first < w.depth; first += dot_depth) {
      const std::size_t depth = std::min(dot_depth, w.depth - first);
      if (!pack(first, depth)) return false;
      const std::size_t down = (w.rows + most_rows() - 1) / most_rows();
      for (std::size_t i = 0; i < across * down; ++i) {
        // a panel stays in the first cache; of rounded products the rows do, which are made ready once
        const std::size_t p = products ? i % across : i / down, row = (products ? i / across : i % down) * most_rows();
        const std::size_t count = std::min(w.rows - row, most_rows());
        if constexpr (V::directed)
          if (products && p == 0)
            left.template take<V>(rows + row * depth, depth, int(count), depth, std::ldexp(1.0f, format.shift));
        if (!run_rows(first, depth, p, row, count)) return false;
      }
    }
    end();
    return true;
  }

 private:
  const DotWork& w;
  const DotSum& s;
  const Grid& g;
  StepFormat format{};
  bool nearest, stochastic, plain, products, bounded;
  int scale = 0;  // sums are multiplied by 2^scale
  int vectors = 2;
  std::size_t width = 0, across = 0, padded = 0;
  float *panels = nullptr, *rows = nullptr, *inner = nullptr, *chunks = nullptr, *parts = nullptr;
  double most_product = 0;  // scaled
  int product_digits = 48;
  bool sticky_fits = false;  // StickyStep may be taken
  bool odd_fits;             // OddStep, of sums that are not too large
  std::size_t mended = 0, looked_at = 0;  // steps with a tie, of how many rows
  // of rounded products
  std::conditional_t<V::directed, ProductsLeft, char> left;
  float smallest_right[V::directed ? dot_columns / 32 * dot_depth : 1];

  bool may_run() const {
    if (s.order != Order::sequential) return false;
    if (stochastic) {
      // in the first block of random bits; sums of chunks are not drawn here
      const std::uint64_t last = w.element + w.rows * w.element_row + w.columns * w.element_column;
      if (last >> 32 || s.products_rounded || ((s.chunk || s.split > 1) && !s.between_differs)) return false;
      if (!std::isinf(g.overflow_up) || g.mantissa_bits < 1) return false;
    }
    if (plain) return true;
    const int m = g.mantissa_bits;
    if (m < 1 || m > 14 || !g.negative_zero) return false;
    if (!products) return true;
    if (V::directed && g.quantum_exponent + m < -126) return false;
    // rounded twice, and the number added must be finite
    return m <= 10 && std::ilogb(g.highest) + 25 - m < 127;
  }

  // Steps to nearest stumble over ties: past a few of them the others are faster.
  bool takes_sticky() const { return (sticky_fits || odd_fits) && mended * 20 > looked_at; }

  const Tiles& tiles(bool even, bool full, bool odd) const {
    constexpr int few = 4;
    if (stochastic) return stochastic_tiles<V>();
    if (plain && s.products_rounded) {
      if (s.rounding == Rounding::toward_zero) return tiles_of<V, PlainStep<V, 0x6000, true>, few>();
      if (s.rounding == Rounding::up) return tiles_of<V, PlainStep<V, 0x4000, true>, few>();
      if (s.rounding == Rounding::down) return tiles_of<V, PlainStep<V, 0x2000, true>, few>();
      return tiles_of<V, PlainStep<V, 0, true>, few>();
    }
    if (plain) {
      if (s.rounding == Rounding::toward_zero) return tiles_of<V, PlainStep<V, 0x6000, false>, few>();
      if (s.rounding == Rounding::up) return tiles_of<V, PlainStep<V, 0x4000, false>, few>();
      if (s.rounding == Rounding::down) return tiles_of<V, PlainStep<V, 0x2000, false>, few>();
      return tiles_of<V, PlainStep<V, 0, false>, V::most_rows>();
    }
    if (products) return products_tiles<V>();
    if (nearest && even) return full ? tiles_of<V, EvenStep<V, true>, few>() : tiles_of<V, EvenStep<V, false>, few>();
    if constexpr (V::directed)
      if (nearest && odd && !full && takes_sticky()) return tiles_of<V, OddStep<V>, few>();
    if (nearest && sticky_fits && takes_sticky()) {
      if (scale == 0) return full ? tiles_of<V, StickyStep<V, true, false>, few>() : tiles_of<V, StickyStep<V, false, false>, few>();
      return full ? tiles_of<V, StickyStep<V, true, true>, few>() : tiles_of<V, StickyStep<V, false, true>, few>();
    }
    if (nearest) return full ? nearest_tiles<V, true>() : nearest_tiles<V, false>();
    if (s.products_rounded) return directed<true>();
    return directed<false>();
  }

  template <bool products_rounded>
  const Tiles& directed() const {
    if (s.rounding == Rounding::up) return tiles_of<V, DirectedStep<V, Rounding::up, products_rounded>, 4>();
    if (s.rounding == Rounding::down) return tiles_of<V, DirectedStep<V, Rounding::down, products_rounded>, 4>();
    if (s.rounding == Rounding::away) return tiles_of<V, DirectedStep<V, Rounding::away, products_rounded>, 4>();
    return tiles_of<V, DirectedStep<V, Rounding::toward_zero, products_rounded>, 4>();
  }

  std::size_t most_rows() const {
    if (products && V::directed) return ProductsLeft::rows;
    return plain && nearest && !s.products_rounded ? V::most_rows : 4;
  }

  float* starts() const { return s.split > 1 ? parts : s.chunk ? chunks : inner; }

  // `inner` is scaled; the sums of chunks and of parts are not.
  bool begin() {
    std::fill(inner, inner + (s.split > 1 ? 3 : s.chunk ? 2 : 1) * w.rows * padded, 0.0f);
    const float factor = starts() == inner ? std::ldexp(1.0f, scale) : 1.0f;
    std::uint32_t negative_zeros = 0;
    for (std::size_t i = 0; i < w.rows; ++i) {
      float* to = starts() + i * padded;
      copy_row(w.out + std::ptrdiff_t(i) * w.out_row, w.out_column, w.columns, to);
      for (std::size_t j = 0; j < w.columns; ++j) {
        negative_zeros += word_of(to[j]) == 0x80000000u;
        to[j] *= factor;
      }
    }
    return !(products && negative_zeros != 0);  // which those steps take for +0
  }

  void end() {
    const float factor = starts() == inner ? std::ldexp(1.0f, -scale) : 1.0f;
    for (std::size_t i = 0; i < w.rows; ++i) {
      const float* from = starts() + i * padded;
      float* to = w.out + std::ptrdiff_t(i) * w.out_row;
      if (w.out_column == 1)
        for (std::size_t j = 0; j < w.columns; ++j) to[j] = from[j] * factor;
      else
        for (std::size_t j = 0; j < w.columns; ++j) to[std::ptrdiff_t(j) * w.out_column] = from[j] * factor;
    }
  }

  bool pack(std::size_t first, std::size_t depth) {
    const int of_a = scale / 2, of_b = scale - of_a;
    const float factor = std::ldexp(1.0f, of_b);
    Survey a, b;
    pack_rows(w, first, depth, rows);
    w.round_a(rows, w.rows * depth);
    if (!plain) a.take(rows, rows, w.rows * depth, std::ldexp(1.0f, of_a));
    for (std::size_t p = 0; p < across; ++p) {
      float* panel = panels + p * width * depth;
      const std::size_t columns = std::min(width, w.columns - p * width);
      pack_columns(w, first, depth, p * width, columns, panel);
      w.round_b(panel, depth * columns);
      if (!plain) b.take(panel, panel, depth * columns, factor);
      if (columns < width) spread_columns(panel, depth, columns, width);
    }
    if (plain) return true;
    if (!a.is_finite() || !b.is_finite()) return false;
    if (a.is_zero() || b.is_zero()) {
      most_product = 0;
      product_digits = 0;
      format.exact_from = 0;
      format.careful = true;
      return true;
    }
    if (a.last_bit() + of_a < -149 || b.last_bit() + of_b < -149) return false;
    most_product = std::ldexp(double(float_of(a.largest)) * double(float_of(b.largest)), scale);
    product_digits = a.digits() + b.digits();
    format.exact_from = product_digits <= 24 ? 0x1p-124f : INFINITY;
    sticky_fits = product_digits <= 24 && a.last_bit() + b.last_bit() >= -149 && int(b.largest >> 23) - of_a < 254;
    format.careful = a.digits() + format.shift > 24;
    if constexpr (V::directed)
      if (products)
        for (std::size_t p = 0; p < across; ++p)
          find_smallest_right<V>(panels + p * width * depth, width, depth, smallest_right + p * dot_depth);
    return !products || (product_digits <= 24 && a.last_bit() + b.last_bit() >= -149);
  }

  // The products of the panel for one tile, as many at a time as one chunk has.
  bool run_rows(std::size_t first, std::size_t depth, std::size_t p, std::size_t row, std::size_t count) {
    const std::size_t at = row * padded + p * width;
    const std::size_t part_length = s.split > 1 ? (w.depth + s.split - 1) / s.split : w.depth;
    const float* a = rows + row * depth;
    const float* panel = panels + p * width * depth;
    for (std::size_t k = first; k < first + depth;) {
      const std::size_t part_first = k / part_length * part_length;
      const std::size_t part_last = std::min(part_first + part_length, w.depth);
      const std::size_t chunk_last =
          s.chunk ? std::min(k - (k - part_first) % s.chunk + s.chunk, part_last) : part_last;
      const std::size_t last = std::min(chunk_last, first + depth);
      format.element = std::uint32_t(w.element + row * w.element_row + p * width * w.element_column);
      format.step = std::uint32_t(k);
      if constexpr (V::directed) {
        format.left = &left;
        format.smallest_right = smallest_right + p * dot_depth;
        format.place = k - first;
      }
      const bool fresh = s.chunk && (k - part_first) % s.chunk == 0;
      if (!run_steps(a + (k - first), depth, panel + (k - first) * width, last - k, inner + at, count, fresh)) return false;
      k = last;
      if (k != chunk_last) continue;
      if (s.chunk) fold(chunks + at, inner + at, count, true);
      if (k != part_last || s.split == 1) continue;
      if (s.chunk)
        fold(parts + at, chunks + at, count, false);
      else
        fold(parts + at, inner + at, count, true);
    }
    return true;
  }

  // `fresh`: sums are zero.
  bool run_steps(const float* a, std::size_t a_row, const float* panel, std::size_t depth, float* sums,
                 std::size_t count, bool fresh) {
    const int index = vectors == 2 ? int(count) : 0;
    const bool few_digits = nearest && !products && product_digits <= format.shift - 1;
    if (plain || (!bounded && !few_digits && !(odd_fits && takes_sticky()))) {
      const Tiles& t = tiles(false, false, false);
      const ProcessorMode mode(t.mode);
      looked_at += takes_sticky() ? 0 : depth * count;
      t.run[index](format, a, a_row, panel, depth, sums, padded);
      return true;
    }
    // to nearest, a sum grows by twice a product at most; else by a product and a quantum
    const double quantum = std::ldexp(double(format.largest), -g.mantissa_bits);
    double growth = most_product * 2;
    if (!nearest) growth = most_product + quantum;
    if (s.products_rounded) growth *= 2;
    while (depth > 0) {
      std::uint32_t word = 0;  // words order as their numbers do, NaN above all
      for (std::size_t i = 0; i < count && !fresh; ++i)
        for (std::size_t j = 0; j < width; ++j)
          word = std::max(word, word_of(sums[i * padded + j]) & 0x7FFFFFFFu);
      const float most = float_of(word);
      std::size_t steps = depth;
      bool full = false;
      if (bounded && !(most + growth * double(depth) < double(format.largest))) {
        const double room = (double(format.largest) - double(most)) / growth;
        full = !(room >= 32);
        steps = std::size_t(std::min(double(depth), full ? 64.0 : std::floor(room) - 1));
        if (full && (!nearest || products)) return false;
      }
      const double bound = most + growth * double(steps);
      const bool even = few_digits && ((g.mantissa_bits <= 10 && product_digits <= g.mantissa_bits + 1) ||
                                       (!full && bound <= std::ldexp(1.0, -103 - g.mantissa_bits)) ||
                                       (full && double(format.largest) + growth <= std::ldexp(1.0, -103 - g.mantissa_bits)));
      const Tiles& t = tiles(even, full, odd_fits && bound < std::ldexp(1.0, 126 - format.shift));
      const ProcessorMode mode(t.mode);
      looked_at += even || takes_sticky() ? 0 : steps * count;
      t.run[index](format, a, a_row, panel, steps, sums, padded);
      format.step += std::uint32_t(steps);
      format.place += steps;
      fresh = false;
      a += steps;
      panel += steps * width;
      depth -= steps;
    }
    return true;
  }

  // total = RB(total + sum); what was summed starts from zero again.
  void fold(float* total, float* sum, std::size_t count, bool scaled) {
    const float factor = scaled ? std::ldexp(1.0f, -scale) : 1.0f;
    const bool is_float = s.between_differs && s.between.mantissa_bits == 23 && s.between.quantum_exponent == -149 &&
                          std::isinf(s.between.overflow_up);
    for (std::size_t i = 0; i < count; ++i) {
      float* to = total + i * padded;
      float* from = sum + i * padded;
      if (is_float) {
        for (std::size_t j = 0; j < width; ++j) to[j] += from[j] * factor;
      } else {
        fold_row(to, from, factor);
      }
      std::fill(from, from + width, 0.0f);
    }
  }

  void fold_row(float* to, const float* from, float factor) const {
    const Rounding rounding = s.between_differs ? Rounding::nearest : s.rounding;
    switch (rounding) {
      case Rounding::toward_zero: return fold_with<Rounding::toward_zero>(to, from, factor);
      case Rounding::up: return fold_with<Rounding::up>(to, from, factor);
      case Rounding::down: return fold_with<Rounding::down>(to, from, factor);
      case Rounding::away: return fold_with<Rounding::away>(to, from, factor);
      default: return fold_with<Rounding::nearest>(to, from, factor);
    }
  }

  template <Rounding rounding>
  void fold_with(float* to, const float* from, float factor) const {
    const CarefulGrid grid(s.between);
    for (std::size_t j = 0; j < width; j += careful_width) {
      Floats x, y;
      std::memcpy(&x, to + j, sizeof x);
      std::memcpy(&y, from + j, sizeof y);
      const Doubles exact = add_to_odd<rounding == Rounding::down>(
          __builtin_convertvector(x, Doubles), __builtin_convertvector(y * factor, Doubles));
      const Floats rounded =
          __builtin_convertvector(grid.round<rounding>(exact, Key{}, 0, Elements{0, 0}), Floats);
      std::memcpy(to + j, &rounded, sizeof rounded);
    }
  }
};

template <class V>
void dot_fast(const DotWork& work, const DotSum& sum) {
  if (!FastDot<V>(work, sum).run()) dot_careful(work, sum);
}

}  // namespace
}  // namespace halfstep
