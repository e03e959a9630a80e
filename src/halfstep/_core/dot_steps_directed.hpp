// Steps of dot products to nearest, where an instruction can round its own way (V::directed): nothing has to
// be exact by the operands. Why each is right: docs/decisions/0013.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "dot_steps.hpp"

namespace halfstep {
namespace {

// x to nearest, ties to even, where `anchor` has its sign and binade: the difference to 2^shift times it has
// the format's last bit. For shift >= 13. A zero that it gives is +0.
template <class V>
struct ToNearest {
  explicit ToNearest(const StepFormat& f) : power(V::set_word(std::uint32_t(f.shift) << 23)) {}

  typename V::Words power;

  typename V::Numbers operator()(typename V::Numbers x, typename V::Numbers anchor) const {
    const auto far = V::numbers(V::add(V::words(anchor), power));
    return V::minus(far, V::minus(far, x));
  }
};

// Cut off toward zero, as the processor is told to round, after adding half: right but for exact ties, which a
// branch makes even. `some` vectors at a time are asked for them. Sums as run_tile's of dot_fast.hpp.
template <class V, bool full, int rows, int vectors>
[[gnu::noinline]] void run_half_up(const StepFormat& f, const float* a, std::size_t a_row, const float* panel,
                                   std::size_t depth, float* sums, std::size_t sums_row) {
  using Numbers = typename V::Numbers;
  using Words = typename V::Words;
  constexpr int count = rows * vectors, some = count < 4 ? count : 4;
  const HalfUp<V, full> step(f);
  const Words low = V::set_word((1u << f.shift) - 1), last = V::set_word(1u << f.shift);
  std::size_t ties = 0;
  Numbers sum[count];
  HALFSTEP_UNROLL
  for (int i = 0; i < count; ++i) sum[i] = V::load(sums + i / vectors * sums_row + i % vectors * V::width);
  for (std::size_t k = 0; k < depth; ++k) {
    Numbers b[vectors];
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) b[v] = V::load(panel + (k * vectors + v) * V::width);
    HALFSTEP_UNROLL
    for (int first = 0; first < count; first += some) {
      Words grown[some];
      typename V::Flags whole = V::all();
      HALFSTEP_UNROLL
      for (int i = 0; i < some; ++i) {
        const int at = first + i;
        if (at >= count) continue;
        const float* factor = a + at / vectors * a_row + k;
        grown[i] = V::add(V::words(V::fma_one(factor, b[at % vectors], sum[at])), step.half);
        whole = V::also_share(whole, grown[i], low);
      }
      if (__builtin_expect(!V::is_all(whole), 0)) {
        ++ties;
        HALFSTEP_UNROLL
        for (int i = 0; i < some; ++i) {
          const int at = first + i;
          if (at >= count) continue;
          const Numbers factor = V::repeat(a + at / vectors * a_row + k);
          const Words lost = V::xor_(V::words(V::fma_down(factor, b[at % vectors], sum[at])),
                                     V::words(V::fma_up(factor, b[at % vectors], sum[at])));
          const Words odd = V::where(V::share_none(V::or_(grown[i], lost), low), last);
          sum[at] = step.bounded(V::and_not(step.cut(grown[i]), odd));
        }
      } else {
        HALFSTEP_UNROLL
        for (int i = 0; i < some; ++i)
          if (first + i < count) sum[first + i] = step.bounded(step.cut(grown[i]));
      }
    }
  }
  *f.mended += ties;
  HALFSTEP_UNROLL
  for (int i = 0; i < count; ++i) V::store(sums + i / vectors * sums_row + i % vectors * V::width, sum[i]);
}

// Where many sums are ties: of the float32 numbers beside the exact sum the odd one, which cannot look like
// a tie, then to nearest. Scaled; 2^shift times a sum must be finite.
template <class V>
struct OddStep {
  static constexpr unsigned mode = 0;
  using Numbers = typename V::Numbers;

  explicit OddStep(const StepFormat& f)
      : least(V::set(0x1.8p-126f)), one(V::set_word(1)), sign(V::set_word(0x80000000u)), nearest(f) {}

  Numbers least;
  typename V::Words one, sign;
  ToNearest<V> nearest;

  template <int vectors>
  [[gnu::always_inline]] inline void operator()(Numbers (&sum)[vectors], Numbers a, const Numbers (&b)[vectors]) const {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const Numbers down = V::fma_down(a, b[v], sum[v]), up = V::fma_up(a, b[v], sum[v]);
      const Numbers odd = V::choose(V::share(V::words(down), one), down, up);
      const Numbers y = nearest(odd, V::farther(down, least));
      sum[v] = V::numbers(V::signed_as(V::words(y), V::words(odd), sign));
    }
  }
};

// What run_products wants to know of at most six rows of a.
struct ProductsLeft {
  static constexpr int rows = 6;
  alignas(64) float far[rows][dot_depth], less[rows][dot_depth];  // times 2^shift, and less what it was
  alignas(64) float smallest[dot_depth];  // the smallest magnitude that is not zero, for each step; zero if all are

  template <class V>
  void take(const float* a, std::size_t row, int count, std::size_t depth, float power) {
    const auto magnitude = V::set_word(0x7FFFFFFFu), minus_one = V::set_word(0xFFFFFFFFu), one = V::set_word(1);
    const auto factor = V::set(power);
    for (std::size_t k = 0; k < depth; k += V::width) {
      auto least = minus_one;
      for (int i = 0; i < count; ++i) {
        const auto x = V::load(a + i * row + k);
        V::store(&far[i][k], V::times(x, factor));
        V::store(&less[i][k], V::product_less(x, factor, x));
        least = V::least_word(least, V::add(V::and_(V::words(x), magnitude), minus_one));
      }
      V::store(smallest + k, V::numbers(V::add(least, one)));
    }
  }
};

// The smallest magnitude of a panel's columns that is not zero, for each step; zero if all are.
template <class V>
void find_smallest_right(const float* panel, std::size_t width, std::size_t depth, float* smallest) {
  const auto magnitude = V::set_word(0x7FFFFFFFu), minus_one = V::set_word(0xFFFFFFFFu);
  for (std::size_t k = 0; k < depth; ++k) {
    auto least = minus_one;
    for (std::size_t j = 0; j < width; j += V::width) {
      const auto word = V::and_(V::words(V::load(panel + k * width + j)), magnitude);
      least = V::least_word(least, V::add(word, minus_one));
    }
    smallest[k] = float_of(V::least_of(least) + 1);
  }
}

// Products rounded, then sums, of operands whose products are exact in float32; not scaled. Where a product
// may be subnormal, or a * (2^shift - 1) is not exact, the step takes two operations more.
template <class V, int rows, int vectors>
[[gnu::noinline]] void run_products(const StepFormat& f, const float*, std::size_t, const float* panel,
                                    std::size_t depth, float* sums, std::size_t sums_row) {
  using Numbers = typename V::Numbers;
  const ToNearest<V> nearest(f);
  const float unit = std::ldexp(1.0f, -f.shift);
  const Numbers small = V::set(unit), least = V::set(1.5f * f.least_power / unit);
  const ProductsLeft& left = *f.left;
  Numbers sum[rows][vectors];
  HALFSTEP_UNROLL
  for (int i = 0; i < rows; ++i) {
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) sum[i][v] = V::load(sums + i * sums_row + v * V::width);
  }
  for (std::size_t step = 0; step < depth; ++step) {
    const std::size_t k = f.place + step;
    Numbers b[vectors];
    HALFSTEP_UNROLL
    for (int v = 0; v < vectors; ++v) b[v] = V::load(panel + (step * vectors + v) * V::width);
    if (__builtin_expect(f.careful || left.smallest[k] * f.smallest_right[k] < f.least_power, 0)) {
      HALFSTEP_UNROLL
      for (int i = 0; i < rows; ++i) {
        HALFSTEP_UNROLL
        for (int v = 0; v < vectors; ++v) {
          const Numbers product = V::times_one(&left.far[i][k], b[v]), anchor = V::farther(product, least);
          const Numbers rounded = V::minus(anchor, V::minus_product(product, small, anchor));
          const Numbers next = V::plus(sum[i][v], rounded);
          sum[i][v] = nearest(next, next);
        }
      }
      continue;
    }
    HALFSTEP_UNROLL
    for (int i = 0; i < rows; ++i) {
      HALFSTEP_UNROLL
      for (int v = 0; v < vectors; ++v) {
        const Numbers rounded = V::product_one_less(&left.far[i][k], b[v], V::times_one(&left.less[i][k], b[v]));
        const Numbers next = V::plus(sum[i][v], rounded);
        sum[i][v] = nearest(next, next);
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
