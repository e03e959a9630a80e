// One step of a dot product in float32 lanes, exact: sum = R(sum + a * b) for the vectors of a row.
//
// Numbers are scaled by a power of two so that the format's subnormal numbers are float32's. Then its
// numbers are those float32 words whose lowest `shift` bits are zero, subnormal or not, and to round
// is to add to the word and to mask. Why each of these is exact: docs/decisions/0013.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "random.hpp"
#include "types.hpp"
#include "widen.hpp"

// Sums stay in registers only where the compiler sees every index as a constant early.
#define HALFSTEP_UNROLL _Pragma("GCC unroll 8")

namespace halfstep {
namespace {

struct ProductsLeft;

// What the steps are told, for one format.
struct StepFormat {
  int shift;                // bits of a float32 that the format lacks
  float largest;            // scaled
  std::uint32_t beyond;     // the word, sign left out, that overflow becomes
  float least_power;        // the smallest normal number; for Products, which does not scale
  float magic;
  float exact_from;  // products of this magnitude and more are exact in float32
  float unscaling;   // times what is scaled: what it was
  std::size_t* mended;  // counts
  // of random bits: the number of the first sum in the result, the way to the next, the step's
  Key key;
  std::uint32_t element, element_row, element_column, step;
  double quanta;  // in 1
  // of rounded products, in dot_steps_directed.hpp: the factors, and which step of them is the first at hand
  const ProductsLeft* left;
  const float* smallest_right;
  std::size_t place;
  bool careful;  // a * (2^shift - 1) is not exact
};

template <class V>
struct RoundsNearest {
  using Numbers = typename V::Numbers;
  using Words = typename V::Words;

  explicit RoundsNearest(const StepFormat& f)
      : shift(f.shift),
        below_half(V::set_word((1u << (f.shift - 1)) - 1)),
        one(V::set_word(1)),
        mask(V::set_word(~((1u << f.shift) - 1))) {}

  int shift;
  Words below_half, one, mask;

  Words operator()(Words x) const {
    const Words last = V::and_(V::shift_right(x, shift), one);
    return V::and_(V::add(V::add(x, below_half), last), mask);
  }
};

template <class V>
struct Overflow {
  explicit Overflow(const StepFormat& f)
      : largest(V::set(f.largest)), beyond(V::set_word(f.beyond)), sign(V::set_word(0x80000000u)) {}

  typename V::Numbers largest;
  typename V::Words beyond, sign;

  typename V::Words operator()(typename V::Words y) const {
    const auto magnitude = V::numbers(V::and_not(y, sign));
    const auto edge = V::or_(V::and_(y, sign), beyond);
    return V::select(V::above(magnitude, largest), edge, y);
  }
};

// sum + a * b = the tie + what is returned, which has the right sign.
inline double beyond_tie(float tie, float sum, float a, float b) {
  const double product = double(a) * double(b);
  // the larger one first: that difference is exact
  if (std::fabs(double(sum)) >= std::fabs(product)) return (double(sum) - double(tie)) + product;
  return (product - double(tie)) + double(sum);
}

// Lanes where sum + a * b is a float32; not all of them, if products are small or have many digits.
template <class V>
[[gnu::always_inline]] inline typename V::Flags is_exact(const StepFormat& f, typename V::Numbers sum,
                                                         typename V::Numbers a, typename V::Numbers b) {
  const auto product = V::times(a, b), r = V::fma(a, b, sum);
  const auto part = V::minus(r, sum);
  const auto error = V::plus(V::minus(sum, V::minus(r, part)), V::minus(product, part));
  const auto magnitude = V::numbers(V::and_(V::words(product), V::set_word(0x7FFFFFFFu)));
  return V::both(V::same(error, V::set(0)), V::above(magnitude, V::set(f.exact_from)));
}

// Lane by lane, the `inexact` sums that float32 rounded to a tie of the format.
template <class V>
[[gnu::noinline, gnu::cold]] void break_ties(const StepFormat& f, unsigned inexact, const float* sums, float a,
                                             const float* b, float* out) {
  const std::uint32_t low = (1u << f.shift) - 1;
  alignas(64) float ties[V::width];
  V::store(ties, V::fma(V::repeat(&a), V::load(b), V::load(sums)));
  for (; inexact; inexact &= inexact - 1) {
    const int i = __builtin_ctz(inexact);
    const double rest = beyond_tie(ties[i], sums[i], a, b[i]);
    if (rest == 0) continue;
    const std::uint32_t word = word_of(ties[i]);
    const bool grows = (rest > 0) == (word >> 31 == 0);
    out[i] = float_of((word & ~low) + (grows ? low + 1 : 0));
  }
}

// To nearest, by adding half and cutting off; right but for ties, which are told by the bits cut off.
template <class V, bool full>
struct HalfUp {
  using Numbers = typename V::Numbers;
  using Words = typename V::Words;

  explicit HalfUp(const StepFormat& f)
      : half(V::set_word(1u << (f.shift - 1))), mask(V::set_word(~((1u << f.shift) - 1))), overflow(f) {}

  Words half, mask;
  Overflow<V> overflow;

  Words cut(Words grown) const { return V::and_(grown, mask); }
  Numbers bounded(Words y) const { return V::numbers(full ? overflow(y) : y); }
};

// One step of one vector, ties and all.
template <class V, bool full>
[[gnu::always_inline]] inline void settle(const StepFormat& f, const HalfUp<V, full>& step, const float* a,
                                          const float* b, float* sums) {
  const auto factor = V::repeat(a), sum = V::load(sums), right = V::load(b);
  const auto grown = V::add(V::words(V::fma(factor, right, sum)), step.half);
  const auto cut = step.cut(grown);
  const auto tie = V::equal(grown, cut);
  const auto even = V::and_not(cut, V::where(tie, V::set_word(1u << f.shift)));
  const unsigned inexact = V::lanes(V::not_both(tie, is_exact<V>(f, sum, factor, right)));
  if (__builtin_expect(inexact == 0, 1)) {
    V::store(sums, step.bounded(even));
    return;
  }
  alignas(64) float out[V::width];
  V::store(out, V::numbers(even));
  break_ties<V>(f, inexact, sums, *a, b, out);
  V::store(sums, step.bounded(V::words(V::load(out))));
}

// The rest of a step, from pair `pair` of vectors on, which has a tie; sums are in memory.
template <class V, bool full, int rows, int vectors>
[[gnu::noinline]] void settle_from(const StepFormat& f, const float* a, std::size_t a_row, const float* b,
                                   float* sums, std::size_t sums_row, int pair) {
  const HalfUp<V, full> step(f);
  for (bool tie = true; pair < rows * vectors / 2; ++pair) {
    const int row = pair / (vectors / 2), v = pair % (vectors / 2) * 2;
    const float *left = a + row * a_row, *right = b + v * V::width;
    float* sum = sums + row * sums_row + v * V::width;
    const auto x = V::add(V::words(V::fma(V::repeat(left), V::load(right), V::load(sum))), step.half);
    const auto y = V::add(V::words(V::fma(V::repeat(left), V::load(right + V::width), V::load(sum + V::width))), step.half);
    const auto x_cut = step.cut(x), y_cut = step.cut(y);
    tie = tie || V::lanes(V::either(V::equal(x, x_cut), V::equal(y, y_cut))) != 0;
    if (__builtin_expect(tie, 0)) {
      settle<V, full>(f, step, left, right, sum);
      settle<V, full>(f, step, left, right + V::width, sum + V::width);
      tie = false;
    } else {
      V::store(sum, step.bounded(x_cut));
      V::store(sum + V::width, step.bounded(y_cut));
    }
  }
}

// Steps as run_tile's of dot_fast.hpp. A tie ends the loop: a call inside it would cost the sums their
// registers, tie or not.
template <class V, bool full, int rows, int vectors>
[[gnu::noinline]] void run_nearest(const StepFormat& f, const float* a, std::size_t a_row,
                                   const float* panel, std::size_t depth, float* sums,
                                   std::size_t sums_row) {
  using Numbers = typename V::Numbers;
  const HalfUp<V, full> step(f);
  for (std::size_t k = 0; k < depth; ++k) {
    Numbers sum[rows][vectors];
    HALFSTEP_UNROLL
    for (int i = 0; i < rows; ++i) {
      HALFSTEP_UNROLL
      for (int v = 0; v < vectors; ++v) sum[i][v] = V::load(sums + i * sums_row + v * V::width);
    }
    int pair = 0;
    for (; k < depth; ++k) {
      const float* b = panel + k * vectors * V::width;
      HALFSTEP_UNROLL
      for (int i = 0; i < rows; ++i) {
        const Numbers factor = V::repeat(a + i * a_row + k);
        HALFSTEP_UNROLL
        for (int v = 0; v < vectors; v += 2) {
          const auto x = V::add(V::words(V::fma(factor, V::load(b + v * V::width), sum[i][v])), step.half);
          const auto y = V::add(V::words(V::fma(factor, V::load(b + (v + 1) * V::width), sum[i][v + 1])), step.half);
          const auto x_cut = step.cut(x), y_cut = step.cut(y);
          if (__builtin_expect(V::lanes(V::either(V::equal(x, x_cut), V::equal(y, y_cut))) != 0, 0)) {
            pair = i * (vectors / 2) + v / 2;
            goto tie;
          }
          sum[i][v] = step.bounded(x_cut);
          sum[i][v + 1] = step.bounded(y_cut);
        }
      }
    }
  tie:
    HALFSTEP_UNROLL
    for (int i = 0; i < rows; ++i) {
      HALFSTEP_UNROLL
      for (int v = 0; v < vectors; ++v) V::store(sums + i * sums_row + v * V::width, sum[i][v]);
    }
    if (k == depth) return;
    ++*f.mended;
    settle_from<V, full, rows, vectors>(f, a + k, a_row, panel + k * vectors * V::width, sums, sums_row, pair);
  }
}

// To nearest where many sums are ties: float32 rounds toward zero, and what it lost, where it lost
// anything, counts like a last bit that is odd. Of products that are exact in float32, not scaled.
template <class V, bool full, bool scaled>
struct StickyStep {
  static constexpr unsigned mode = 0x6000;
  using Numbers = typename V::Numbers;
  using Words = typename V::Words;

  explicit StickyStep(const StepFormat& f) : nearest(f), overflow(f), unscaling(V::set(f.unscaling)) {}

  RoundsNearest<V> nearest;
  Overflow<V> overflow;
  Numbers unscaling;

  template <int vectors>
  [[gnu::always_inline]] inline void operator()(Numbers (&sum)[vectors], Numbers a,
                                                const Numbers (&b)[vectors]) const {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const Numbers r = V::fma(a, b[v], sum[v]);
      Numbers part = V::minus(r, sum[v]), right = b[v];
      if (scaled) {
        part = V::times(part, unscaling);
        right = V::times(right, unscaling);  // once for all rows
      }
      const Numbers lost = V::product_less(a, right, part);
      const Words odd = V::mark(V::shift_right(V::words(r), nearest.shift), V::differ(lost, V::set(0)));
      const Words grown = V::add(V::add(V::words(r), nearest.below_half), V::and_(odd, nearest.one));
      const Words y = V::and_(grown, nearest.mask);
      sum[v] = V::numbers(full ? overflow(y) : y);
    }
  }
};

// To nearest where no inexact sum can look like a tie.
template <class V, bool full>
struct EvenStep {
  static constexpr unsigned mode = 0;
  using Numbers = typename V::Numbers;

  explicit EvenStep(const StepFormat& f) : nearest(f), overflow(f) {}

  RoundsNearest<V> nearest;
  Overflow<V> overflow;

  template <int vectors>
  [[gnu::always_inline]] inline void operator()(Numbers (&sum)[vectors], Numbers a, const Numbers (&b)[vectors]) const {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const auto y = nearest(V::words(V::fma(a, b[v], sum[v])));
      sum[v] = V::numbers(full ? overflow(y) : y);
    }
  }
};

// Float32 rounds toward zero, up or down; what is left to cut off is then cut off the exact sum.
template <class V, Rounding rounding>
struct Directed {
  using Words = typename V::Words;

  explicit Directed(const StepFormat& f)
      : added(V::set_word(rounding == Rounding::away ? 1u << (f.shift - 1) : (1u << f.shift) - 1)),
        mask(V::set_word(~((1u << f.shift) - 1))) {}

  Words added, mask;

  Words operator()(Words x) const {
    if (rounding == Rounding::away) x = V::add(x, added);
    if (rounding == Rounding::up) x = V::add(x, V::and_not(added, V::signs(x)));
    if (rounding == Rounding::down) x = V::add(x, V::and_(added, V::signs(x)));
    return V::and_(x, mask);
  }
};

template <class V, Rounding rounding, bool products_rounded>
struct DirectedStep {
  static constexpr unsigned mode = rounding == Rounding::up     ? 0x4000
                                   : rounding == Rounding::down ? 0x2000
                                                                : 0x6000;  // MXCSR's field
  using Numbers = typename V::Numbers;

  explicit DirectedStep(const StepFormat& f) : round(f) {}

  Directed<V, rounding> round;

  template <int vectors>
  [[gnu::always_inline]] inline void operator()(Numbers (&sum)[vectors], Numbers a, const Numbers (&b)[vectors]) const {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      Numbers next;
      if (products_rounded) {
        const Numbers product = V::numbers(round(V::words(V::times(a, b[v]))));
        next = V::plus(sum[v], product);
      } else {
        next = V::fma(a, b[v], sum[v]);
      }
      sum[v] = V::numbers(round(V::words(next)));
    }
  }
};

// float32 itself, in any of the processor's own roundings.
template <class V, unsigned processor_mode, bool products_rounded>
struct PlainStep {
  static constexpr unsigned mode = processor_mode;
  using Numbers = typename V::Numbers;

  explicit PlainStep(const StepFormat&) {}

  template <int vectors>
  [[gnu::always_inline]] inline void operator()(Numbers (&sum)[vectors], Numbers a, const Numbers (&b)[vectors]) const {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v)
      sum[v] = products_rounded ? V::plus(sum[v], V::times(a, b[v])) : V::fma(a, b[v], sum[v]);
  }
};

// Products that are exact in float32, rounded, then sums, rounded: a sum of two numbers of at most 11
// digits is right if rounded twice. Not scaled. A number is rounded by adding one whose last bit is
// worth a quantum; the sums need no look at the subnormal numbers, where they are exact.
template <class V>
struct ProductsStep {
  static constexpr unsigned mode = 0;
  using Numbers = typename V::Numbers;

  explicit ProductsStep(const StepFormat& f)
      : exponent(V::set_word(0x7F800000u)), least(V::set(f.least_power)), magic(V::set(f.magic)) {}

  typename V::Words exponent;
  Numbers least, magic;

  Numbers rounded(Numbers x, Numbers power) const {
    return V::minus_product(power, magic, V::fma(power, magic, x));
  }

  template <int vectors>
  [[gnu::always_inline]] inline void operator()(Numbers (&sum)[vectors], Numbers a, const Numbers (&b)[vectors]) const {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const Numbers product = V::times(a, b[v]);
      const Numbers power = V::larger(V::numbers(V::and_(V::words(product), exponent)), least);
      const Numbers next = V::plus(sum[v], rounded(product, power));
      sum[v] = rounded(next, V::numbers(V::and_(V::words(next), exponent)));
    }
  }
};

// A number below the smallest normal one, stochastically: a whole number of quanta.
template <class V>
[[gnu::noinline, gnu::cold]] void draw_subnormal(const StepFormat& f, unsigned lanes, const float* numbers,
                                                 const std::uint32_t* random, float* out) {
  for (; lanes; lanes &= lanes - 1) {
    const int i = __builtin_ctz(lanes);
    const double count = std::fabs(double(numbers[i])) * f.quanta, whole = std::floor(count);
    const bool grows = std::floor((count - whole) * 4294967296.0) + random[i] >= 4294967296.0;
    out[i] = std::copysign(float((whole + grows) / f.quanta), numbers[i]);
  }
}

// Steps as run_tile's of dot_fast.hpp, rounded to float32 to nearest and then stochastically. The half
// of the random bits that only the place in the result decides is the same in every step.
template <class V, int rows, int vectors>
[[gnu::noinline]] void run_stochastic(const StepFormat& f, const float* a, std::size_t a_row,
                                      const float* panel, std::size_t depth, float* sums,
                                      std::size_t sums_row) {
  using Numbers = typename V::Numbers;
  using Words = typename V::Words;
  const Words mask = V::set_word(~((1u << f.shift) - 1)), magnitude = V::set_word(0x7FFFFFFFu);
  const Words second = V::set_word(second_multiplier);
  const Numbers least = V::set(f.least_power), zero = V::set(0);
  alignas(64) std::uint32_t place[rows][vectors * V::width];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors * V::width; ++j) {
      std::uint32_t h = (f.element + std::uint32_t(i) * f.element_row + std::uint32_t(j) * f.element_column) ^ f.key.low;
      h = (h ^ h >> 16) * first_multiplier;
      place[i][j] = h ^ h >> 15;
    }
  Numbers sum[rows][vectors];
  HALFSTEP_UNROLL
  for (int i = 0; i < rows; ++i) {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) sum[i][v] = V::load(sums + i * sums_row + v * V::width);
  }
  for (std::size_t k = 0; k < depth; ++k) {
    const Words key = V::set_word(f.key.high + (f.step + std::uint32_t(k)) * stride);
    HALFSTEP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const Numbers left = V::repeat(a + i * a_row + k);
      HALFSTEP_UNROLL
      for (int v = 0; v < vectors; ++v) {
        const Numbers r = V::fma(left, V::load(panel + (k * vectors + v) * V::width), sum[i][v]);
        Words h = V::multiply(V::xor_(V::load_words(&place[i][v * V::width]), key), second);
        h = V::xor_(h, V::shift_right(h, 15));
        Words y = V::and_(V::add(V::words(r), V::shift_right(h, 32 - f.shift)), mask);
        const Numbers size = V::numbers(V::and_(V::words(r), magnitude));
        const unsigned lanes = V::lanes(V::both(V::above(least, size), V::above(size, zero)));
        if (__builtin_expect(lanes != 0, 0)) {
          alignas(64) float numbers[V::width], out[V::width];
          alignas(64) std::uint32_t random[V::width];
          V::store(numbers, r);
          V::store(out, V::numbers(y));
          V::store_words(random, h);
          draw_subnormal<V>(f, lanes, numbers, random, out);
          y = V::words(V::load(out));
        }
        sum[i][v] = V::numbers(y);
      }
    }
  }
  HALFSTEP_UNROLL
  for (int i = 0; i < rows; ++i) {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) V::store(sums + i * sums_row + v * V::width, sum[i][v]);
  }
}

}  // namespace
}  // namespace halfstep
