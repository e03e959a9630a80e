// What the kernels are told: plain data, no Python. The names are those of halfstep.format and
// halfstep.ops.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfstep {

enum class Rounding : int { nearest, stochastic, toward_zero, up, down, away, to_odd };

// The type of a tensor's elements; of integers tensors are only read.
enum class Carrier : int { float32, float64, float16, bfloat16, int8, uint8, int16, int32, int64 };

inline std::size_t bytes_of(Carrier carrier) {
  switch (carrier) {
    case Carrier::int8:
    case Carrier::uint8: return 1;
    case Carrier::float16:
    case Carrier::bfloat16:
    case Carrier::int16: return 2;
    case Carrier::float32:
    case Carrier::int32: return 4;
    case Carrier::float64:
    case Carrier::int64: return 8;
  }
  return 0;
}

// What becomes of numbers at the ends of a grid.
enum class Ends : int {
  gradual,  // below the smallest normal number there are subnormal ones, and zero
  wrap,     // so too; and what overflows is moved by multiples of the grid's span, back in
  flush,    // zero is below: of what rounds there as if exponents had no lower end
  no_zero,  // nothing is below, and nothing negative: all that is less becomes the smallest number
};

// A grid of numbers: multiples of 2^quantum_exponent near zero; from 2^(quantum_exponent +
// mantissa_bits), the smallest normal number, on, numbers of mantissa_bits + 1 significant bits; from
// lowest to highest.
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
  Ends ends = Ends::gradual;
  int odd_exponents = -1;  // parity of the carrier's exponent fields whose numbers count as odd where
                           // there is no mantissa; -1: all do
  double span = 0;         // of a grid that wraps
};

struct Key {
  std::uint32_t low;
  std::uint32_t high;
  std::uint32_t used = 0xFFFFFFFFu;  // which of the 32 random bits count: the uppermost ones
};

enum class Order : int { sequential, pairwise, compensated };

// How products are added; halfstep.format.Accumulator. Grids for float64.
struct DotSum {
  Grid adder;
  Grid between;
  Grid start;  // of what the sums start from, to nearest
  bool between_differs;  // from the adder
  Rounding rounding;
  bool products_rounded;
  Order order;
  std::size_t chunk;  // 0: all in one
  std::size_t split;
  Key key;
};

// out is float32, float64 or 16 bits. The rounding is made in float64 or in float32, which holds every
// number of x (but int64's, which float64 holds rounded to odd).
struct RoundArrays {
  const void* x;
  Carrier x_carrier;
  void* out;
  Carrier out_carrier;
  bool in_float64;
};

// What an operand's numbers are rounded to, to nearest, while they are packed.
struct RoundOperand {
  const Grid* grid = nullptr;  // for float32; null: they are on it
  void (*kernel)(const RoundArrays& arrays, std::size_t begin, std::size_t end, const Grid& grid, Rounding rounding,
                 Key key, bool stream) = nullptr;

  void operator()(float* numbers, std::size_t n) const {
    if (grid != nullptr)
      kernel({numbers, Carrier::float32, numbers, Carrier::float32, false}, 0, n, *grid, Rounding::nearest, Key{}, false);
  }
};

// out[rows, columns] += a[rows, depth] @ b[depth, columns]. Strides are in elements. `element` is
// the place of out[0, 0] in the whole result, which its random bits depend on.
struct DotWork {
  const float* a;
  std::ptrdiff_t a_row, a_column;
  const float* b;
  std::ptrdiff_t b_row, b_column;
  float* out;
  std::ptrdiff_t out_row, out_column;
  std::size_t rows, columns, depth;
  std::uint64_t element, element_row, element_column;
  float* scratch;  // dot_scratch of them, aligned to 64 bytes
  RoundOperand round_a, round_b;
};

constexpr std::size_t dot_rows = 384;     // the most of one work
constexpr std::size_t dot_columns = 512;  // the most of one work
constexpr std::size_t dot_depth = 256;    // of a panel, of which there may be many
constexpr std::size_t dot_scratch = (dot_rows + dot_columns) * dot_depth + 3 * dot_rows * dot_columns;

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
  void* scales;               // null: they are not kept
  const std::uint32_t* tops;  // bits of each block's largest magnitude; null: find them
  const float* scale_table;   // what the codes of scales mean
  bool stream;               // write out past the caches
};

// What an optimizer's step does to each element; halfstep.ops.stepping says it in formulas.
struct AdamRule {
  float scale;  // of the gradients, which are divided by it
  bool maximize;
  bool penalizes;  // adds penalty * weight to the gradient
  float penalty;
  float decay;    // of the weight; 1: none
  float moment;   // 1 - beta1
  float beta2;
  float square;  // 1 - beta2
  float eps;
};

struct SgdRule {
  float scale;
  bool maximize;
  bool penalizes;
  float penalty;
  bool fresh;  // the momentum buffers hold nothing yet
  bool nesterov;
  float momentum;
  float gain;  // 1 - dampening
  float step;  // -lr
};

struct StepArrays {
  const void* gradient;
  Carrier gradient_carrier;
  float* weight;
  float* mean;    // momentum buffer of SGD; null: none
  float* square;  // of Adam
  std::uint16_t* copy;  // of the new weight, null: none
  Carrier copy_carrier;
  float root;  // of Adam: sqrt(1 - beta2^t), -lr / (1 - beta1^t)
  float step;
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
  void (*dot)(const DotWork& work, const DotSum& sum);
  void (*adam)(const AdamRule& rule, const StepArrays& arrays, std::size_t begin, std::size_t end,
               bool stream);
  void (*sgd)(const SgdRule& rule, const StepArrays& arrays, std::size_t begin, std::size_t end,
              bool stream);
  void (*touch)(const StepArrays& arrays, std::size_t begin, std::size_t end, bool stream);
};

extern const Kernels portable_kernels;
#ifdef HALFSTEP_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace halfstep
