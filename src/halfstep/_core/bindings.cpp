// The Python edge: pointers and sizes in, nothing allocated, the GIL released. Arguments are checked
// in halfstep/ops/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings_units.hpp"
#include "cpu.hpp"
#include "parallel.hpp"
#include "types.hpp"

namespace nb = nanobind;

namespace halfstep {
void bind_dot(nb::module_& m);
}
using namespace halfstep;

void bind_blocks(nb::module_& m);
void bind_step(nb::module_& m);

namespace {

void round_to(std::uintptr_t x, int x_carrier, std::uintptr_t out, int out_carrier, bool in_float64,
              std::size_t n, const Grid& grid, int rounding, std::uint32_t key_low,
              std::uint32_t key_high, std::uint32_t key_used, int threads) {
  const RoundArrays arrays{reinterpret_cast<const void*>(x), Carrier(x_carrier),
                           reinterpret_cast<void*>(out), Carrier(out_carrier), in_float64};
  const bool stream = x != out && n * bytes_of(arrays.out_carrier) >= stream_from;
  const Kernels* kernels = kernels_in_use();
  // The grain divides 2^32: no vector crosses a block of random bits.
  const Key key{key_low, key_high, key_used};
  parallel_for(n, grain, threads, [&](std::size_t begin, std::size_t end) {
    kernels->round_to(arrays, begin, end, grid, Rounding(rounding), key, stream);
  });
}

// Rounds rows where they are, after `row`, rounded too, was added to each; 0: as they are.
void round_rows(std::uintptr_t x, std::size_t rows, std::size_t columns, std::uintptr_t row,
                const Grid& grid, int threads) {
  const Kernels* kernels = kernels_in_use();
  const auto round = [&](const float* from, float* to, std::size_t n) {
    const RoundArrays arrays{from, Carrier::float32, to, Carrier::float32, false};
    kernels->round_to(arrays, 0, n, grid, Rounding::nearest, Key{}, false);
  };
  std::vector<float> added(row ? columns : 0);
  if (row) {
    const DefaultFloatMode mode;
    round(reinterpret_cast<const float*>(row), added.data(), columns);
  }
  const std::size_t together = std::max<std::size_t>(1, 4096 / columns);  // stay in the first cache
  const std::size_t pieces = (rows + together - 1) / together;
  parallel_for(pieces, std::max<std::size_t>(1, grain / (together * columns)), threads,
               [&](std::size_t begin, std::size_t end) {
    for (std::size_t piece = begin; piece < end; ++piece) {
      const std::size_t first = piece * together, n = std::min(together, rows - first);
      float* to = reinterpret_cast<float*>(x) + first * columns;
      for (std::size_t i = 0; row && i < n; ++i)
        for (std::size_t k = 0; k < columns; ++k) to[i * columns + k] += added[k];
      round(to, to, n * columns);
    }
  });
}

std::vector<std::size_t> count_nonfinite(const std::vector<std::uintptr_t>& arrays,
                                         const std::vector<std::size_t>& sizes,
                                         const std::vector<int>& carriers, int threads) {
  const Kernels* kernels = kernels_in_use();
  std::vector<std::atomic<std::size_t>> counts(sizes.size());
  over_arrays(sizes, threads, [&](std::size_t array, std::size_t begin, std::size_t end) {
    const Carrier carrier = Carrier(carriers[array]);
    const auto* from = reinterpret_cast<const void*>(arrays[array] + begin * bytes_of(carrier));
    counts[array] += kernels->count_nonfinite(from, end - begin, carrier);
  });
  return {counts.begin(), counts.end()};
}

void widen(const std::vector<std::uintptr_t>& arrays, const std::vector<std::uintptr_t>& outs,
           const std::vector<std::size_t>& sizes, const std::vector<int>& carriers, float scale,
           int threads) {
  const Kernels* kernels = kernels_in_use();
  over_arrays(sizes, threads, [&](std::size_t array, std::size_t begin, std::size_t end) {
    const Carrier carrier = Carrier(carriers[array]);
    const auto* from = reinterpret_cast<const void*>(arrays[array] + begin * bytes_of(carrier));
    kernels->widen(from, reinterpret_cast<float*>(outs[array]) + begin, end - begin, carrier, scale);
  });
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace

NB_MODULE(_core, m) {
    nb::set_leak_warnings(false);  // what a program keeps until it ends is no leak
  m.doc() = "halfstep's native kernels; halfstep.ops.native calls them.";
  m.attr("sources") = HALFSTEP_SOURCES;  // the digest of what this was built of

  nb::class_<Grid>(m, "Grid", "The numbers to round to; see types.hpp.")
      .def(
          "__init__",
          [](Grid* self, int quantum_exponent, int mantissa_bits, double highest, double lowest,
             double overflow_up, double overflow_down, double infinity_up, double infinity_down,
             bool negative_zero, int ends, int odd_exponents, double span) {
            new (self) Grid{quantum_exponent, mantissa_bits, highest,       lowest,
                            overflow_up,      overflow_down, infinity_up,   infinity_down,
                            negative_zero,    Ends(ends),      odd_exponents, span};
          },
          nb::kw_only(), nb::arg("quantum_exponent"), nb::arg("mantissa_bits"), nb::arg("highest"),
          nb::arg("lowest"), nb::arg("overflow_up"), nb::arg("overflow_down"),
          nb::arg("infinity_up"), nb::arg("infinity_down"), nb::arg("negative_zero"),
          nb::arg("ends"), nb::arg("odd_exponents"), nb::arg("span"));

  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("round_to", &round_to, nb::arg("x"), nb::arg("x_carrier"), nb::arg("out"),
        nb::arg("out_carrier"), nb::arg("in_float64"), nb::arg("n"), nb::arg("grid"),
        nb::arg("rounding"), nb::arg("key_low"), nb::arg("key_high"), nb::arg("key_used"),
        nb::arg("threads"), released);
  m.def("round_rows", &round_rows, nb::arg("x"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("row"), nb::arg("grid"), nb::arg("threads"), released);
  m.def("count_nonfinite", &count_nonfinite, nb::arg("arrays"), nb::arg("sizes"),
        nb::arg("carriers"), nb::arg("threads"), released);

  m.def("widen", &widen, nb::arg("arrays"), nb::arg("outs"), nb::arg("sizes"), nb::arg("carriers"),
        nb::arg("scale"), nb::arg("threads"), released);

  bind_dot(m);

  bind_units(m);
  bind_blocks(m);
  bind_step(m);

  m.def("instruction_sets", &instruction_sets, "Those that this processor has, best first.");
  m.def("instruction_set", [] { return std::string(kernels_in_use().load()->name); },
        "The one in use.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (!use_kernels(name.c_str())) throw std::invalid_argument("not available: " + name);
      },
      nb::arg("name"), "For tests.");
}
