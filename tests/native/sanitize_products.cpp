// Dot products, matrix units and integer sums: every order, odd shapes, strides, on exact arrays.
#include <memory>
#include <new>

#include "sanitize.hpp"
#include "unit_types.hpp"

namespace halfstep {
namespace {

enum class Strides { rows, columns, gaps, one };

// A matrix of so many rows and columns, exactly as large as its strides need.
struct Matrix {
  Matrix(std::size_t rows, std::size_t columns, Strides strides, std::uint32_t seed, bool special) {
    const auto down = std::ptrdiff_t(rows), across = std::ptrdiff_t(columns);
    row = strides == Strides::rows ? across : strides == Strides::columns ? 1 : strides == Strides::gaps ? 3 * across + 1 : 0;
    column = strides == Strides::rows ? 1 : strides == Strides::columns ? down : strides == Strides::gaps ? 2 : 0;
    const bool none = rows == 0 || columns == 0;
    numbers = random_numbers(none ? 0 : std::size_t((down - 1) * row + (across - 1) * column + 1), seed, special);
  }

  std::ptrdiff_t row, column;
  std::vector<float> numbers;
};

struct Shape {
  std::size_t rows, columns, depth;
};

constexpr Shape shapes[] = {{1, 1, 1},  {1, 1, 0},    {2, 3, 5},      {1, 128, 40}, {96, 1, 33},
                            {7, 33, 9}, {5, 65, 300}, {96, 128, 257}, {13, 31, 515}};

struct Scratch {
  Scratch() : floats(static_cast<float*>(operator new(dot_scratch * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { operator delete(floats, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats;
};

bool adds(const Shape& shape, Strides strides, const DotSum& sum, bool turned, bool special) {
  const Matrix a(shape.rows, shape.depth, strides, 1, special);
  const Matrix b(shape.depth, shape.columns, strides, 2, special);
  const Grid half = float_grid(10, -24, 65504);
  std::vector<float> first;
  for (const Kernels* kernels : available_kernels()) {
    const Scratch scratch;
    std::vector<float> out(shape.rows * shape.columns, 0.5f);
    const auto row = std::ptrdiff_t(turned ? 1 : shape.columns);
    const auto column = std::ptrdiff_t(turned ? shape.rows : 1);
    const RoundOperand round{special ? nullptr : &half, kernels->round_to};
    const DotWork work{a.numbers.data(), a.row, a.column, b.numbers.data(), b.row, b.column,
                       out.data(), row, column, shape.rows, shape.columns, shape.depth, 0,
                       std::uint64_t(row), std::uint64_t(column), scratch.floats, round, round};
    kernels->dot(work, sum);
    if (first.empty()) first = out;
    if (!same_numbers(out, first)) {
      std::printf("%s adds differently: %zu x %zu x %zu, strides %d, order %d, chunk %zu, split %zu, rounding %d\n",
                  kernels->name, shape.rows, shape.columns, shape.depth, int(strides), int(sum.order),
                  sum.chunk, sum.split, int(sum.rounding));
      return false;
    }
  }
  return true;
}

std::vector<DotSum> sums() {
  const Grid fp32 = float_grid(23, -149, 3.4028234663852886e38);
  const Grid fp16 = float_grid(10, -24, 65504), bf16 = float_grid(7, -133, 3.3895313892515355e38);
  const Grid e6m9 = float_grid(9, -39, 4290772992.0), e5m2 = float_grid(2, -16, 57344);
  std::vector<DotSum> found;
  for (const Grid& adder : {fp32, fp16, bf16, e6m9, e5m2})
    for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic, Rounding::toward_zero})
      for (const bool products_rounded : {false, true})
        for (const Order order : {Order::sequential, Order::pairwise, Order::compensated})
          for (const auto& [chunk, split] :
               {std::pair<std::size_t, std::size_t>{0, 1}, {3, 1}, {64, 1}, {0, 2}, {16, 3}}) {
            const bool differs = chunk == 64;
            const Grid& between = differs ? fp32 : adder;
            found.push_back({adder, between, between, differs, rounding, products_rounded, order, chunk,
                             split, Key{3, 4}});
          }
  return found;
}

template <class Task>
Task task_of(const Shape& shape, const Matrix& a, const Matrix& b, std::size_t chunk) {
  Task task{};
  task.a = a.numbers.data(), task.a_row = a.row, task.a_column = a.column;
  task.b = b.numbers.data(), task.b_row = b.row, task.b_column = b.column;
  task.out_row = shape.columns;
  task.rows = shape.rows, task.columns = shape.columns, task.depth = shape.depth;
  task.chunk = chunk;
  return task;
}

std::vector<const UnitKernel*> units() {
  std::vector<const UnitKernel*> found;
  for (const Kernels* kernels : available_kernels()) {
#ifdef HALFSTEP_X86
    for (const UnitKernel* unit : {&avx512_unit, &avx2_unit})
      if (std::strcmp(unit->name, kernels->name) == 0) found.push_back(unit);
#endif
  }
  found.push_back(&portable_unit);
  return found;
}

bool units_add(const Shape& shape, Strides strides, const UnitRule& rule, std::size_t chunk, bool special) {
  const Matrix a(shape.rows, shape.depth, strides, 5, special);
  const Matrix b(shape.depth, shape.columns, strides, 6, special);
  std::vector<float> first;
  for (const UnitKernel* unit : units()) {
    const auto scratch = std::make_unique<UnitScratch>();
    std::vector<float> out(shape.rows * shape.columns, 0.25f);
    auto task = task_of<UnitTask>(shape, a, b, chunk);
    task.rule = rule;
    task.out = out.data();
    unit->run(task, *scratch);
    if (first.empty()) first = out;
    if (!same_numbers(out, first)) {
      std::printf("unit %s differs: %zu x %zu x %zu, block %d\n", unit->name, shape.rows, shape.columns,
                  shape.depth, rule.block);
      return false;
    }
  }
  return true;
}

bool integers_add(const Shape& shape, Strides strides, std::size_t chunk, bool single) {
  Matrix a(shape.rows, shape.depth, strides, 7, false), b(shape.depth, shape.columns, strides, 8, false);
  for (auto* matrix : {&a, &b})
    for (float& number : matrix->numbers) number = std::nearbyint(std::fmod(number, 128.0f));
  std::vector<double> first;
  for (const UnitKernel* unit : units()) {
    const auto scratch = std::make_unique<FixedScratch>();
    std::vector<double> out(shape.rows * shape.columns, 1.0);
    auto task = task_of<FixedTask>(shape, a, b, chunk);
    task.out = out.data();
    task.lowest = single ? -32768 : -2147483648.0, task.highest = single ? 32767 : 2147483647.0;
    task.single = single;
    unit->run_fixed(task, *scratch);
    if (first.empty()) first = out;
    if (!same_numbers(out, first)) return false;
  }
  return true;
}

}  // namespace

bool products_are_safe() {
  bool fine = true;
  const std::vector<DotSum> rules = sums();
  for (const Shape& shape : shapes)
    for (std::size_t i = 0; i < rules.size(); ++i) {
      const bool large = shape.rows * shape.columns * shape.depth > 20000;
      if (large && i % 11 != shape.depth % 11) continue;  // a share of the rules, each on some shape
      const auto strides = Strides(i % 4);
      fine = adds(shape, strides, rules[i], i % 3 == 0, i % 5 == 0) && fine;
    }
  const UnitRule v100{4, 23, 23, false, -132, -14, -14}, h100{16, 25, 23, false, -133, -14, -14};
  const UnitRule e4m3{32, 13, 13, false, -133, -6, -6}, half{8, 24, 10, true, -132, -14, -14};
  for (const Shape& full : shapes)
    for (const UnitRule& rule : {v100, h100, e4m3, half})
      for (const std::size_t chunk : {0, 40})
        for (const Strides strides : {Strides::rows, Strides::columns, Strides::gaps, Strides::one})
          for (const bool special : {false, true}) {
            const Shape shape{std::min(full.rows, unit_rows), full.columns, full.depth};
            fine = units_add(shape, strides, rule, chunk, special) && fine;
            fine = integers_add(shape, strides, chunk, special) && fine;
          }
  return fine;
}

}  // namespace halfstep
