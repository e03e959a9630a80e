// The Python edge of dot products: how a product is cut into works for threads. Arguments are
// checked in halfstep/ops.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <new>

#include "cpu.hpp"
#include "parallel.hpp"
#include "types.hpp"

namespace nb = nanobind;

namespace halfstep {
namespace {

constexpr double small = 1 << 15;  // multiply-adds that are not worth a thread
constexpr std::size_t least_columns = 32, least_rows = 16;
constexpr std::size_t thin = 8;    // so few columns leave a vector's lanes empty

struct Scratch {
  Scratch() : floats(static_cast<float*>(operator new(dot_scratch * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { operator delete(floats, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats;
};

// What the whole product needs; a_starts and b_starts are where each matrix of the batch begins.
struct Operands {
  const float* a;
  const std::int64_t* a_starts;
  std::ptrdiff_t a_row, a_column;
  const float* b;
  const std::int64_t* b_starts;
  std::ptrdiff_t b_row, b_column;
};

// `start`: what every sum starts from, to be rounded; where it is null, `out` holds it already.
void dot(std::uintptr_t a, std::uintptr_t a_starts, std::ptrdiff_t a_row, std::ptrdiff_t a_column,
         std::uintptr_t b, std::uintptr_t b_starts, std::ptrdiff_t b_row, std::ptrdiff_t b_column,
         std::uintptr_t out, std::uintptr_t start, std::size_t batch, std::size_t m, std::size_t n,
         std::size_t k, const Grid* round_a, const Grid* round_b, const DotSum& rule, std::uint32_t key_low, std::uint32_t key_high,
         int threads) {
  DotSum sum = rule;
  sum.key = {key_low, key_high};
  Operands operands{reinterpret_cast<const float*>(a), reinterpret_cast<const std::int64_t*>(a_starts), a_row, a_column,
                    reinterpret_cast<const float*>(b), reinterpret_cast<const std::int64_t*>(b_starts), b_row, b_column};
  const Kernels* kernels = kernels_in_use();
  RoundOperand left{round_a, kernels->round_to}, right{round_b, kernels->round_to};
  float first = 0;
  if (start != 0) {
    double number = *reinterpret_cast<const float*>(start);
    kernels->round_to({&number, Carrier::float64, &number, Carrier::float64, true}, 0, 1, sum.start,
                      Rounding::nearest, Key{}, false);
    first = float(number);
  }
  // the transpose of a @ b is b^T @ a^T, and each element adds the same numbers in the same order
  const bool turned = n < thin && n < m;
  std::size_t rows = m, columns = n;
  if (turned) {
    std::swap(rows, columns);
    std::swap(left, right);
    operands = {operands.b, operands.b_starts, b_column, b_row, operands.a, operands.a_starts, a_column, a_row};
  }
  const std::ptrdiff_t out_row = turned ? 1 : std::ptrdiff_t(n), out_column = turned ? std::ptrdiff_t(n) : 1;
  if (double(batch) * double(m) * double(n) * double(k) < small) threads = 1;
  std::size_t high = std::min(rows, dot_rows), wide = std::min(columns, dot_columns);
  const auto works = [&] { return batch * ((rows + high - 1) / high) * ((columns + wide - 1) / wide); };
  const std::size_t wanted = threads > 1 ? 2 * std::size_t(threads) : 1;
  while (works() < wanted && (wide > least_columns || high > least_rows)) {
    if (wide > least_columns && (wide >= high || high <= least_rows))
      wide = std::max(least_columns, wide / 2);
    else
      high = std::max(least_rows, high / 2);
  }
  const std::size_t down = (rows + high - 1) / high, across = (columns + wide - 1) / wide;
  parallel_for(batch * down * across, 1, threads, [&](std::size_t begin, std::size_t end) {
    static thread_local Scratch scratch;
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t matrix = i / (down * across);
      const std::size_t row = i % down * high, column = i / down % across * wide;
      const std::uint64_t element = std::uint64_t(matrix) * m * n + row * std::uint64_t(out_row) + column * std::uint64_t(out_column);
      const DotWork work{
          operands.a + operands.a_starts[matrix] + std::ptrdiff_t(row) * operands.a_row,
          operands.a_row,
          operands.a_column,
          operands.b + operands.b_starts[matrix] + std::ptrdiff_t(column) * operands.b_column,
          operands.b_row,
          operands.b_column,
          reinterpret_cast<float*>(out) + element,
          out_row,
          out_column,
          std::min(high, rows - row),
          std::min(wide, columns - column),
          k,
          element,
          std::uint64_t(out_row),
          std::uint64_t(out_column),
          scratch.floats,
          left,
          right};
      if (start != 0)
        for (std::size_t r = 0; r < work.rows; ++r)
          for (std::size_t c = 0; c < work.columns; ++c)
            work.out[std::ptrdiff_t(r) * out_row + std::ptrdiff_t(c) * out_column] = first;
      kernels->dot(work, sum);
    }
  });
}

}  // namespace

void bind_dot(nb::module_& m) {
  nb::class_<DotSum>(m, "DotSum", "How products are added; see types.hpp.")
      .def(
          "__init__",
          [](DotSum* self, const Grid& adder, const Grid& between, const Grid& start, bool between_differs, int rounding,
             bool products_rounded, int order, std::size_t chunk, std::size_t split) {
            new (self) DotSum{adder, between, start, between_differs, Rounding(rounding), products_rounded,
                              Order(order), chunk, split, Key{}};
          },
          nb::kw_only(), nb::arg("adder"), nb::arg("between"), nb::arg("start"), nb::arg("between_differs"),
          nb::arg("rounding"), nb::arg("products_rounded"), nb::arg("order"), nb::arg("chunk"),
          nb::arg("split"));
  m.def("dot", &dot, nb::arg("a"), nb::arg("a_starts"), nb::arg("a_row"), nb::arg("a_column"),
        nb::arg("b"), nb::arg("b_starts"), nb::arg("b_row"), nb::arg("b_column"), nb::arg("out"),
        nb::arg("start"), nb::arg("batch"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("round_a").none(),
        nb::arg("round_b").none(), nb::arg("sum"),
        nb::arg("key_low"), nb::arg("key_high"), nb::arg("threads"),
        nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace halfstep
