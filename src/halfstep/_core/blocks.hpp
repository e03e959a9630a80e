// Block formats, for any lanes; the twin of halfstep/ops/block_reference.py. A *piece* is as many
// float32 numbers as stay in the first cache: whole blocks, or part of one block that is larger.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "block_bytes.hpp"
#include "block_decode.hpp"
#include "block_encode.hpp"
#include "block_scales.hpp"
#include "carriers.hpp"
#include "round.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

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
        if (group.rows == 1 && n == group.width) return tops_of<L>(x, n, size, top);
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

template <class L>
void dequantize_blocks(const BlockPlan& plan, const BlockLayout& layout, const BlockArrays& arrays,
                       std::size_t begin, std::size_t end) {
  const BlockCodes<L> codes(plan);
  const CodesAsHalves halves(plan);
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
      const bool fast = halves.takes(from, n);
      for (std::size_t b = 0; b * size < n; ++b) {
        const std::size_t i = b * size, m = std::min(size, n - i);
        const std::size_t done =
            fast && !std::isnan(totals[b])
                ? halves.decode(from + i, m, totals[b], out + i, arrays.stream)
                : 0;
        decode_run<L, false>(codes, from + i + done, m - done, totals + b, out + i + done,
                             arrays.stream);
      }
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
