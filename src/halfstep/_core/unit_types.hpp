// What the kernels of matrix units and integer accumulators are told: plain data.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfstep {

// halfstep.format.Datapath, for two formats.
struct UnitRule {
  int block;
  int fraction_bits;
  int result_bits;
  bool result_is_half;  // rounded to nearest in fp16; else truncated in fp32
  int lowest_exponent;
  int a_least, b_least;  // exponents of the formats' least normal numbers
};

// out[rows, columns] += a[rows, depth] @ b[depth, columns] by the rule; with chunks, each of so many
// products begins at zero and is added to out in fp32. Strides are in elements; rows of out are
// contiguous.
struct UnitTask {
  UnitRule rule;
  const float* a;
  std::ptrdiff_t a_row, a_column;
  const float* b;
  std::ptrdiff_t b_row, b_column;
  float* out;
  std::size_t out_row;
  std::size_t rows, columns, depth;
  std::size_t chunk;  // at most unit_depth; 0: all in one
};

constexpr std::size_t unit_rows = 32;      // the most of one task
constexpr std::size_t unit_columns = 32;   // done at a time
constexpr std::size_t unit_depth = 512;    // split at a time; a multiple of every block
constexpr std::size_t unit_most_block = 32;

struct UnitScratch {
  alignas(64) float a_digits[unit_rows * (unit_depth + unit_most_block)];
  alignas(64) std::int32_t a_exponent[unit_rows * (unit_depth + unit_most_block)];
  alignas(64) float b_digits[(unit_depth + unit_most_block) * unit_columns];
  alignas(64) std::int32_t b_exponent[(unit_depth + unit_most_block) * unit_columns];
  alignas(64) float sums[unit_rows * unit_columns];
};

// out[rows, columns] += a[rows, depth] @ b[depth, columns] of integers, kept in [lowest, highest] after
// every step; with chunks, each of so many products begins at zero. Strides as in UnitTask.
struct FixedTask {
  const float* a;
  std::ptrdiff_t a_row, a_column;
  const float* b;
  std::ptrdiff_t b_row, b_column;
  double* out;
  std::size_t out_row;
  std::size_t rows, columns, depth;
  std::size_t chunk;  // at most unit_depth; 0: all in one
  double lowest, highest;
  bool single;  // float holds every sum before it is kept in there
};

union FixedScratch {
  alignas(64) float single[unit_depth * unit_columns];
  alignas(64) double wide[unit_depth * unit_columns];
};

// One for each instruction set.
struct UnitKernel {
  const char* name;  // of the instruction set, as in Kernels
  void (*run)(const UnitTask& task, UnitScratch& scratch);
  void (*run_fixed)(const FixedTask& task, FixedScratch& scratch);
};

extern const UnitKernel portable_unit;
#ifdef HALFSTEP_X86
extern const UnitKernel avx2_unit;
extern const UnitKernel avx512_unit;
#endif

}  // namespace halfstep
