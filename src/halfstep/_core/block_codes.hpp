// Codes of up to 8 bits: of numbers that are on their grid, and back to numbers; the twin of
// halfstep/ops/bit_packing.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "round.hpp"
#include "types.hpp"
#include "widen.hpp"

namespace halfstep {
namespace {

template <class L>
struct BlockCodes {
  using Bits = typename L::Bits;
  using Float = typename L::Float;

  BlockCodes(const BlockPlan& plan)
      : is_fixed(plan.element_is_fixed),
        has_specials(!plan.element_is_fixed &&
                     plan.max_magnitude_code + 1 < 1u << (plan.element_bits - 1)),
        has_inf(plan.element_has_inf),
        bits(plan.element_bits),
        shift(23 - plan.element.mantissa_bits),
        sign(1u << (plan.element_bits - 1)),
        mask(plan.element_bits == 8 ? 0xFFu : (1u << plan.element_bits) - 1),
        offset(std::uint32_t(127 - plan.element_bias) << 23),
        max_code(plan.max_magnitude_code),
        subnormal_codes(plan.element_is_fixed ? 0 : 1u << plan.element.mantissa_bits),
        even_below(plan.element_is_fixed
                       ? 0
                       : Constants<L>::bits_of_power(plan.element.quantum_exponent +
                                                     plan.element.mantissa_bits)),
        magic(float(std::ldexp(1.0, plan.element.quantum_exponent + 23))),
        per_quantum(float(std::ldexp(1.0, -plan.element.quantum_exponent))),
        quantum(float(std::ldexp(1.0, plan.element.quantum_exponent))) {}

  Bits encode(Bits number) const {
    if (is_fixed) {  // the integer is in the lowest bits of this sum, in two's complement
      const Float count = L::times(L::number_of(number), L::set_number(per_quantum));
      return L::and_(L::bits(L::plus(count, L::set_number(12582912.0f))), L::set(mask));
    }
    const Bits magnitude = L::and_(number, L::set(0x7FFFFFFFu));
    const Bits negative = L::shift_right(L::and_(number, L::set(0x80000000u)), 32 - bits);
    const Bits normal = L::shift_right(L::add(magnitude, L::set(0u - offset)), shift);
    const Float raised = L::plus(L::number_of(magnitude), L::set_number(magic));
    const Bits even = L::add(L::bits(raised), L::set(0u - word_of(magic)));
    const Bits code = L::select(L::less(magnitude, L::set(even_below)), even, normal);
    return L::or_(code, negative);
  }

  Bits decode(Bits code) const {
    const float whole = 8388608.0f;  // 2^23: its last bit is worth 1
    if (is_fixed) {
      const Bits lifted = L::and_(L::add(code, L::set(sign)), L::set(mask));
      const Float count = L::minus(L::number_of(L::or_(lifted, L::set(word_of(whole)))),
                                   L::set_number(whole + float(sign)));
      return L::bits(L::times(count, L::set_number(quantum)));
    }
    const Bits magnitude = L::and_(code, L::set(sign - 1));
    const Bits negative = L::shift_left(L::and_(code, L::set(sign)), 32 - bits);
    const Bits normal = L::add(L::shift_left(magnitude, shift), L::set(offset));
    const Float count =
        L::minus(L::number_of(L::or_(magnitude, L::set(word_of(whole)))), L::set_number(whole));
    const Bits even = L::bits(L::times(count, L::set_number(quantum)));
    Bits number = L::select(L::less(magnitude, L::set(subnormal_codes)), even, normal);
    if (has_specials) {
      const Bits infinite = L::set(max_code + 1);
      const Bits top = L::set(has_inf ? 0x7F800000u : 0x7FC00000u);
      number = L::select(L::less(L::set(max_code), magnitude), top, number);
      number = L::select(L::less(infinite, magnitude), L::set(0x7FC00000u), number);
    }
    return L::or_(number, negative);
  }

 private:
  bool is_fixed, has_specials, has_inf;
  int bits, shift;
  std::uint32_t sign, mask, offset, max_code, subnormal_codes, even_below;
  float magic, per_quantum, quantum;
};

}  // namespace
}  // namespace halfstep
