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

// A compiler that finds this large makes a call of it, for every vector.
#if defined(__GNUC__)
#define HALFSTEP_INLINE __attribute__((always_inline))
#else
#define HALFSTEP_INLINE
#endif

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
        // Whether a number is odd is the last bit kept. Without a mantissa that bit is the exponent's:
        // it counts or it does not, and then every number is odd.
        last_bit(shift > 0 && (grid.mantissa_bits > 0 || grid.odd_exponents >= 0) ? 1 : 0),
        flipped(grid.mantissa_bits == 0 && grid.odd_exponents == 0 ? 1 : 0),
        // To nearest: half a unit, less one where ties go to even by the last bit. Where all numbers
        // are odd ties go up, to the larger magnitude.
        below_half(shift > 0 ? unit / 2 - last_bit : 0),
        step_to_odd(last_bit ? unit : 0),
        smallest_normal(bits_of_power(grid.quantum_exponent + grid.mantissa_bits)),
        even_below((grid.ends == Ends::gradual || grid.ends == Ends::wrap) && smallest_normal > hidden_bit ? smallest_normal : 0),
        even_field(even_below == 0 ? 0 : word(shift) + (even_below >> L::mantissa_bits)),
        quantum_bits(even_below == 0 ? 0 : bits_of_power(grid.quantum_exponent)),
        rarely_tiny(grid.quantum_exponent < -5),
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
        negative_zero(grid.negative_zero),
        span(number(grid.span)),
        per_span(grid.span == 0 ? number(0) : number(1 / grid.span)) {}

  static constexpr word hidden_bit = word(1) << L::mantissa_bits;

  static bool same(double a, double b) { return a == b || (a != a && b != b); }

  // The bits of 2^exponent; of the carrier's smallest normal number where that is less.
  static word bits_of_power(int exponent) {
    const int field = exponent + std::numeric_limits<number>::max_exponent - 1;
    return field <= 1 ? hidden_bit : word(field) << L::mantissa_bits;
  }

  int shift;      // bits dropped from a normal number
  word unit;      // 1 << shift
  word last_bit;  // 1 where it says what is odd
  word flipped;   // 1 where the bit of an odd number is 0
  word below_half;
  word step_to_odd;
  word smallest_normal;
  word even_below;  // bits of the number below which the grid is even; the carrier's own grid is
  word even_field;  // less a number's exponent field: how many bits the even grid drops of it
  word quantum_bits;
  bool rarely_tiny;  // less than a quantum is rare among numbers of ordinary size
  number magic;      // a number whose last bit is worth one quantum
  number quantum;
  number per_quantum;
  number highest, lowest, overflow_up, overflow_down, infinity_up, infinity_down;
  bool infinity_differs;  // from what overflows
  bool negative_zero;
  number span, per_span;
};

// `asks`: whether it looks first if any lane is in the even part of the grid. `deep`: whether numbers
// that are subnormal in the carrier matter, where `ends` flushes or has no zero.
template <class L, Rounding rounding, bool asks, Ends ends = Ends::gradual, bool deep = false>
struct Rounder {
  using Bits = typename L::Bits;
  using Float = typename L::Float;
  using Mask = typename L::Mask;
  using word = typename L::word;
  using number = typename L::number;

  static constexpr word sign_bit = word(1) << (8 * sizeof(word) - 1);
  static constexpr word infinity = ((sign_bit >> L::mantissa_bits) - 1) << L::mantissa_bits;
  static constexpr word quiet = word(1) << (L::mantissa_bits - 1);
  static constexpr word hidden_bit = word(1) << L::mantissa_bits;

  const Constants<L> c;
  const Key key;

  HALFSTEP_INLINE Bits operator()(Bits x, std::size_t index) const {
    const Bits sign = L::and_(x, L::set(sign_bit));
    const Bits magnitude = L::and_(x, L::set(word(~sign_bit)));
    const Mask negative = L::less(L::set(0), L::shift_right(sign, 1));
    typename L::Random random{};
    if constexpr (rounding == Rounding::stochastic) random = random_bits<L>(key, index);

    Bits rounded = round_normal(deepened(magnitude), negative, random);
    Float result;
    if constexpr (ends == Ends::no_zero) {
      result = handle_overflow(L::number_of(at_least_smallest(rounded)), magnitude);
      const Mask below_zero = L::both(negative, L::less(L::set(0), magnitude));
      result = L::select(below_zero, L::number_of(L::set(infinity | quiet)), result);
    } else {
      if constexpr (ends == Ends::flush) {
        const Mask too_small = L::less(rounded, L::set(c.smallest_normal));
        rounded = L::select(too_small, L::set(0), rounded);
      } else {
        const Mask is_even = L::less(magnitude, L::set(c.even_below));
        if (!asks || L::any(is_even)) {
          if constexpr (rounding == Rounding::stochastic)
            rounded = round_anywhere(magnitude, random);
          else
            rounded = L::select(is_even, round_even(L::number_of(magnitude), negative), rounded);
        }
      }
      result = L::number_of(L::or_(rounded, sign));
      if (!c.negative_zero) result = L::plus(result, L::set_number(0));
      if constexpr (ends == Ends::wrap)
        result = wrap(result, magnitude);
      else
        result = handle_overflow(result, magnitude);
    }
    const Mask is_nan = L::less(L::set(infinity), magnitude);
    return L::select(is_nan, L::or_(x, L::set(quiet)), L::bits(result));
  }

 private:
  // The carrier's subnormal numbers as if its exponents went one lower: from half its smallest
  // normal number on with all bits of the mantissa, below that not at all.
  Bits deepened(Bits magnitude) const {
    if constexpr (!deep) return magnitude;
    const Bits doubled = L::add(magnitude, L::add(magnitude, L::set(word(0) - hidden_bit)));
    const Bits deeper = L::select(L::less(magnitude, L::set(hidden_bit)), doubled, magnitude);
    return L::select(L::less(magnitude, L::set(hidden_bit / 2)), L::set(0), deeper);
  }

  // Of a grid without zero: back from deepened bits, or the smallest number if that is more.
  Bits at_least_smallest(Bits rounded) const {
    const Bits smallest = L::set(c.smallest_normal);
    const Mask less = L::less(rounded, smallest);
    if constexpr (!deep) return L::select(less, smallest, rounded);
    return L::select(less, L::shift_right(L::add(rounded, L::set(hidden_bit)), 1), rounded);
  }

  Bits round_normal(Bits magnitude, Mask negative, typename L::Random random) const {
    const Bits all_dropped = L::set(c.unit - 1);
    const Bits odd_bit = L::add(L::shift_right(magnitude, c.shift), L::set(c.flipped));
    const Bits odd = L::and_(odd_bit, L::set(c.last_bit));
    Bits addend = L::set(0);
    if constexpr (rounding == Rounding::nearest) {
      addend = L::add(odd, L::set(c.below_half));
    } else if constexpr (rounding == Rounding::away) {
      addend = L::set(c.unit / 2);
    } else if constexpr (rounding == Rounding::up) {
      addend = L::select(negative, addend, all_dropped);
    } else if constexpr (rounding == Rounding::down) {
      addend = L::select(negative, all_dropped, addend);
    } else if constexpr (rounding == Rounding::to_odd) {
      const Mask inexact = L::less(L::set(0), L::and_(magnitude, all_dropped));
      addend = L::select(L::not_both(inexact, L::less(L::set(0), odd)), L::set(c.step_to_odd), addend);
    } else if constexpr (rounding == Rounding::stochastic) {
      addend = L::top_bits(random, c.shift);
    }
    return L::and_(L::add(magnitude, addend), L::set(word(~(c.unit - 1))));
  }

  Bits round_even(Float magnitude, Mask negative) const {
    if constexpr (rounding == Rounding::nearest) {
      // the sum's last bit is worth one quantum, so the addition rounds
      const Float magic = L::set_number(c.magic);
      return L::bits(L::minus(L::plus(magnitude, magic), magic));
    }
    const Float count = L::times(magnitude, L::set_number(c.per_quantum));
    const Float whole = L::truncate(count);
    // Not by count, which is 0 for the carrier's least numbers where the quantum is more than 1.
    const Mask inexact = L::below(L::times(whole, L::set_number(c.quantum)), magnitude);
    const Float rest = L::minus(count, whole);
    Mask grows = L::below(rest, L::set_number(0));  // never
    if constexpr (rounding == Rounding::away) {
      grows = L::at_least(rest, L::set_number(number(0.5)));
    } else if constexpr (rounding == Rounding::up) {
      grows = L::not_both(inexact, negative);
    } else if constexpr (rounding == Rounding::down) {
      grows = L::both(inexact, negative);
    } else if constexpr (rounding == Rounding::to_odd) {
      // the last bit of this sum is worth one, and counts are below 2^mantissa_bits
      const Float counted = L::plus(whole, L::set_number(number(hidden_bit)));
      const Bits odd = L::and_(L::bits(counted), L::set(1));
      grows = L::not_both(inexact, L::less(L::set(0), odd));
    }
    const Float grown = L::plus_where(grows, whole, L::set_number(1));
    return L::bits(L::times(grown, L::set_number(c.quantum)));
  }

  // Stochastically, on the even grid too: there one more bit is dropped for each exponent less. What
  // is less than a quantum has no bit to keep.
  Bits round_anywhere(Bits magnitude, typename L::Random random) const {
    const Bits field = L::shift_right(magnitude, L::mantissa_bits);
    const Bits dropped = L::larger(L::minus(L::set(c.even_field), field), L::set(word(c.shift)));
    const Bits sum = L::add(magnitude, L::top_bits_each(random, dropped));
    const Bits rounded = L::and_(sum, L::shift_left_each(L::set(~word(0)), dropped));
    const Mask tiny = L::less(magnitude, L::set(c.quantum_bits));
    if (c.rarely_tiny && !L::any(tiny)) return rounded;
    const Mask grows = L::carries(L::fraction(magnitude, dropped), random);
    const Bits grown = L::select(grows, L::set(c.quantum_bits), L::set(0));
    return L::select(tiny, grown, rounded);
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

  // Modulo the span; every step is exact.
  Float wrap(Float result, Bits magnitude) const {
    const Float span = L::set_number(c.span);
    const Float turns = L::times(result, L::set_number(c.per_span));
    const Float inside = L::times(L::minus(turns, L::truncate(turns)), span);
    const Mask above = L::below(L::set_number(c.highest), inside);
    const Mask beneath = L::below(inside, L::set_number(c.lowest));
    Float wrapped = L::select(above, L::minus(inside, span), inside);
    wrapped = L::select(beneath, L::plus(inside, span), wrapped);
    wrapped = L::plus(wrapped, L::set_number(0));  // no -0
    const Mask finite = L::less(magnitude, L::set(infinity));
    return L::select(finite, wrapped, L::set_number(c.infinity_up));
  }
};

// n elements; element i has random bits first + i.
template <class L, Rounding rounding, bool asks, Ends ends, bool deep>
void round_range(const typename L::number* x, typename L::number* out, std::size_t n,
                 std::size_t first, const Grid& grid, Key key, bool stream) {
  using number = typename L::number;
  constexpr std::size_t width = L::width;
  const Rounder<L, rounding, asks, ends, deep> round{Constants<L>(grid), key};

  const auto part = [&](std::size_t i, std::size_t count) {  // fewer elements than a vector has
    number buffer[width] = {};
    for (std::size_t k = 0; k < count; ++k) buffer[k] = x[i + k];
    L::store(buffer, round(L::load(buffer), first + i));
    for (std::size_t k = 0; k < count; ++k) out[i + k] = buffer[k];
  };

  std::size_t i = 0;
  const auto whole = round;  // its address is nowhere, so that its numbers stay in registers
  if (stream) {
    const std::size_t misfit = reinterpret_cast<std::uintptr_t>(out) % (width * sizeof(number));
    const std::size_t head = misfit == 0 ? 0 : width - misfit / sizeof(number);
    if (head > 0 && head <= n) {
      part(0, head);
      i = head;
    }
    for (; i + width <= n; i += width) L::stream(out + i, whole(L::load(x + i), first + i));
    L::fence();
  } else {
    for (; i + width <= n; i += width) L::store(out + i, whole(L::load(x + i), first + i));
  }
  if (i < n) part(i, n - i);
}

// To nearest the even grid costs two additions: less than to ask. Else it pays to ask, unless
// numbers of ordinary size are there: then the processor guesses the answer wrong too often. One
// lane always asks, because only there a number fits the conversions.
template <class L, Rounding rounding>
void round_with(const typename L::number* x, typename L::number* out, std::size_t n,
                std::size_t first, const Grid& grid, Key key, bool stream) {
  const auto run = [&](auto function) { function(x, out, n, first, grid, key, stream); };
  constexpr bool one_lane = L::width == 1;
  constexpr int least = std::numeric_limits<typename L::number>::min_exponent - 1;
  constexpr bool can_be_deep = least == -126;
  const int smallest_normal = grid.quantum_exponent + grid.mantissa_bits;
  if (grid.ends == Ends::no_zero) return run(round_range<L, rounding, true, Ends::no_zero, can_be_deep>);
  if (grid.ends == Ends::flush) {
    if constexpr (can_be_deep)
      if (smallest_normal == least) return run(round_range<L, rounding, true, Ends::flush, true>);
    return run(round_range<L, rounding, true, Ends::flush, false>);
  }
  if (grid.ends == Ends::wrap) return run(round_range<L, rounding, one_lane, Ends::wrap, false>);
  const bool rarely_even = smallest_normal < -12;
  if (one_lane || (rounding != Rounding::nearest && rarely_even))
    return run(round_range<L, rounding, true, Ends::gradual, false>);
  if constexpr (!one_lane) run(round_range<L, rounding, false, Ends::gradual, false>);
}

template <class L>
void round_to(const typename L::number* x, typename L::number* out, std::size_t n,
              std::size_t first, const Grid& grid, Rounding rounding, Key key, bool stream) {
  const auto run = [&](auto function) { function(x, out, n, first, grid, key, stream); };
  switch (rounding) {
    case Rounding::nearest: return run(round_with<L, Rounding::nearest>);
    case Rounding::stochastic: return run(round_with<L, Rounding::stochastic>);
    case Rounding::toward_zero: return run(round_with<L, Rounding::toward_zero>);
    case Rounding::up: return run(round_with<L, Rounding::up>);
    case Rounding::down: return run(round_with<L, Rounding::down>);
    case Rounding::away: return run(round_with<L, Rounding::away>);
    case Rounding::to_odd: return run(round_with<L, Rounding::to_odd>);
  }
}

// Elements [begin, end). Where a carrier is not that of the rounding: piece by piece, so that the
// numbers between stay in the first cache. What is rounded fits its carrier: narrowing is exact.
template <class L>
void round_in(const RoundArrays& arrays, std::size_t begin, std::size_t end, const Grid& grid,
              Rounding rounding, Key key, bool stream) {
  using number = typename L::number;
  constexpr Carrier own = sizeof(number) == 8 ? Carrier::float64 : Carrier::float32;
  const bool widens = arrays.x_carrier != own, narrows = arrays.out_carrier != own;
  const auto* x = static_cast<const char*>(arrays.x);
  auto* out = static_cast<char*>(arrays.out);
  constexpr std::size_t most = 8192 / sizeof(number);
  const std::size_t piece = widens || narrows ? most : end - begin;
  alignas(64) number buffer[most];
  for (std::size_t i = begin; i < end; i += piece) {
    const std::size_t n = end - i < piece ? end - i : piece;
    const char* from = x + i * bytes_of(arrays.x_carrier);
    char* to = out + i * bytes_of(arrays.out_carrier);
    const auto* source = reinterpret_cast<const number*>(from);
    if (widens) {
      to_wide(from, arrays.x_carrier, buffer, n);
      source = buffer;
    }
    number* target = narrows ? buffer : reinterpret_cast<number*>(to);
    round_to<L>(source, target, n, i, grid, rounding, key, stream && !narrows);
    if (narrows) from_wide(buffer, to, arrays.out_carrier, n);
  }
}

template <class L32, class L64>
void round_arrays(const RoundArrays& arrays, std::size_t begin, std::size_t end, const Grid& grid,
                  Rounding rounding, Key key, bool stream) {
  const auto round = arrays.in_float64 ? round_in<L64> : round_in<L32>;
  round(arrays, begin, end, grid, rounding, key, stream);
}

}  // namespace
}  // namespace halfstep
