// The scales of blocks from the largest magnitudes in them, for any lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "carriers.hpp"
#include "round.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

constexpr std::size_t block_piece = 2048;
constexpr std::uint32_t float_infinity = 0x7F800000u;
constexpr std::uint32_t float_nan = 0x7FC00000u;

// The bits of the largest magnitude; those of a NaN are larger than all others.
template <class L>
std::uint32_t top_of(const float* x, std::size_t n) {
  const typename L::Bits magnitude = L::set(0x7FFFFFFFu);
  typename L::Bits top = L::set(0);
  std::size_t i = 0;
  for (; i + L::width <= n; i += L::width)
    top = L::max_words(top, L::and_(L::load(x + i), magnitude));
  std::uint32_t found = L::top_word(top);
  for (; i < n; ++i) found = std::max(found, word_of(x[i]) & 0x7FFFFFFFu);
  return found;
}

// That of each block of `size`.
template <class L>
void tops_of(const float* x, std::size_t n, std::size_t size, std::uint32_t* tops) {
  const typename L::Bits magnitude = L::set(0x7FFFFFFFu);
  const auto top = [&](const float* from) {
    typename L::Bits found = L::and_(L::load(from), magnitude);
    for (std::size_t i = L::width; i < size; i += L::width)
      found = L::max_words(found, L::and_(L::load(from + i), magnitude));
    return found;
  };
  std::size_t i = 0;
  if (size % L::width == 0)
    for (; i + 4 * size <= n; i += 4 * size)
      L::store_tops(tops + i / size, top(x + i), top(x + i + size), top(x + i + 2 * size),
                    top(x + i + 3 * size));
  for (; i < n; i += size) tops[i / size] = top_of<L>(x + i, std::min(size, n - i));
}

// float32 numbers of a tensor: where they are, or widened into the buffer.
inline const float* widened(const void* x, Carrier carrier, std::size_t at, std::size_t n,
                            float* buffer) {
  if (carrier == Carrier::float32) return static_cast<const float*>(x) + at;
  to_float32(static_cast<const std::uint16_t*>(x) + at, carrier, buffer, n);
  return buffer;
}

// The largest of all; and where `tops` is, that of each block of `size`, a divisor of block_piece.
template <class L>
std::uint32_t top_magnitude(const void* x, std::size_t n, Carrier carrier, std::size_t size,
                            std::uint32_t* tops) {
  alignas(64) float buffer[block_piece];
  std::uint32_t top = 0;
  for (std::size_t i = 0; i < n; i += block_piece) {
    const std::size_t piece = std::min(block_piece, n - i);
    const float* numbers = widened(x, carrier, i, piece, buffer);
    if (!tops) {
      top = std::max(top, top_of<L>(numbers, piece));
      continue;
    }
    std::uint32_t* found = tops + i / size;
    tops_of<L>(numbers, piece, size, found);
    top = std::max(top, *std::max_element(found, found + (piece + size - 1) / size));
  }
  return top;
}

// Of up to block_piece blocks: what each element is multiplied by or divided by (factor), and what
// it is worth (total). NaN where the block is.
struct BlockScales {
  alignas(64) float factor[block_piece];
  alignas(64) float total[block_piece];
  alignas(64) float inverse[block_piece];  // of the factor, where it divides
  bool moderate = false;  // no quotient that is no zero of the format comes near the ends of float32
};

template <class L>
void store_scale_bytes(const float* scale, std::size_t n, std::uint8_t* to) {  // e4m3fn
  constexpr std::size_t width = L::width;
  std::uint8_t last[width];
  for (std::size_t i = 0; i < n; i += width) {
    const typename L::Bits bits = L::load(scale + i);
    const auto normal = L::minus(L::shift_right(bits, 20), L::set(120u << 3));
    const auto raised = L::bits(L::plus(L::number_of(bits), L::set_number(0x1p14f)));
    const auto even = L::minus(raised, L::set(word_of(0x1p14f)));
    const auto magnitude = L::and_(bits, L::set(0x7FFFFFFFu));
    const auto code = L::select(L::less(L::set(float_infinity), magnitude), L::set(0x7Fu),
                                L::select(L::less(bits, L::set(121u << 23)), even, normal));
    L::store_bytes(i + width <= n ? to + i : last, code);
    if (i + width > n) std::copy_n(last, n - i, to + i);
  }
}

inline void powers_of_two(const BlockPlan& plan, const std::uint32_t* top, std::size_t n,
                          BlockScales& scales, std::uint8_t* stored) {
  for (std::size_t i = 0; i < n; ++i) {
    const bool small = top[i] < 0x01000000u;  // perhaps subnormal
    const std::uint32_t bits = small ? word_of(float_of(top[i]) * 0x1p64f) : top[i];
    const int carry = int((bits & 0x7FFFFFu) >= plan.carry_from);
    int exponent = int(bits >> 23) - 127 - (small ? 64 : 0) + carry - plan.exponent;
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    const bool bad = top[i] >= float_infinity;
    const std::uint32_t least = 0x00400000u;  // 2^-127
    const std::uint32_t power = exponent == -127 ? least : std::uint32_t(exponent + 127) << 23;
    const std::uint32_t inverse = exponent == 127 ? least : std::uint32_t(127 - exponent) << 23;
    scales.total[i] = float_of(bad ? float_nan : power);
    scales.factor[i] = float_of(bad ? float_nan : inverse);
    if (stored) stored[i] = std::uint8_t(bad ? 255 : exponent + 127);
  }
}

// `stored`: where they are also written, from number `at` on; null: nowhere. `top` has room for whole
// vectors, as the arrays of `scales` have.
template <class L>
void find_scales(const BlockPlan& plan, std::uint32_t* top, std::size_t n, BlockScales& scales,
                 void* stored, std::size_t at) {
  auto* bytes = stored ? static_cast<std::uint8_t*>(stored) + at : nullptr;
  if (!plan.by_amax) return powers_of_two(plan, top, n, scales, bytes);
  constexpr std::size_t width = L::width;
  const std::size_t whole = (n + width - 1) / width * width;
  std::fill(top + n, top + whole, top[0]);
  const auto is_bad = [](typename L::Bits tops) { return L::less(L::set(float_infinity - 1), tops); };
  float* scale = scales.total;
  for (std::size_t i = 0; i < whole; i += width) {
    const auto amax = L::number_of(L::load(top + i));
    const auto quotient = L::over(L::over(amax, L::set_number(plan.largest)),
                                  L::set_number(plan.tensor_scale));
    const auto enough = L::most(L::set_number(plan.least_scale), quotient);  // a NaN stays one
    L::store(scale + i, L::bits(L::least(L::set_number(plan.most_scale), enough)));
  }
  round_to<L>(scale, scale, whole, 0, plan.scale, Rounding::nearest, Key{}, false);
  for (std::size_t i = 0; i < whole; i += width)
    L::store(scale + i, L::select(is_bad(L::load(top + i)), L::set(float_nan), L::load(scale + i)));
  if (stored && plan.scale_is_byte) {
    store_scale_bytes<L>(scale, n, bytes);
  } else if (stored) {
    std::copy_n(scale, n, static_cast<float*>(stored) + at);
  }
  typename L::Bits most = L::set(0), least = L::set(0);  // of factors the complement's largest
  for (std::size_t i = 0; i < whole; i += width) {
    const typename L::Bits tops = L::load(top + i);
    const auto product = L::times(L::number_of(L::load(scale + i)), L::set_number(plan.tensor_scale));
    const auto factor = L::select(is_bad(tops), L::set(float_nan), L::bits(product));
    L::store(scales.total + i, factor);
    L::store(scales.factor + i, factor);
    L::store(scales.inverse + i, L::bits(L::over(L::set_number(1.0f), L::number_of(factor))));
    most = L::max_words(most, L::max_words(tops, factor));
    least = L::max_words(least, L::minus(L::set(0xFFFFFFFFu), factor));
  }
  scales.moderate = plan.element.quantum_exponent > -30 &&
                    float_of(~L::top_word(least)) > 0x1p-60f && float_of(L::top_word(most)) < 0x1p60f;
}

}  // namespace
}  // namespace halfstep
