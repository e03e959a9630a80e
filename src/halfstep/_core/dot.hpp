// Dot products whose sum is rounded to a grid after every exact step; the twin of
// halfstep/ops/summation.py. This file: how the work is cut; the steps are in
// dot_portable.hpp and dot_avx512.hpp.
#pragma once

#include <cstddef>

#include "round.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

// The columns of b that one block needs, `depth` steps of k: panel[k][column], zeros at the end.
template <int columns>
void pack(const DotBlock& block, std::size_t first, std::size_t depth, float* panel) {
  for (std::size_t k = 0; k < depth; ++k) {
    const float* from = block.b + std::ptrdiff_t(first + k) * block.b_row;
    float* to = panel + k * columns;
    for (std::size_t j = 0; j < std::size_t(columns); ++j)
      to[j] = j < block.columns ? from[std::ptrdiff_t(j) * block.b_column] : 0.0f;
  }
}

// Tile::run<rows> does so many rows of one block, for the k of the panel, from what `out` holds.
template <class Tile, int rows>
void run_rows(const Tile& tile, const DotBlock& block, std::size_t row, std::size_t first,
              std::size_t depth, const float* panel) {
  if constexpr (rows > 0) {
    const std::size_t left = block.rows - row;
    if (left < std::size_t(rows))
      return run_rows<Tile, rows - 1>(tile, block, row, first, depth, panel);
    const float* a = block.a + std::ptrdiff_t(row) * block.a_row +
                     std::ptrdiff_t(first) * block.a_column;
    tile.template run<rows>(a, block.a_row, block.a_column, panel, depth, block.out + row * block.out_row,
                            block.out_row, block.columns);
  }
}

template <class Tile>
void dot_with(const Tile& tile, const DotBlock& block, float* panel) {
  for (std::size_t first = 0; first < block.depth; first += dot_panel_depth) {
    const std::size_t left = block.depth - first;
    const std::size_t depth = left < dot_panel_depth ? left : dot_panel_depth;
    pack<Tile::columns>(block, first, depth, panel);
    for (std::size_t row = 0; row < block.rows; row += Tile::rows)
      run_rows<Tile, Tile::rows>(tile, block, row, first, depth, panel);
  }
}

}  // namespace
}  // namespace halfstep
