// The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every rounding, carrier, end of a
// grid and instruction set, on arrays without a byte to spare; blocks, products and steps in files of their own.
// `make sanitize` builds and runs it. That the numbers are right is for the Python tests; here the
// instruction sets are compared.
#include "parallel.hpp"
#include "sanitize.hpp"

using namespace halfstep;

namespace {

constexpr int roundings = 7, carriers = 9, results = 4;

std::vector<Grid> grids(bool in_float64) {
  const double bf16 = 3.3895313892515355e38;
  std::vector<Grid> all = {
      float_grid(10, -24, 65504, Ends::gradual), float_grid(10, -24, 65504, Ends::flush),
      float_grid(7, -133, bf16, Ends::gradual),  float_grid(7, -133, bf16, Ends::flush),
      float_grid(3, -9, 448, Ends::gradual),     float_grid(0, 1, 0, Ends::gradual),
      float_grid(0, -63, 4e18, Ends::gradual),   float_grid(0, -127, 1.7e38, Ends::no_zero)};
  Grid integers = float_grid(in_float64 ? 52 : 23, 0, 127, Ends::wrap);
  integers.lowest = -128;
  integers.negative_zero = false;
  integers.span = 256;
  all.push_back(integers);
  return all;
}

// NaNs and infinities would make converting to a narrow carrier lossy; they are random bytes' business.
bool rounds_alike(const Grid& grid, int rounding, int from, int to, bool in_float64, std::size_t n) {
  const auto x = random_bytes(n * bytes_of(Carrier(from)), unsigned(n * 31 + from));
  std::vector<unsigned char> first;
  for (const Kernels* kernels : available_kernels()) {
    for (const bool stream : {false, true}) {
      // exactly as long as it may be: one element more is an error
      std::vector<unsigned char> out(n * bytes_of(Carrier(to)));
      const RoundArrays arrays{x.data(), Carrier(from), out.data(), Carrier(to), in_float64};
      const Key key{12345, 67890, 0xFFF00000u};
      parallel_for(n, 64, 2, [&](std::size_t begin, std::size_t end) {
        kernels->round_to(arrays, begin, end, grid, Rounding(rounding), key, stream);
      });
      if (first.empty()) first = out;
      if (out != first) {
        std::printf("%s differs: rounding %d, carriers %d to %d, %zu elements\n", kernels->name,
                    rounding, from, to, n);
        return false;
      }
    }
  }
  return true;
}

bool counts_and_widens(std::size_t n) {
  for (int carrier = 0; carrier < 4; ++carrier) {
    const auto x = random_bytes(n * bytes_of(Carrier(carrier)), unsigned(n));
    std::size_t expected = available_kernels().back()->count_nonfinite(x.data(), n, Carrier(carrier));
    for (const Kernels* kernels : available_kernels()) {
      if (kernels->count_nonfinite(x.data(), n, Carrier(carrier)) != expected) return false;
      std::vector<float> out(n);
      if (carrier >= 2) kernels->widen(x.data(), out.data(), n, Carrier(carrier), 2.0f);
    }
  }
  return true;
}

}  // namespace

int main() {
  bool fine = true;
  for (const std::size_t n : {0, 1, 3, 7, 8, 17, 63, 200}) {
    for (const bool in_float64 : {false, true})
      for (const Grid& grid : grids(in_float64))
        for (int rounding = 0; rounding < roundings; ++rounding)
          for (int from = 0; from < carriers; ++from)
            for (int to = 0; to < results; ++to) {
              const bool wide = Carrier(from) == Carrier::float64 || from >= int(Carrier::int32);
              if (wide && !in_float64) continue;
              // what a float16 does not hold is for Python to refuse
              if (to >= 2 && grid.highest > 448) continue;
              fine = rounds_alike(grid, rounding, from, to, in_float64, n) && fine;
            }
    fine = counts_and_widens(n) && fine;
  }
  fine = blocks_are_safe() && fine;
  fine = products_are_safe() && fine;
  fine = steps_are_safe() && fine;
  std::puts(fine ? "sanitize: no complaint" : "sanitize: the instruction sets differ");
  return fine ? 0 : 1;
}
