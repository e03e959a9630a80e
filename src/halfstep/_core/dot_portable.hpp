// The steps of dot.hpp in plain C++: product and sum in double, rounded to odd, then to the grid.
#pragma once

#include "dot.hpp"
#include "lanes_portable.hpp"

namespace halfstep {
namespace {

struct PortableTile {
  static constexpr int rows = 1;
  static constexpr int columns = dot_columns;

  Rounder<Portable64, Rounding::nearest, true> round;

  // x + y, and where that is not exact the neighbour whose last bit is 1
  static double add_to_odd(double x, double y) {
    const double total = x + y;
    const double part = total - x;  // Knuth's two-sum: total + error is x + y exactly
    const double error = (x - (total - part)) + (y - part);
    std::uint64_t bits = Portable64::bits(total);
    const bool finite = (bits & 0x7FF0000000000000u) != 0x7FF0000000000000u;
    if (error != 0 && finite && (bits & 1) == 0) {
      // toward the error: the magnitude grows where the signs agree
      const bool grows = (error > 0) == (total > 0);
      bits += grows ? 1 : ~std::uint64_t(0);
    }
    return Portable64::number_of(bits);
  }

  template <int count>
  void run(const float* a, std::ptrdiff_t, std::ptrdiff_t a_column, const float* panel,
           std::size_t depth, float* out, std::size_t, std::size_t used) const {
    for (std::size_t k = 0; k < depth; ++k) {
      const double left = a[std::ptrdiff_t(k) * a_column];
      const float* right = panel + k * columns;
      for (std::size_t j = 0; j < used; ++j) {
        const double sum = add_to_odd(out[j], left * double(right[j]));  // 24 + 24 bits: exact
        out[j] = float(Portable64::number_of(round(Portable64::bits(sum), 0)));
      }
    }
  }
};

void dot_portable(const DotBlock& block, const Grid& grid, float* panel) {
  dot_with(PortableTile{{Constants<Portable64>(grid), Key{}}}, block, panel);
}

}  // namespace
}  // namespace halfstep
