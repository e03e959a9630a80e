// Rounding to a grid, for any lanes; the twin of halfstep/ops/reference.py.
//
// A finite number's bits, sign left out, ascend with the number, and a grid of mantissa_bits is
// every 2^shift-th of them. So a normal number is rounded by an integer addition that carries into
// the bits kept, and the exponent follows by itself. Below the smallest normal number the grid is
// even, and the distance to it is found in floating point, exactly.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "carriers.hpp"
#include "lanes_portable.hpp"
#include "random.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

// The grid as constants of the lanes' number type.
template <class L>
struct Constants {
  using word = typename L::word;
  using number = typename L::number;

  explicit Constants(const Grid& grid)
      : shift(L::mantissa_bits - grid.mantissa_bits),
        unit(word(1) << shift),
        // To nearest: half a unit, less one where ties go to even by the last bit kept. Without a
        // mantissa that bit would be the exponent's: ties then go up, to the larger magnitude.
        last_bit(shift > 0 && grid.mantissa_bits > 0 ? 1 : 0),
        below_half(shift > 0 ? unit / 2 - last_bit : 0),
        even_below(bits_of_power(grid.quantum_exponent + grid.mantissa_bits)),
        magic(number(std::ldexp(1.0, grid.quantum_exponent + L::mantissa_bits))),
        // Where no lane is below even_below: 0, not a subnormal, which would be slow to multiply.
        quantum(even_below == 0 ? number(0) : number(std::ldexp(1.0, grid.quantum_exponent))),
        per_quantum(even_below == 0 ? number(0) : number(std::ldexp(1.0, -grid.quantum_exponent))),
        highest(number(grid.highest)),
        lowest(number(grid.lowest)),
        overflow_up(number(grid.overflow_up)),
        overflow_down(number(grid.overflow_down)),
        infinity_up(number(grid.infinity_up)),
        infinity_down(number(grid.infinity_down)),
        infinity_differs(!same(grid.overflow_up, grid.infinity_up) ||
                         !same(grid.overflow_down, grid.infinity_down)),
        negative_zero(grid.negative_zero) {}

  static bool same(double a, double b) { return a == b || (a != a && b != b); }

  // The bits of 2^exponent; 0 where that is no normal number of the carrier, which then has the
  // grid's own spacing there.
  static word bits_of_power(int exponent) {
    const int field = exponent + std::numeric_limits<number>::max_exponent - 1;
    return field <= 1 ? 0 : word(field) << L::mantissa_bits;
  }

  int shift;        // bits dropped from a normal number
  word unit;        // 1 << shift
  word last_bit;    // 1 where it decides ties
  word below_half;
  word even_below;  // bits of the smallest normal number: below it the grid is even
  number magic;  // a number whose last bit is worth one quantum
  number quantum;
  number per_quantum;
  number highest, lowest, overflow_up, overflow_down, infinity_up, infinity_down;
  bool infinity_differs;  // from what overflows
  bool negative_zero;
};

// `asks`: whether it looks first if any lane is in the even part of the grid.
template <class L, Rounding rounding, bool asks>
struct Rounder {
  using Bits = typename L::Bits;
  using Float = typename L::Float;
  using Mask = typename L::Mask;
  using word = typename L::word;
  using number = typename L::number;

  static constexpr word sign_bit = word(1) << (8 * sizeof(word) - 1);
  static constexpr word infinity = ((sign_bit >> L::mantissa_bits) - 1) << L::mantissa_bits;
  static constexpr word quiet = word(1) << (L::mantissa_bits - 1);


  const Constants<L> c;
  const Key key;

  Bits operator()(Bits x, std::size_t index) const {
    const Bits sign = L::and_(x, L::set(sign_bit));
    const Bits magnitude = L::and_(x, L::set(word(~sign_bit)));
    const Mask negative = L::less(L::set(0), L::shift_right(sign, 1));
    typename L::Random random{};
    if constexpr (rounding == Rounding::stochastic) random = random_bits<L>(key, index);

    const Mask is_even = L::less(magnitude, L::set(c.even_below));
    Bits rounded = round_normal(magnitude, negative, random);
    if (!asks || L::any(is_even)) {
      const Float even = round_even(L::number_of(magnitude), negative, random);
      rounded = L::select(is_even, L::bits(even), rounded);
    }
    Float result = L::number_of(L::or_(rounded, sign));
    if (!c.negative_zero) result = L::plus(result, L::set_number(0));
    result = handle_overflow(result, magnitude);
    const Mask is_nan = L::less(L::set(infinity), magnitude);
    return L::select(is_nan, L::or_(x, L::set(quiet)), L::bits(result));
  }

 private:
  Bits round_normal(Bits magnitude, Mask negative, typename L::Random random) const {
    const Bits all_dropped = L::set(c.unit - 1);
    Bits addend = L::set(0);
    if constexpr (rounding == Rounding::nearest) {
      const Bits last = L::and_(L::shift_right(magnitude, c.shift), L::set(c.last_bit));
      addend = L::add(last, L::set(c.below_half));
    } else if constexpr (rounding == Rounding::away) {
      addend = L::set(c.unit / 2);
    } else if constexpr (rounding == Rounding::up) {
      addend = L::select(negative, addend, all_dropped);
    } else if constexpr (rounding == Rounding::down) {
      addend = L::select(negative, all_dropped, addend);
    } else if constexpr (rounding == Rounding::stochastic) {
      addend = L::top_bits(random, c.shift);
    }
    return L::and_(L::add(magnitude, addend), L::set(word(~(c.unit - 1))));
  }

  Float round_even(Float magnitude, Mask negative, typename L::Random random) const {
    if constexpr (rounding == Rounding::nearest) {
      // the sum's last bit is worth one quantum, so the addition rounds
      const Float magic = L::set_number(c.magic);
      return L::minus(L::plus(magnitude, magic), magic);
    }
    const Float count = L::times(magnitude, L::set_number(c.per_quantum));
    const Float whole = L::truncate(count);
    const Float rest = L::minus(count, whole);
    const Float zero = L::set_number(0);
    Mask grows = L::below(rest, zero);  // never
    if constexpr (rounding == Rounding::away) {
      grows = L::at_least(rest, L::set_number(number(0.5)));
    } else if constexpr (rounding == Rounding::up) {
      grows = L::not_both(L::below(zero, rest), negative);
    } else if constexpr (rounding == Rounding::down) {
      grows = L::both(L::below(zero, rest), negative);
    } else if constexpr (rounding == Rounding::stochastic) {
      grows = L::carries(rest, random);
    }
    const Float grown = L::plus_where(grows, whole, L::set_number(1));
    return L::times(grown, L::set_number(c.quantum));
  }

  Float handle_overflow(Float result, Bits magnitude) const {
    Float up = L::set_number(c.overflow_up);
    Float down = L::set_number(c.overflow_down);
    if (c.infinity_differs) {
      const Mask finite = L::less(magnitude, L::set(infinity));
      up = L::select(finite, up, L::set_number(c.infinity_up));
      down = L::select(finite, down, L::set_number(c.infinity_down));
    }
    const Float highest = L::set_number(c.highest);
    const Float lowest = L::set_number(c.lowest);
    const Mask above = L::below(highest, result);
    const Mask beneath = L::below(result, lowest);
    return L::select(beneath, down, L::select(above, up, result));
  }
};

template <class L, Rounding rounding, bool asks>
void round_range(const typename L::number* x, typename L::number* out, std::size_t begin,
                 std::size_t end, const Grid& grid, Key key, bool stream) {
  using number = typename L::number;
  constexpr std::size_t width = L::width;
  const Rounder<L, rounding, asks> round{Constants<L>(grid), key};

  const auto part = [&](std::size_t i, std::size_t count) {  // fewer elements than a vector has
    number buffer[width] = {};
    for (std::size_t k = 0; k < count; ++k) buffer[k] = x[i + k];
    L::store(buffer, round(L::load(buffer), i));
    for (std::size_t k = 0; k < count; ++k) out[i + k] = buffer[k];
  };

  std::size_t i = begin;
  if (stream) {
    const std::size_t misfit = reinterpret_cast<std::uintptr_t>(out + i) % (width * sizeof(number));
    const std::size_t head = misfit == 0 ? 0 : width - misfit / sizeof(number);
    if (head > 0 && head <= end - i) {
      part(i, head);
      i += head;
    }
    for (; i + width <= end; i += width) L::stream(out + i, round(L::load(x + i), i));
    L::fence();
  } else {
    for (; i + width <= end; i += width) L::store(out + i, round(L::load(x + i), i));
  }
  if (i < end) part(i, end - i);
}

// To nearest the even grid costs two additions: less than to ask. Else it pays to ask, unless
// numbers of ordinary size are there: then the processor guesses the answer wrong too often. One
// lane always asks, because only there a number fits the conversions.
template <class L, Rounding rounding>
void round_with(const typename L::number* x, typename L::number* out, std::size_t begin,
                std::size_t end, const Grid& grid, Key key, bool stream) {
  constexpr bool one_lane = L::width == 1;
  const bool rarely_even = grid.quantum_exponent + grid.mantissa_bits < -12;
  if (one_lane || (rounding != Rounding::nearest && rarely_even))
    return round_range<L, rounding, true>(x, out, begin, end, grid, key, stream);
  if constexpr (!one_lane)
    round_range<L, rounding, false>(x, out, begin, end, grid, key, stream);
}

template <class L>
void round_to(const typename L::number* x, typename L::number* out, std::size_t begin,
              std::size_t end, const Grid& grid, Rounding rounding, Key key, bool stream) {
  const auto run = [&](auto function) { function(x, out, begin, end, grid, key, stream); };
  switch (rounding) {
    case Rounding::nearest: return run(round_with<L, Rounding::nearest>);
    case Rounding::stochastic: return run(round_with<L, Rounding::stochastic>);
    case Rounding::toward_zero: return run(round_with<L, Rounding::toward_zero>);
    case Rounding::up: return run(round_with<L, Rounding::up>);
    case Rounding::down: return run(round_with<L, Rounding::down>);
    case Rounding::away: return run(round_with<L, Rounding::away>);
  }
}

template <class L>
void round_arrays(const RoundArrays& arrays, std::size_t begin, std::size_t end, const Grid& grid,
                  Rounding rounding, Key key, bool stream) {
  const auto [x, from, out, to] = arrays;
  if (from == Carrier::float64)
    return round_to<Portable64>(static_cast<const double*>(x), static_cast<double*>(out), begin,
                                end, grid, rounding, key, stream);
  if (from == Carrier::float32 && to == Carrier::float32)
    return round_to<L>(static_cast<const float*>(x), static_cast<float*>(out), begin, end, grid,
                       rounding, key, stream);
  round_through_float32(x, from, out, to, begin, end, grid, rounding, key, round_to<L>);
}

}  // namespace
}  // namespace halfstep
