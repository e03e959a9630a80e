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

// Matrices of a batch: where each begins, in elements; out is contiguous.
struct Matrices {
  const float* a;
  const std::int64_t* a_starts;
  std::ptrdiff_t a_row, a_column;
  const float* b;
  const std::int64_t* b_starts;
  std::ptrdiff_t b_row, b_column;
  std::size_t batch, m, n, k;
};

// fill(task, place in out) and run(task, scratch) for every task of the batch, spread over threads.
template <class Task, class Scratch, class Fill, class Run>
void over_tasks(const Matrices& of, int threads, const Fill& fill, const Run& run) {
  const std::size_t down = (of.m + unit_rows - 1) / unit_rows;
  const std::size_t across = (of.n + unit_across - 1) / unit_across;
  const bool small = double(of.batch) * double(of.m) * double(of.n) * double(of.k) < unit_small;
  parallel_for(of.batch * down * across, 1, small ? 1 : threads, [&](std::size_t begin, std::size_t end) {
    const auto scratch = std::make_unique<Scratch>();
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t matrix = i / (down * across);
      const std::size_t row = i % down * unit_rows, column = i / down % across * unit_across;
      Task task{};
      task.a = of.a + of.a_starts[matrix] + std::ptrdiff_t(row) * of.a_row;
      task.a_row = of.a_row;
      task.a_column = of.a_column;
      task.b = of.b + of.b_starts[matrix] + std::ptrdiff_t(column) * of.b_column;
      task.b_row = of.b_row;
      task.b_column = of.b_column;
      task.out_row = of.n;
      task.rows = std::min(unit_rows, of.m - row);
      task.columns = std::min(unit_across, of.n - column);
      task.depth = of.k;
      fill(task, (matrix * of.m + row) * of.n + column);
      run(task, *scratch);
    }
  });
}

void unit_accumulate(const Matrices& of, std::uintptr_t out, int block, int fraction_bits,
                     int result_bits, bool result_is_half, int lowest_exponent, int a_least, int b_least,
                     std::size_t chunk, int threads) {
  const UnitRule rule{block, fraction_bits, result_bits, result_is_half, lowest_exponent, a_least, b_least};
  const auto fill = [&](UnitTask& task, std::size_t place) {
    task.rule = rule;
    task.out = reinterpret_cast<float*>(out) + place;
    task.chunk = chunk;
  };
  over_tasks<UnitTask, UnitScratch>(of, threads, fill, unit_in_use()->run);
}

// out is float64 and holds where the sums begin.
void fixed_accumulate(const Matrices& of, std::uintptr_t out, double lowest, double highest,
                      bool single, std::size_t chunk, int threads) {
  const auto fill = [&](FixedTask& task, std::size_t place) {
    task.out = reinterpret_cast<double*>(out) + place;
    task.chunk = chunk;
    task.lowest = lowest;
    task.highest = highest;
    task.single = single;
  };
  over_tasks<FixedTask, FixedScratch>(of, threads, fill, unit_in_use()->run_fixed);
}

}  // namespace

void bind_units(nb::module_& m) {
  nb::class_<Matrices>(m, "Matrices", "Pointers, strides and sizes of a batch of products.")
      .def(
          "__init__",
          [](Matrices* self, std::uintptr_t a, std::uintptr_t a_starts, std::ptrdiff_t a_row,
             std::ptrdiff_t a_column, std::uintptr_t b, std::uintptr_t b_starts,
             std::ptrdiff_t b_row, std::ptrdiff_t b_column, std::size_t batch, std::size_t rows,
             std::size_t columns, std::size_t depth) {
            new (self) Matrices{reinterpret_cast<const float*>(a),
                                reinterpret_cast<const std::int64_t*>(a_starts),
                                a_row,
                                a_column,
                                reinterpret_cast<const float*>(b),
                                reinterpret_cast<const std::int64_t*>(b_starts),
                                b_row,
                                b_column,
                                batch,
                                rows,
                                columns,
                                depth};
          },
          nb::kw_only(), nb::arg("a"), nb::arg("a_starts"), nb::arg("a_row"), nb::arg("a_column"),
          nb::arg("b"), nb::arg("b_starts"), nb::arg("b_row"), nb::arg("b_column"),
          nb::arg("batch"), nb::arg("m"), nb::arg("n"), nb::arg("k"));

  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("unit_accumulate", &unit_accumulate, nb::arg("of"), nb::arg("out"), nb::arg("block"),
        nb::arg("fraction_bits"), nb::arg("result_bits"), nb::arg("result_is_half"), nb::arg("lowest_exponent"),
        nb::arg("a_least"), nb::arg("b_least"), nb::arg("chunk"), nb::arg("threads"), released);
  m.def("fixed_accumulate", &fixed_accumulate, nb::arg("of"), nb::arg("out"), nb::arg("lowest"),
        nb::arg("highest"), nb::arg("single"), nb::arg("chunk"), nb::arg("threads"), released);
  m.attr("unit_depth") = unit_depth;
}
