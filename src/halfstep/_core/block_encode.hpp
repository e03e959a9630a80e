// Numbers over the scales of their blocks, rounded, as numbers again or as codes; for any lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "block_codes.hpp"
#include "block_scales.hpp"
#include "round.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

// To nearest, for elements that saturate and quotients that are finite, in half the instructions of
// Rounder: adding a number whose last bit is worth the spacing rounds.
template <class L>
struct NearestFloat {
  using Bits = typename L::Bits;
  using Float = typename L::Float;

  NearestFloat(const BlockPlan& plan, Key)
      : largest(plan.largest),
        least_binade(Constants<L>::bits_of_power(plan.element.quantum_exponent +
                                                 plan.element.mantissa_bits)),
        lift(std::uint32_t(23 - plan.element.mantissa_bits) << 23),
        shift(23 - plan.element.mantissa_bits),
        to_sign(32 - plan.element_bits) {}

  static bool takes(const BlockPlan& plan) {  // without a mantissa bit, ties go up
    return !plan.element_is_fixed && plan.element.mantissa_bits > 0;
  }

  Bits operator()(Bits x, std::size_t) const {
    const Sum it(*this, x);
    const auto rounded = L::minus(it.sum, L::number_of(it.magic));
    return L::or_(L::bits(rounded), L::and_(x, L::set(0x80000000u)));
  }

  // The code of what x rounds to: the last bits of the sum count the spacings, of which a binade has
  // as many as there are codes in it.
  Bits code(Bits x) const {
    const Sum it(*this, x);
    const Bits codes_below =
        L::shift_right(L::add(it.binade, L::set(0u - least_binade)), shift);
    const Bits code = L::add(L::minus(L::bits(it.sum), it.magic), codes_below);
    return L::or_(code, L::shift_right(L::and_(x, L::set(0x80000000u)), to_sign));
  }

 private:
  struct Sum {
    Sum(const NearestFloat& it, Bits x) {
      const Bits magnitude = L::and_(x, L::set(0x7FFFFFFFu));
      const Float number = L::least(L::number_of(magnitude), L::set_number(it.largest));
      binade = L::max_words(L::and_(L::bits(number), L::set(0x7F800000u)),
                            L::set(it.least_binade));
      magic = L::add(binade, L::set(it.lift));
      sum = L::plus(number, L::number_of(magic));
    }

    Bits binade, magic;
    Float sum;
  };

  float largest;
  std::uint32_t least_binade, lift;
  int shift, to_sign;
};

template <class L>
struct NearestFixed {
  NearestFixed(const BlockPlan& plan, Key)
      : highest(float(plan.element.highest)),
        lowest(float(plan.element.lowest)),
        magic(float(std::ldexp(1.5, plan.element.quantum_exponent + 23))) {}

  typename L::Bits operator()(typename L::Bits x, std::size_t) const {
    const auto number = L::most(L::least(L::number_of(x), L::set_number(highest)),
                                L::set_number(lowest));
    const auto m = L::set_number(magic);
    return L::bits(L::minus(L::plus(number, m), m));
  }

  float highest, lowest, magic;
};

template <class L, Rounding rounding>
struct AnyRounding : Rounder<L, rounding, L::width == 1> {
  AnyRounding(const BlockPlan& plan, Key key)
      : Rounder<L, rounding, L::width == 1>{Constants<L>(plan.element), key} {}
};

enum class Quotient { times, over, over_by_inverse };

template <class L, class Round>
struct BlockQuantizer {
  using Bits = typename L::Bits;
  using Float = typename L::Float;

  const BlockPlan& plan;
  const Round round;
  const BlockCodes<L> codes;

  // One vector: to a number where `fused`, else to codes. `each`: a scale for each lane.
  template <bool fused, bool each>
  Bits step(Bits x, std::size_t index, Float factor, Float total) const {
    Bits result = plan.by_amax
                      ? rounded<fused, Quotient::over>(x, index, factor, factor, total)
                      : rounded<fused, Quotient::times>(x, index, factor, factor, total);
    if constexpr (each) {
      const Bits magnitude = L::and_(L::bits(total), L::set(0x7FFFFFFFu));
      const typename L::Mask bad = L::less(L::set(float_infinity), magnitude);
      result = L::select(bad, L::set(fused ? float_nan : 0), result);
    }
    return result;
  }

  // `count` blocks of `size`, a multiple of the lanes, none of them NaN.
  template <bool fused>
  void blocks(const float* x, std::size_t count, std::size_t size, std::size_t index,
              const BlockScales& scales, float* out, std::uint8_t* bytes, bool stream) const {
    const auto by = [&](auto function) {
      (this->*function)(x, count, size, index, scales, out, bytes, stream);
    };
    if (!plan.by_amax)
      by(&BlockQuantizer::blocks_by<fused, Quotient::times>);
    else if (!scales.moderate)
      by(&BlockQuantizer::blocks_by<fused, Quotient::over>);
    else
      by(&BlockQuantizer::blocks_by<fused, Quotient::over_by_inverse>);
  }

  // n elements, the first of them element `index` of the tensor, to out or to bytes.
  template <bool fused, bool each>
  void run(const float* x, std::size_t n, std::size_t index, const float* factor,
           const float* total, float* out, std::uint8_t* bytes, bool stream) const {
    constexpr std::size_t width = L::width;
    if constexpr (!each) {
      if (word_of(*total) > float_infinity) {
        if constexpr (fused) std::fill_n(out, n, float_of(float_nan));
        if constexpr (!fused) std::fill_n(bytes, n, std::uint8_t(0));
        return;
      }
    }
    const auto lanes = [](const float* p, std::size_t i) {
      return each ? L::number_of(L::load(p + i)) : L::set_number(*p);
    };
    stream = stream && reinterpret_cast<std::uintptr_t>(out) % (4 * width) == 0;
    std::size_t i = 0;
    for (; i + width <= n; i += width) {
      const Bits result =
          step<fused, each>(L::load(x + i), index + i, lanes(factor, i), lanes(total, i));
      if constexpr (!fused) {
        L::store_bytes(bytes + i, result);
      } else if (stream) {
        L::stream(out + i, result);
      } else {
        L::store(out + i, result);
      }
    }
    if (i == n) return;
    float some[width] = {}, factors[width] = {}, totals[width] = {};  // the last, not a full vector
    for (std::size_t k = 0; i + k < n; ++k) {
      some[k] = x[i + k];
      factors[k] = each ? factor[i + k] : *factor;
      totals[k] = each ? total[i + k] : *total;
    }
    const Bits result = step<fused, each>(L::load(some), index + i, L::number_of(L::load(factors)),
                                          L::number_of(L::load(totals)));
    std::uint8_t some_bytes[width];
    if constexpr (fused) L::store(some, result);
    if constexpr (!fused) L::store_bytes(some_bytes, result);
    for (std::size_t k = 0; i + k < n; ++k) {
      if constexpr (fused) out[i + k] = some[k];
      if constexpr (!fused) bytes[i + k] = some_bytes[k];
    }
  }

 private:
  template <bool fused, Quotient by>
  Bits rounded(Bits x, std::size_t index, Float factor, Float inverse, Float total) const {
    const Float number = L::number_of(x);
    const Bits quotient = L::bits(by == Quotient::times  ? L::times(number, factor)
                                  : by == Quotient::over ? L::over(number, factor)
                                                         : L::over(number, factor, inverse));
    if constexpr (!fused && std::is_same_v<Round, NearestFloat<L>>) {
      return round.code(quotient);
    } else {
      const Bits element = round(quotient, index);
      return fused ? L::bits(L::times(L::number_of(element), total)) : codes.encode(element);
    }
  }

  template <bool fused, Quotient by>
  void blocks_by(const float* x, std::size_t count, std::size_t size, std::size_t index,
                 const BlockScales& scales, float* out, std::uint8_t* bytes, bool stream) const {
    constexpr std::size_t width = L::width;
    const BlockQuantizer own = *this;  // which no store of bytes can change: its constants stay in registers
    const auto vector = [&](std::size_t i, std::size_t block) __attribute__((always_inline)) {
      const Float factor = L::set_number(scales.factor[block]);
      const Float inverse =
          by == Quotient::over_by_inverse ? L::set_number(scales.inverse[block]) : factor;
      return own.template rounded<fused, by>(L::load(x + i), index + i, factor, inverse,
                                             L::set_number(scales.total[block]));
    };
    const std::size_t n = count * size;
    if constexpr (fused) {
      const auto all = [&](const auto& put) {
        for (std::size_t i = 0, block = 0; i < n; ++block)
          for (const std::size_t end = i + size; i < end; i += width) {
            __builtin_prefetch(x + i + block_piece);
            put(out + i, vector(i, block));
          }
      };
      if (stream && reinterpret_cast<std::uintptr_t>(out) % (4 * width) == 0)
        all(L::stream);
      else
        all(L::store);
      return;
    }
    std::size_t i = 0, block = 0;
    const auto four = [&](std::size_t second, std::size_t third, std::size_t fourth)
        __attribute__((always_inline)) {
      // the next piece comes from memory while this one is computed
      for (std::size_t ahead = 0; ahead < 4 * width; ahead += 16)
        __builtin_prefetch(x + i + block_piece + ahead);
      L::store_bytes(bytes + i, vector(i, block), vector(i + width, block + second),
                     vector(i + 2 * width, block + third), vector(i + 3 * width, block + fourth));
      i += 4 * width;
    };
    if (size % (4 * width) == 0)
      for (; i < n; ++block)
        for (const std::size_t end = i + size; i < end;) four(0, 0, 0);
    else if (size == 2 * width)
      for (; i + 4 * width <= n; block += 2) four(0, 1, 1);
    else if (size == width)
      for (; i + 4 * width <= n; block += 4) four(1, 2, 3);
    for (; i < n; ++block)
      for (const std::size_t end = i + size; i < end; i += width)
        L::store_bytes(bytes + i, vector(i, block));
  }
};

}  // namespace
}  // namespace halfstep
