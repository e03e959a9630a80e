// What the kernels are told: plain data, no Python. The names are those of halfstep.format and
// halfstep.ops.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfstep {

enum class Rounding : int { nearest, stochastic, toward_zero, up, down, away };

enum class Carrier : int { float32, float64, float16, bfloat16 };

inline std::size_t bytes_of(Carrier carrier) {
  return carrier == Carrier::float64 ? 8 : carrier == Carrier::float32 ? 4 : 2;
}

// A grid of numbers: multiples of 2^quantum_exponent near zero; from 2^(quantum_exponent +
// mantissa_bits) on, numbers of mantissa_bits + 1 significant bits; from lowest to highest.
struct Grid {
  int quantum_exponent;
  int mantissa_bits;  // as many as the carrier has where the grid is even all along (fixed point)
  double highest;
  double lowest;
  double overflow_up;    // what a finite number becomes that rounds above highest
  double overflow_down;  // ... below lowest
  double infinity_up;    // what +infinity becomes
  double infinity_down;
  bool negative_zero;  // false: -0 becomes +0
};

struct Key {
  std::uint32_t low;
  std::uint32_t high;
};

// out[rows, columns] += a[rows, depth] @ b[depth, columns]. Strides are in elements; rows of out are
// contiguous.
struct DotBlock {
  const float* a;
  std::ptrdiff_t a_row, a_column;
  const float* b;
  std::ptrdiff_t b_row, b_column;
  float* out;
  std::size_t out_row;
  std::size_t rows, columns, depth;
};

constexpr std::size_t dot_rows = 48;          // the most of one block
constexpr std::size_t dot_columns = 32;       // the most of one block
constexpr std::size_t dot_panel_depth = 512;  // of the scratch space, which has dot_columns too

// x is float64 and so is out, or none of them is.
struct RoundArrays {
  const void* x;
  Carrier x_carrier;
  void* out;
  Carrier out_carrier;
};

// How a block's scale is found and its elements are coded; the names are halfstep.format.BlockFormat's.
struct BlockPlan {
  Grid element;
  int element_bits;
  int element_bias;       // of a float's exponent
  bool element_is_fixed;  // point: coded in two's complement
  bool element_has_inf;
  std::uint32_t max_magnitude_code;  // of a float; codes above are infinity or NaN
  bool by_amax;                      // the scale is amax / largest, not a power of two
  int exponent;                      // of the largest power of two that is an element
  std::uint32_t carry_from;  // float32 mantissa field of amax from which the scale is twice as large
  float largest;             // element
  float least_scale, most_scale;
  Grid scale;
  bool scale_is_byte;  // e8m0 or e4m3fn; else float32
  float tensor_scale;
  float given_scale;  // where it is not 0: the scale of all, and none is stored
  Grid carrier;       // of a 16-bit result
};

// Where blocks are. A last axis (down 0): a matrix of rows x columns for each of `outer`, blocks of
// block_rows x block_columns. Else blocks of block_columns lie along an axis of `columns`, beyond
// each step of which are `down` elements.
struct BlockLayout {
  std::size_t outer, rows, columns, down;
  std::size_t block_rows, block_columns;
};

struct BlockArrays {
  const void* numbers;  // to quantise
  Carrier carrier;      // of numbers, or of out where there are none
  void* out;            // null: only store
  std::uint8_t* values;
  void* scales;
  const std::uint32_t* tops;  // bits of each block's largest magnitude; null: find them
  const float* scale_table;   // what the codes of scales mean
  bool stream;               // write out past the caches
};

// One kernel set for each instruction set; elements [begin, end) of the arrays are done. Element
// i of a stochastic rounding uses random bits i. `stream`: write past the caches.
struct Kernels {
  const char* name;
  void (*round_to)(const RoundArrays& arrays, std::size_t begin, std::size_t end, const Grid& grid,
                   Rounding rounding, Key key, bool stream);
  std::size_t (*count_nonfinite)(const void* x, std::size_t n, Carrier carrier);
  void (*widen)(const void* x, float* out, std::size_t n, Carrier carrier, float scale);
  void (*quantize_blocks)(const BlockPlan& plan, const BlockLayout& layout,
                          const BlockArrays& arrays, std::size_t begin, std::size_t end,
                          Rounding rounding, Key key);
  void (*dequantize_blocks)(const BlockPlan& plan, const BlockLayout& layout,
                            const BlockArrays& arrays, std::size_t begin, std::size_t end);
  std::uint32_t (*top_magnitude)(const void* x, std::size_t n, Carrier carrier, std::size_t size,
                                 std::uint32_t* tops);
  void (*dot_accumulate)(const DotBlock& block, const Grid& grid, float* panel);
};

extern const Kernels portable_kernels;
#ifdef HALFSTEP_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace halfstep
