// Matrix units from Python. Arguments are checked in halfstep/ops/native_units.py.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "bindings_units.hpp"
#include "cpu.hpp"
#include "parallel.hpp"
#include "unit_types.hpp"

namespace nb = nanobind;
using namespace halfstep;

namespace {

constexpr double unit_small = 1 << 17;          // multiply-adds that are not worth a thread
constexpr std::size_t unit_across = 512;        // columns of one task: a is split once for them

const UnitKernel* unit_in_use() {
  const char* name = kernels_in_use().load()->name;
#ifdef HALFSTEP_X86
  for (const UnitKernel* kernel : {&avx512_unit, &avx2_unit})
    if (std::strcmp(kernel->name, name) == 0) return kernel;
#endif
  return &portable_unit;
}

// a_starts and b_starts are where each matrix of the batch begins, in elements; out is contiguous.
void unit_accumulate(std::uintptr_t a, std::uintptr_t a_starts, std::ptrdiff_t a_row,
                     std::ptrdiff_t a_column, std::uintptr_t b, std::uintptr_t b_starts,
                     std::ptrdiff_t b_row, std::ptrdiff_t b_column, std::uintptr_t out,
                     std::size_t batch, std::size_t m, std::size_t n, std::size_t k, int block,
                     int fraction_bits, int result_bits, int lowest_exponent, int a_least,
                     int b_least, std::size_t chunk, int threads) {
  const auto* a_start = reinterpret_cast<const std::int64_t*>(a_starts);
  const auto* b_start = reinterpret_cast<const std::int64_t*>(b_starts);
  const UnitRule rule{block, fraction_bits, result_bits, lowest_exponent, a_least, b_least};
  const UnitKernel* kernel = unit_in_use();
  const std::size_t down = (m + unit_rows - 1) / unit_rows;
  const std::size_t across = (n + unit_across - 1) / unit_across;
  const bool small = double(batch) * double(m) * double(n) * double(k) < unit_small;
  const auto run = [&](std::size_t begin, std::size_t end) {
    const auto scratch = std::make_unique<UnitScratch>();
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t matrix = i / (down * across);
      const std::size_t row = i % down * unit_rows, column = i / down % across * unit_across;
      kernel->run({rule,
                   reinterpret_cast<const float*>(a) + a_start[matrix] + std::ptrdiff_t(row) * a_row,
                   a_row,
                   a_column,
                   reinterpret_cast<const float*>(b) + b_start[matrix] +
                       std::ptrdiff_t(column) * b_column,
                   b_row,
                   b_column,
                   reinterpret_cast<float*>(out) + (matrix * m + row) * n + column,
                   n,
                   std::min(unit_rows, m - row),
                   std::min(unit_across, n - column),
                   k,
                   chunk},
                  *scratch);
    }
  };
  parallel_for(batch * down * across, 1, small ? 1 : threads, run);
}

}  // namespace

void bind_units(nb::module_& m) {
  m.def("unit_accumulate", &unit_accumulate, nb::arg("a"), nb::arg("a_starts"), nb::arg("a_row"),
        nb::arg("a_column"), nb::arg("b"), nb::arg("b_starts"), nb::arg("b_row"),
        nb::arg("b_column"), nb::arg("out"), nb::arg("batch"), nb::arg("m"), nb::arg("n"),
        nb::arg("k"), nb::arg("block"), nb::arg("fraction_bits"), nb::arg("result_bits"),
        nb::arg("lowest_exponent"), nb::arg("a_least"), nb::arg("b_least"), nb::arg("chunk"),
        nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
  m.attr("unit_depth") = unit_depth;
}
