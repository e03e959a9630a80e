// Block formats, for any lanes; the twin of halfstep/ops/block_reference.py. A *piece* is as many
// float32 numbers as stay in the first cache: whole blocks, or part of one block that is larger.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "block_codes.hpp"
#include "block_scales.hpp"
#include "carriers.hpp"
#include "round.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

// To nearest, for elements that saturate and quotients that are finite, in half the instructions of
// Rounder: adding a number whose last bit is worth the spacing rounds.
template <class L>
struct NearestFloat {
  using Bits = typename L::Bits;

  NearestFloat(const BlockPlan& plan, Key)
      : largest(plan.largest),
        least_binade(Constants<L>::bits_of_power(plan.element.quantum_exponent +
                                                 plan.element.mantissa_bits)),
        lift(std::uint32_t(23 - plan.element.mantissa_bits) << 23) {}

  static bool takes(const BlockPlan& plan) {  // without a mantissa bit, ties go up
    return !plan.element_is_fixed && plan.element.mantissa_bits > 0;
  }

  Bits operator()(Bits x, std::size_t) const {
    const Bits magnitude = L::and_(x, L::set(0x7FFFFFFFu));
    const auto number = L::least(L::number_of(magnitude), L::set_number(largest));
    const Bits binade = L::max_words(L::and_(L::bits(number), L::set(0x7F800000u)),
                                     L::set(least_binade));
    const auto magic = L::number_of(L::add(binade, L::set(lift)));
    const auto rounded = L::minus(L::plus(number, magic), magic);
    return L::or_(L::bits(rounded), L::and_(x, L::set(0x80000000u)));
  }

  float largest;
  std::uint32_t least_binade, lift;
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
    const Float number = L::number_of(x);
    const Float quotient = plan.by_amax ? L::over(number, factor) : L::times(number, factor);
    Bits element = round(L::bits(quotient), index);
    Bits result = fused ? L::bits(L::times(L::number_of(element), total)) : codes.encode(element);
    if constexpr (each) {
      const Bits magnitude = L::and_(L::bits(total), L::set(0x7FFFFFFFu));
      const typename L::Mask bad = L::less(L::set(float_infinity), magnitude);
      result = L::select(bad, L::set(fused ? float_nan : 0), result);
    }
    return result;
  }

  // Blocks of `size`, a multiple of the lanes, none of them NaN.
  template <bool fused>
  void blocks(const float* x, std::size_t count, std::size_t size, std::size_t index,
              const BlockScales& scales, float* out, std::uint8_t* bytes, bool stream) const {
    stream = stream && reinterpret_cast<std::uintptr_t>(out) % (4 * L::width) == 0;
    const auto all = [&](const auto& put) {
      std::size_t i = 0;
      for (std::size_t b = 0; b < count; ++b) {
        const Float factor = L::set_number(scales.factor[b]);
        const Float total = L::set_number(scales.total[b]);
        for (const std::size_t end = i + size; i < end; i += L::width)
          put(i, step<fused, false>(L::load(x + i), index + i, factor, total));
      }
    };
    if constexpr (!fused) {
      all([&](std::size_t i, Bits result) { L::store_bytes(bytes + i, result); });
    } else if (stream) {
      all([&](std::size_t i, Bits result) { L::stream(out + i, result); });
    } else {
      all([&](std::size_t i, Bits result) { L::store(out + i, result); });
    }
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
};

template <class T>
struct Type {
  using type = T;
};

// The blocks that one turn takes: `count` of them side by side, of the same rows.
struct BlockGroup {
  std::size_t first_row, rows;      // of the matrix that all are in, or 1 row
  std::size_t first_column, width;  // elements
  std::size_t first_scale, count;
};

inline std::size_t blocks_a_turn(const BlockLayout& layout) {
  return std::max<std::size_t>(1, block_piece / layout.block_columns);
}

inline BlockGroup group_of(const BlockLayout& layout, std::size_t turn) {
  const std::size_t across = (layout.columns + layout.block_columns - 1) / layout.block_columns;
  const std::size_t bands = (layout.rows + layout.block_rows - 1) / layout.block_rows;
  const std::size_t together = blocks_a_turn(layout), turns = (across + together - 1) / together;
  const std::size_t band = turn / turns, block = turn % turns * together;
  const std::size_t row = band % bands * layout.block_rows;
  const std::size_t column = block * layout.block_columns;
  return {band / bands * layout.rows + row,
          std::min(layout.block_rows, layout.rows - row),
          column,
          std::min(together * layout.block_columns, layout.columns - column),
          band * across + block,
          std::min(together, across - block)};
}

// f(row's first element, piece's first element in the row, size) over the pieces of a group
template <class F>
void over_pieces(const BlockLayout& layout, const BlockGroup& group, const F& f) {
  for (std::size_t row = group.first_row; row < group.first_row + group.rows; ++row)
    for (std::size_t i = 0; i < group.width; i += block_piece)
      f(row, group.first_column + i, std::min(block_piece, group.width - i));
}

template <class L>
void narrow(const BlockPlan& plan, const BlockArrays& arrays, float* numbers, std::size_t at,
            std::size_t n) {
  if (arrays.carrier == Carrier::float32) return;
  round_to<L>(numbers, numbers, n, 0, plan.carrier, Rounding::nearest, Key{}, false);
  from_float32(numbers, arrays.carrier, static_cast<std::uint16_t*>(arrays.out) + at, n);
}

inline float* target_of(const BlockArrays& arrays, std::size_t at, float* buffer) {
  return arrays.carrier == Carrier::float32 ? static_cast<float*>(arrays.out) + at : buffer;
}

template <class L, class Round>
void quantize_rows(const BlockPlan& plan, const BlockLayout& layout, const BlockArrays& arrays,
                   std::size_t begin, std::size_t end, Key key) {
  const BlockQuantizer<L, Round> quantizer{plan, Round(plan, key), BlockCodes<L>(plan)};
  alignas(64) float buffer[block_piece];
  alignas(64) std::uint8_t bytes[block_piece];
  alignas(64) std::uint32_t top[block_piece];
  BlockScales scales;
  const std::size_t size = layout.block_columns, bits = std::size_t(plan.element_bits);
  const std::size_t pitch = (layout.columns * bits + 7) / 8;
  for (std::size_t turn = begin; turn < end; ++turn) {
    const BlockGroup group = group_of(layout, turn);
    if (plan.given_scale == 0) {
      if (arrays.tops) std::copy_n(arrays.tops + group.first_scale, group.count, top);
      if (!arrays.tops) std::fill_n(top, group.count, 0u);
      if (!arrays.tops) over_pieces(layout, group, [&](std::size_t row, std::size_t column, std::size_t n) {
        const std::size_t at = row * layout.columns + column;
        const float* x = widened(arrays.numbers, arrays.carrier, at, n, buffer);
        for (std::size_t b = 0; b * size < n; ++b)
          top[b] = std::max(top[b], top_of<L>(x + b * size, std::min(size, n - b * size)));
      });
      find_scales<L>(plan, top, group.count, scales, arrays.scales, group.first_scale);
    } else {
      std::fill_n(scales.total, group.count, plan.given_scale);
      std::fill_n(scales.factor, group.count,
                  plan.by_amax ? plan.given_scale : 1.0f / plan.given_scale);
    }
    const bool fine = std::none_of(scales.total, scales.total + group.count,
                                   [](float total) { return std::isnan(total); });
    over_pieces(layout, group, [&](std::size_t row, std::size_t column, std::size_t n) {
      const std::size_t at = row * layout.columns + column;
      const float* x = widened(arrays.numbers, arrays.carrier, at, n, buffer);
      std::uint8_t* packed =
          arrays.out ? nullptr : arrays.values + row * pitch + column * bits / 8;
      float* out = arrays.out ? target_of(arrays, at, buffer) : nullptr;
      std::uint8_t* codes = bits == 8 ? packed : bytes;
      std::size_t done = 0;  // blocks
      if (fine && size % L::width == 0) {
        done = n / size;
        if (out)
          quantizer.template blocks<true>(x, done, size, at, scales, out, nullptr, arrays.stream);
        else
          quantizer.template blocks<false>(x, done, size, at, scales, nullptr, codes, false);
      }
      for (std::size_t b = done; b * size < n; ++b) {
        const std::size_t i = b * size, m = std::min(size, n - i);
        const float *factor = scales.factor + b, *total = scales.total + b;
        if (out)
          quantizer.template run<true, false>(x + i, m, at + i, factor, total, out + i, nullptr,
                                              arrays.stream);
        else
          quantizer.template run<false, false>(x + i, m, at + i, factor, total, nullptr, codes + i,
                                               false);
      }
      if (out) narrow<L>(plan, arrays, out, at, n);
      if (!out && bits < 8) pack_bytes(bytes, n, bits, packed);
    });
  }
  if (arrays.stream) L::fence();
}

// Blocks along an axis that is not the last: many side by side, one in each column.
constexpr std::size_t block_strip = 512;  // columns in a turn

struct BlockStrip {
  std::size_t first_row, rows;  // along the axis
  std::size_t outer, column, width, scale;
};

inline BlockStrip strip_of(const BlockLayout& layout, std::size_t turn) {
  const std::size_t strips = (layout.down + block_strip - 1) / block_strip;
  const std::size_t along = (layout.columns + layout.block_columns - 1) / layout.block_columns;
  const std::size_t column = turn % strips * block_strip, block = turn / strips % along;
  const std::size_t outer = turn / strips / along, row = block * layout.block_columns;
  return {row,
          std::min(layout.block_columns, layout.columns - row),
          outer,
          column,
          std::min(block_strip, layout.down - column),
          (outer * along + block) * layout.down + column};
}

template <class L, class Round>
void quantize_columns(const BlockPlan& plan, const BlockLayout& layout, const BlockArrays& arrays,
                      std::size_t begin, std::size_t end, Key key) {
  const BlockQuantizer<L, Round> quantizer{plan, Round(plan, key), BlockCodes<L>(plan)};
  alignas(64) float buffer[block_strip];
  alignas(64) std::uint32_t top[block_strip];
  alignas(64) std::uint8_t bytes[8 * block_strip];
  BlockScales scales;
  const std::size_t bits = std::size_t(plan.element_bits), together = codes_a_word(bits);
  const std::size_t packed_rows = (layout.columns * bits + 7) / 8;
  for (std::size_t turn = begin; turn < end; ++turn) {
    const BlockStrip strip = strip_of(layout, turn);
    const auto at = [&](std::size_t row) {
      return (strip.outer * layout.columns + strip.first_row + row) * layout.down + strip.column;
    };
    if (plan.given_scale == 0) {
      std::fill_n(top, strip.width, 0u);
      for (std::size_t row = 0; row < strip.rows; ++row) {
        const float* x = widened(arrays.numbers, arrays.carrier, at(row), strip.width, buffer);
        for (std::size_t i = 0; i < strip.width; ++i)
          top[i] = std::max(top[i], word_of(x[i]) & 0x7FFFFFFFu);
      }
      find_scales<L>(plan, top, strip.width, scales, arrays.scales, strip.scale);
    } else {
      std::fill_n(scales.total, strip.width, plan.given_scale);
      std::fill_n(scales.factor, strip.width,
                  plan.by_amax ? plan.given_scale : 1.0f / plan.given_scale);
    }
    for (std::size_t row = 0; row < strip.rows; ++row) {
      const float* x = widened(arrays.numbers, arrays.carrier, at(row), strip.width, buffer);
      if (arrays.out) {
        float* out = target_of(arrays, at(row), buffer);
        quantizer.template run<true, true>(x, strip.width, at(row), scales.factor, scales.total,
                                           out, nullptr, arrays.stream);
        narrow<L>(plan, arrays, out, at(row), strip.width);
        continue;
      }
      const std::size_t slot = row % together;
      std::uint8_t* codes = bits == 8 ? arrays.values + at(row) : bytes + slot * block_strip;
      quantizer.template run<false, true>(x, strip.width, at(row), scales.factor, scales.total,
                                          nullptr, codes, false);
      if (bits < 8 && (slot + 1 == together || row + 1 == strip.rows)) {
        const std::size_t first = (strip.first_row + row - slot) * bits / 8;
        pack_rows(bytes, block_strip, slot + 1, strip.width, bits,
                  arrays.values + (strip.outer * packed_rows + first) * layout.down + strip.column,
                  layout.down);
      }
    }
  }
  if (arrays.stream) L::fence();
}

template <class L>
void quantize_blocks(const BlockPlan& plan, const BlockLayout& layout, const BlockArrays& arrays,
                     std::size_t begin, std::size_t end, Rounding rounding, Key key) {
  const auto run = [&](auto rows, auto columns) {
    (layout.down ? columns : rows)(plan, layout, arrays, begin, end, key);
  };
  const auto with = [&](auto round) {
    using Round = typename decltype(round)::type;
    run(quantize_rows<L, Round>, quantize_columns<L, Round>);
  };
  switch (rounding) {
    case Rounding::nearest:
      if (NearestFloat<L>::takes(plan)) return with(Type<NearestFloat<L>>{});
      if (plan.element_is_fixed) return with(Type<NearestFixed<L>>{});
      return with(Type<AnyRounding<L, Rounding::nearest>>{});
    case Rounding::stochastic: return with(Type<AnyRounding<L, Rounding::stochastic>>{});
    case Rounding::toward_zero: return with(Type<AnyRounding<L, Rounding::toward_zero>>{});
    case Rounding::up: return with(Type<AnyRounding<L, Rounding::up>>{});
    case Rounding::down: return with(Type<AnyRounding<L, Rounding::down>>{});
    case Rounding::away: return with(Type<AnyRounding<L, Rounding::away>>{});
    case Rounding::to_odd: return with(Type<AnyRounding<L, Rounding::to_odd>>{});
  }
}

inline float total_of(const BlockPlan& plan, const BlockArrays& arrays, std::size_t scale) {
  const float found = plan.scale_is_byte
                          ? arrays.scale_table[static_cast<const std::uint8_t*>(arrays.scales)[scale]]
                          : static_cast<const float*>(arrays.scales)[scale];
  return plan.given_scale != 0 ? plan.given_scale : found * plan.tensor_scale;
}

// Numbers that codes mean, times the scale.
template <class L, bool each>
void decode_run(const BlockCodes<L>& codes, const std::uint8_t* bytes, std::size_t n,
                const float* total, float* out, bool stream) {
  constexpr std::size_t width = L::width;
  const auto step = [&](const std::uint8_t* from, typename L::Float scale) {
    const typename L::Bits result =
        L::bits(L::times(L::number_of(codes.decode(L::load_bytes(from))), scale));
    const typename L::Bits magnitude = L::and_(L::bits(scale), L::set(0x7FFFFFFFu));
    return L::select(L::less(L::set(float_infinity), magnitude), L::set(float_nan), result);
  };
  stream = stream && reinterpret_cast<std::uintptr_t>(out) % (4 * width) == 0;
  std::size_t i = 0;
  for (; i + width <= n; i += width) {
    const auto scale = each ? L::number_of(L::load(total + i)) : L::set_number(*total);
    const typename L::Bits result = step(bytes + i, scale);
    if (stream) {
      L::stream(out + i, result);
    } else {
      L::store(out + i, result);
    }
  }
  if (i == n) return;
  std::uint8_t some[width] = {};
  float totals[width] = {}, results[width];
  for (std::size_t k = 0; i + k < n; ++k) {
    some[k] = bytes[i + k];
    totals[k] = each ? total[i + k] : *total;
  }
  L::store(results, step(some, L::number_of(L::load(totals))));
  std::copy_n(results, n - i, out + i);
}

template <class L>
void dequantize_blocks(const BlockPlan& plan, const BlockLayout& layout, const BlockArrays& arrays,
                       std::size_t begin, std::size_t end) {
  const BlockCodes<L> codes(plan);
  alignas(64) float buffer[block_piece];
  alignas(64) float totals[block_piece];
  alignas(64) std::uint8_t bytes[8 * block_strip];
  const std::size_t bits = std::size_t(plan.element_bits), size = layout.block_columns;
  const std::size_t pitch = (layout.columns * bits + 7) / 8, together = codes_a_word(bits);
  for (std::size_t turn = begin; layout.down == 0 && turn < end; ++turn) {
    const BlockGroup group = group_of(layout, turn);
    for (std::size_t b = 0; b < group.count; ++b)
      totals[b] = total_of(plan, arrays, group.first_scale + b);
    over_pieces(layout, group, [&](std::size_t row, std::size_t column, std::size_t n) {
      const std::size_t at = row * layout.columns + column;
      const std::uint8_t* from = arrays.values + row * pitch + column * bits / 8;
      if (bits < 8) {
        unpack_bytes(from, n, bits, bytes);
        from = bytes;
      }
      float* out = target_of(arrays, at, buffer);
      for (std::size_t b = 0; b * size < n; ++b)
        decode_run<L, false>(codes, from + b * size, std::min(size, n - b * size), totals + b,
                             out + b * size, arrays.stream);
      narrow<L>(plan, arrays, out, at, n);
    });
  }
  for (std::size_t turn = begin; layout.down != 0 && turn < end; ++turn) {
    const BlockStrip strip = strip_of(layout, turn);
    for (std::size_t i = 0; i < strip.width; ++i)
      totals[i] = total_of(plan, arrays, strip.scale + i);
    for (std::size_t row = 0; row < strip.rows; ++row) {
      const std::size_t at =
          (strip.outer * layout.columns + strip.first_row + row) * layout.down + strip.column;
      const std::uint8_t* from = arrays.values + at;
      if (bits < 8) {
        const std::size_t slot = row % together;
        const std::size_t first = (strip.first_row + row - slot) * bits / 8;
        const std::size_t left = std::min(together, strip.rows - (row - slot));
        if (slot == 0)
          unpack_rows(arrays.values + (strip.outer * pitch + first) * layout.down + strip.column,
                      layout.down, left, strip.width, bits, bytes, block_strip);
        from = bytes + slot * block_strip;
      }
      float* out = target_of(arrays, at, buffer);
      decode_run<L, true>(codes, from, strip.width, totals, out, arrays.stream);
      narrow<L>(plan, arrays, out, at, strip.width);
    }
  }
  if (arrays.stream) L::fence();
}

}  // namespace
}  // namespace halfstep
