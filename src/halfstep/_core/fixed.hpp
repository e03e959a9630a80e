// Sums in an integer format that stop at its ends after every step, in the order of k. All numbers are
// integers whose sums the type T holds exactly.
#pragma once

#include <cstddef>

#include "unit_types.hpp"

namespace halfstep {
namespace {

// NaN stays.
template <class T>
inline T clamped(T x, T lowest, T highest) {
  x = x < lowest ? lowest : x;
  return x > highest ? highest : x;
}

// sums[unit_columns] of one row: `depth` products onto them.
template <class T>
void add_clamped(const FixedTask& task, const float* a, const T* b, std::size_t depth, T* sums) {
  const T lowest = T(task.lowest), highest = T(task.highest);
  T kept[unit_columns];
  for (std::size_t j = 0; j < unit_columns; ++j) kept[j] = sums[j];
  for (std::size_t k = 0; k < depth; ++k) {
    const T left = T(a[std::ptrdiff_t(k) * task.a_column]);
    for (std::size_t j = 0; j < unit_columns; ++j)
      kept[j] = clamped(kept[j] + left * b[k * unit_columns + j], lowest, highest);
  }
  for (std::size_t j = 0; j < unit_columns; ++j) sums[j] = kept[j];
}

template <class T>
void fixed_task(const FixedTask& task, T* panel) {
  const T lowest = T(task.lowest), highest = T(task.highest);
  const std::size_t most = task.chunk ? task.chunk : unit_depth;
  for (std::size_t column = 0; column < task.columns; column += unit_columns) {
    const std::size_t rest = task.columns - column;
    const std::size_t used = rest < unit_columns ? rest : unit_columns;
    for (std::size_t first = 0; first < task.depth; first += most) {
      const std::size_t left = task.depth - first;
      const std::size_t depth = left < most ? left : most;
      for (std::size_t k = 0; k < depth; ++k)
        for (std::size_t j = 0; j < unit_columns; ++j)
          panel[k * unit_columns + j] =
              j < used ? T(task.b[std::ptrdiff_t(first + k) * task.b_row +
                                  std::ptrdiff_t(column + j) * task.b_column])
                       : T(0);
      for (std::size_t i = 0; i < task.rows; ++i) {
        double* out = task.out + i * task.out_row + column;
        T sums[unit_columns];
        for (std::size_t j = 0; j < unit_columns; ++j)
          sums[j] = j < used && task.chunk == 0 ? T(out[j]) : T(0);
        add_clamped(task,
                    task.a + std::ptrdiff_t(i) * task.a_row + std::ptrdiff_t(first) * task.a_column,
                    panel, depth, sums);
        for (std::size_t j = 0; j < used; ++j)
          out[j] = task.chunk ? double(clamped(T(out[j]) + sums[j], lowest, highest)) : double(sums[j]);
      }
    }
  }
}

void fixed_tasks(const FixedTask& task, FixedScratch& scratch) {
  if (task.single) return fixed_task(task, scratch.single);
  fixed_task(task, scratch.wide);
}

}  // namespace
}  // namespace halfstep
