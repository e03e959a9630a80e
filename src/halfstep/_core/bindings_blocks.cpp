// Block formats: the Python edge. Arguments are checked in halfstep/ops/native_blocks.py.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu.hpp"
#include "parallel.hpp"
#include "types.hpp"

namespace nb = nanobind;
using namespace halfstep;

namespace {

constexpr std::size_t grain = std::size_t(1) << 16;  // elements that a thread takes at a time
constexpr std::size_t stream_from = std::size_t(1) << 22;  // bytes; see bindings.cpp

std::size_t ceil_of(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// How many turns there are, and elements in one; as in blocks.hpp.
struct Turns {
  std::size_t count, elements;

  explicit Turns(const BlockLayout& it) {
    const std::size_t along = ceil_of(it.columns, it.block_columns);
    if (it.down) {
      count = it.outer * along * ceil_of(it.down, 512);
      elements = it.block_columns * std::min<std::size_t>(it.down, 512);
    } else {
      const std::size_t together = std::max<std::size_t>(1, 2048 / it.block_columns);
      count = it.outer * ceil_of(it.rows, it.block_rows) * ceil_of(along, together);
      elements = it.block_rows * std::min(together * it.block_columns, it.columns);
    }
  }

  std::size_t a_grain() const { return std::max<std::size_t>(1, grain / elements); }
};

void run_quantize(const BlockPlan& plan, const BlockLayout& layout, const BlockArrays& arrays,
                  Rounding rounding, Key key, int threads) {
  const Kernels* kernels = kernels_in_use();
  const Turns turns(layout);
  parallel_for(turns.count, turns.a_grain(), threads, [&](std::size_t begin, std::size_t end) {
    kernels->quantize_blocks(plan, layout, arrays, begin, end, rounding, key);
  });
}

// `given_scale`: where it is not 0, that of all.
BlockPlan with_scales(BlockPlan plan, float tensor_scale, float given_scale) {
  plan.tensor_scale = tensor_scale;
  plan.given_scale = given_scale;
  return plan;
}

void quantize(const BlockPlan& plan, float tensor_scale, float given_scale,
              const BlockLayout& layout, std::uintptr_t x, int carrier, std::uintptr_t out,
              std::uintptr_t values, std::uintptr_t scales, std::size_t n, std::uintptr_t tops,
              int rounding, std::uint32_t key_low, std::uint32_t key_high, int threads) {
  const BlockArrays arrays{reinterpret_cast<const void*>(x),
                           Carrier(carrier),
                           reinterpret_cast<void*>(out),
                           reinterpret_cast<std::uint8_t*>(values),
                           reinterpret_cast<void*>(scales),
                           reinterpret_cast<const std::uint32_t*>(tops),
                           nullptr,
                           out != 0 && out != x && n * 4 >= stream_from};
  run_quantize(with_scales(plan, tensor_scale, given_scale), layout, arrays, Rounding(rounding),
               Key{key_low, key_high}, threads);
}

void dequantize(const BlockPlan& plan, float tensor_scale, float given_scale,
                const BlockLayout& layout, std::uintptr_t out, int carrier, std::uintptr_t values, std::uintptr_t scales, std::uintptr_t scale_table,
                std::size_t n, int threads) {
  const BlockArrays arrays{nullptr,
                           Carrier(carrier),
                           reinterpret_cast<void*>(out),
                           reinterpret_cast<std::uint8_t*>(values),
                           reinterpret_cast<void*>(scales),
                           nullptr,
                           reinterpret_cast<const float*>(scale_table),
                           n * 4 >= stream_from};
  const BlockPlan whole = with_scales(plan, tensor_scale, given_scale);
  const Kernels* kernels = kernels_in_use();
  const Turns turns(layout);
  parallel_for(turns.count, turns.a_grain(), threads, [&](std::size_t begin, std::size_t end) {
    kernels->dequantize_blocks(whole, layout, arrays, begin, end);
  });
}

// The bits, as those of a float32, of the largest magnitude; those of a NaN are the largest. And, where
// `tops` is not null, that of each block of `size`, a divisor of the kernel's piece.
std::uint32_t top_magnitude(std::uintptr_t x, std::size_t n, int carrier, std::size_t size,
                            std::uintptr_t tops, int threads) {
  const Kernels* kernels = kernels_in_use();
  std::atomic<std::uint32_t> top{0};
  parallel_for(n, grain, threads, [&](std::size_t begin, std::size_t end) {
    const auto* from = reinterpret_cast<const void*>(x + begin * bytes_of(Carrier(carrier)));
    auto* to = tops ? reinterpret_cast<std::uint32_t*>(tops) + begin / size : nullptr;
    const std::uint32_t found =
        kernels->top_magnitude(from, end - begin, Carrier(carrier), size, to);
    std::uint32_t before = top.load();
    while (before < found && !top.compare_exchange_weak(before, found)) {
    }
  });
  return top.load();
}

// What is to be known of all of a tensor before its blocks are scaled.
enum class Look { nothing, tensor_scale, scale_of_all };

// Rounds tensors to a block format in one call.
struct BlockRounder {
  BlockPlan plan;
  Look look;
  double largest;  // number that the scale in question is a divisor of

  // False, with nothing written, where the tensor has a number that is not finite, and a tensor scale.
  bool run(const BlockLayout& layout, std::uintptr_t x, int carrier, std::uintptr_t out,
           std::size_t n, int rounding, std::uint32_t key_low, std::uint32_t key_high,
           int threads) const {
    std::unique_ptr<std::uint32_t[]> tops;
    BlockPlan known = plan;
    if (look != Look::nothing) {
      const std::size_t size = layout.block_columns;
      const bool in_line = layout.rows == 1 && layout.down == 0 && 2048 % size == 0;
      if (look == Look::tensor_scale && in_line) tops.reset(new std::uint32_t[ceil_of(n, size)]);
      const DefaultFloatMode mode;
      const std::uint32_t top = top_magnitude(x, n, carrier, size, address_of(tops.get()), threads);
      float amax;
      std::memcpy(&amax, &top, sizeof amax);
      if (look == Look::tensor_scale) {
        if (!std::isfinite(amax)) return false;
        known.tensor_scale = scale_of(amax, std::numeric_limits<float>::min());
      } else {
        known.given_scale = std::isfinite(amax) ? scale_of(amax, plan.least_scale)
                                                : std::numeric_limits<float>::quiet_NaN();
      }
    }
    const BlockArrays arrays{reinterpret_cast<const void*>(x),
                             Carrier(carrier),
                             reinterpret_cast<void*>(out),
                             nullptr,
                             nullptr,
                             tops.get(),
                             nullptr,
                             out != x && n * 4 >= stream_from};
    run_quantize(known, layout, arrays, Rounding(rounding), Key{key_low, key_high}, threads);
    return true;
  }

  // The same to nearest, of float32 that are rounded to `first` before, where that is not null. And where
  // `positions` is not 0, of (a, b, *positions) whose tiles span a and b: each position's matrix by itself.
  bool run_operand(const BlockLayout& layout, std::uintptr_t x, std::uintptr_t out, std::size_t n,
                   std::size_t positions, const Grid* first, int threads) const {
    constexpr int nearest = int(Rounding::nearest), carrier = int(Carrier::float32);
    std::uintptr_t at = x;
    if (first) {
      const RoundArrays arrays{reinterpret_cast<const void*>(x), Carrier::float32,
                               reinterpret_cast<void*>(out), Carrier::float32, false};
      const Kernels* kernels = kernels_in_use();
      parallel_for(n, grain, threads, [&](std::size_t begin, std::size_t end) {
        kernels->round_to(arrays, begin, end, *first, Rounding::nearest, Key{}, false);
      });
      at = out;
    }
    if (positions == 0) return run(layout, at, carrier, out, n, nearest, 0, 0, threads);
    const std::unique_ptr<float[]> turned(new float[n]);
    const std::size_t channels = n / positions;
    turn(reinterpret_cast<const float*>(at), channels, positions, turned.get(), threads);
    const std::uintptr_t there = address_of(turned.get());
    if (!run(layout, there, carrier, there, n, nearest, 0, 0, threads)) return false;
    turn(turned.get(), positions, channels, reinterpret_cast<float*>(out), threads);
    return true;
  }

 private:
  // A matrix of rows x columns, transposed.
  static void turn(const float* from, std::size_t rows, std::size_t columns, float* to, int threads) {
    parallel_for(rows, std::max<std::size_t>(1, grain / columns), threads, [&](std::size_t begin, std::size_t end) {
      if (rows > columns)  // many short rows: written along them
        for (std::size_t c = 0; c < columns; ++c)
          for (std::size_t r = begin; r < end; ++r) to[c * rows + r] = from[r * columns + c];
      else
        for (std::size_t r = begin; r < end; ++r)
          for (std::size_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
    });
  }

  static std::uintptr_t address_of(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

  // The division of two float32 in float64, rounded to float32, is float32's.
  float scale_of(float amax, float least) const {
    constexpr double most = std::numeric_limits<float>::max();
    const double quotient = std::min(double(amax) / largest, most);
    return std::max(float(quotient), least);
  }
};

}  // namespace

void bind_blocks(nb::module_& m) {
  nb::class_<BlockPlan>(m, "BlockPlan", "A block format; see types.hpp.")
      .def(
          "__init__",
          [](BlockPlan* self, const Grid& element, int element_bits, int element_bias,
             bool element_is_fixed, bool element_has_inf, std::uint32_t max_magnitude_code,
             bool by_amax, int exponent, std::uint32_t carry_from, float largest,
             float least_scale, float most_scale, const Grid& scale, bool scale_is_byte,
             const Grid& carrier) {
            new (self) BlockPlan{element,         element_bits, element_bias, element_is_fixed,
                                 element_has_inf, max_magnitude_code, by_amax, exponent,
                                 carry_from,      largest,      least_scale,  most_scale,
                                 scale,           scale_is_byte, 1.0f,         0.0f,
                                 carrier};
          },
          nb::kw_only(), nb::arg("element"), nb::arg("element_bits"), nb::arg("element_bias"),
          nb::arg("element_is_fixed"), nb::arg("element_has_inf"), nb::arg("max_magnitude_code"),
          nb::arg("by_amax"), nb::arg("exponent"), nb::arg("carry_from"), nb::arg("largest"),
          nb::arg("least_scale"), nb::arg("most_scale"), nb::arg("scale"),
          nb::arg("scale_is_byte"), nb::arg("carrier"));
  nb::class_<BlockLayout>(m, "BlockLayout", "Where blocks are; see types.hpp.")
      .def(
          "__init__",
          [](BlockLayout* self, std::size_t outer, std::size_t rows, std::size_t columns,
             std::size_t down, std::size_t block_rows, std::size_t block_columns) {
            new (self) BlockLayout{outer, rows, columns, down, block_rows, block_columns};
          },
          nb::kw_only(), nb::arg("outer"), nb::arg("rows"), nb::arg("columns"), nb::arg("down"),
          nb::arg("block_rows"), nb::arg("block_columns"))
      .def_ro("rows", &BlockLayout::rows)
      .def_ro("down", &BlockLayout::down)
      .def_ro("block_columns", &BlockLayout::block_columns);
  nb::class_<BlockRounder>(m, "BlockRounder", "Rounds to a block format.")
      .def(
          "__init__",
          [](BlockRounder* self, const BlockPlan& plan, int look, double largest) {
            new (self) BlockRounder{plan, Look(look), largest};
          },
          nb::arg("plan"), nb::arg("look"), nb::arg("largest"))
      .def("run", &BlockRounder::run, nb::arg("layout"), nb::arg("x"), nb::arg("carrier"),
           nb::arg("out"), nb::arg("n"), nb::arg("rounding"), nb::arg("key_low"),
           nb::arg("key_high"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>())
      .def("run_operand", &BlockRounder::run_operand, nb::arg("layout"), nb::arg("x"), nb::arg("out"),
           nb::arg("n"), nb::arg("positions"), nb::arg("first").none(), nb::arg("threads"),
           nb::call_guard<nb::gil_scoped_release>());
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("quantize_blocks", &quantize, nb::kw_only(), nb::arg("plan"),
        nb::arg("tensor_scale"), nb::arg("given_scale"), nb::arg("layout"), nb::arg("x"),
        nb::arg("carrier"), nb::arg("out"), nb::arg("values"), nb::arg("scales"), nb::arg("n"),
        nb::arg("tops"), nb::arg("rounding"), nb::arg("key_low"), nb::arg("key_high"),
        nb::arg("threads"), released);
  m.def("dequantize_blocks", &dequantize, nb::kw_only(), nb::arg("plan"),
        nb::arg("tensor_scale"), nb::arg("given_scale"), nb::arg("layout"), nb::arg("out"),
        nb::arg("carrier"), nb::arg("values"), nb::arg("scales"), nb::arg("scale_table"),
        nb::arg("n"), nb::arg("threads"), released);
  m.def("top_magnitude", &top_magnitude, nb::kw_only(), nb::arg("x"), nb::arg("n"),
        nb::arg("carrier"), nb::arg("size"), nb::arg("tops"), nb::arg("threads"), released);
}
