// The Python edge: pointers and sizes in, nothing allocated, the GIL released. Arguments are checked
// in halfstep/ops/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "types.hpp"

namespace nb = nanobind;
using namespace halfstep;

namespace {

// Elements a thread is worth starting for, and the bytes from which an output that is not in a
// cache anyway is written past them; both measured, see docs/decisions/0011.
constexpr std::size_t grain = std::size_t(1) << 17;
constexpr std::size_t stream_from = std::size_t(1) << 22;

template <class Number, class Kernel>
void round_all(std::uintptr_t x, std::uintptr_t out, std::size_t n, const Grid& grid, int rounding,
               Key key, int threads, Kernel kernel) {
  const auto* from = reinterpret_cast<const Number*>(x);
  auto* to = reinterpret_cast<Number*>(out);
  const bool stream = x != out && n * sizeof(Number) >= stream_from;
  // Pieces end at multiples of the grain, which divides 2^32: no vector crosses a block of random
  // bits.
  parallel_for(n, grain, threads, [&](std::size_t begin, std::size_t end) {
    constexpr std::size_t block = std::size_t(1) << 32;
    while (begin < end) {
      const std::size_t stop = std::min(end, (begin / block + 1) * block);
      kernel(from, to, begin, stop, grid, Rounding(rounding), key, stream);
      begin = stop;
    }
  });
}

void round_float32(std::uintptr_t x, std::uintptr_t out, std::size_t n, const Grid& grid,
                   int rounding, std::uint32_t key_low, std::uint32_t key_high, int threads) {
  round_all<float>(x, out, n, grid, rounding, Key{key_low, key_high}, threads,
                   kernels_in_use().load()->round_float32);
}

void round_float64(std::uintptr_t x, std::uintptr_t out, std::size_t n, const Grid& grid,
                   int rounding, std::uint32_t key_low, std::uint32_t key_high, int threads) {
  round_all<double>(x, out, n, grid, rounding, Key{key_low, key_high}, threads,
                    kernels_in_use().load()->round_float64);
}

// One pass over all arrays, as if they were one: many small ones need no thread each.
std::vector<std::size_t> count_nonfinite(const std::vector<std::uintptr_t>& arrays,
                                         const std::vector<std::size_t>& sizes,
                                         const std::vector<int>& carriers, int threads) {
  struct Piece {
    std::size_t array, begin, end;
  };
  std::vector<Piece> pieces;
  std::vector<std::size_t> counts(arrays.size(), 0);
  const Kernels* kernels = kernels_in_use();
  const auto count = [&](const Piece& piece) {
    const Carrier carrier = Carrier(carriers[piece.array]);
    const std::uintptr_t from = arrays[piece.array] + piece.begin * bytes_of(carrier);
    return kernels->count_nonfinite(reinterpret_cast<const void*>(from), piece.end - piece.begin,
                                    carrier);
  };
  for (std::size_t array = 0; array < arrays.size(); ++array) {
    if (sizes[array] < grain) {
      counts[array] = count({array, 0, sizes[array]});
      continue;
    }
    for (std::size_t begin = 0; begin < sizes[array]; begin += grain)
      pieces.push_back({array, begin, std::min(sizes[array], begin + grain)});
  }
  std::vector<std::size_t> found(pieces.size());
  parallel_for(pieces.size(), 1, threads, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) found[i] = count(pieces[i]);
  });
  for (std::size_t i = 0; i < pieces.size(); ++i) counts[pieces[i].array] += found[i];
  return counts;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "halfstep's native kernels; halfstep.ops.native calls them.";

  nb::class_<Grid>(m, "Grid", "The numbers to round to; see types.hpp.")
      .def(
          "__init__",
          [](Grid* self, int quantum_exponent, int mantissa_bits, double highest, double lowest,
             double overflow_up, double overflow_down, double infinity_up, double infinity_down,
             bool negative_zero) {
            new (self) Grid{quantum_exponent, mantissa_bits, highest,     lowest,       overflow_up,
                            overflow_down,    infinity_up,   infinity_down, negative_zero};
          },
          nb::kw_only(), nb::arg("quantum_exponent"), nb::arg("mantissa_bits"), nb::arg("highest"),
          nb::arg("lowest"), nb::arg("overflow_up"), nb::arg("overflow_down"),
          nb::arg("infinity_up"), nb::arg("infinity_down"), nb::arg("negative_zero"));

  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("round_float32", &round_float32, nb::arg("x"), nb::arg("out"), nb::arg("n"),
        nb::arg("grid"), nb::arg("rounding"), nb::arg("key_low"), nb::arg("key_high"),
        nb::arg("threads"), released);
  m.def("round_float64", &round_float64, nb::arg("x"), nb::arg("out"), nb::arg("n"),
        nb::arg("grid"), nb::arg("rounding"), nb::arg("key_low"), nb::arg("key_high"),
        nb::arg("threads"), released);

  m.def("count_nonfinite", &count_nonfinite, nb::arg("arrays"), nb::arg("sizes"),
        nb::arg("carriers"), nb::arg("threads"), released);

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
