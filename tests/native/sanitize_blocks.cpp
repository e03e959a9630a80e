// Blocks: quantise to numbers and to codes, decode, amax; all layouts, ragged ends and widths of codes.
#include <algorithm>
#include <utility>

#include "sanitize.hpp"

namespace halfstep {
namespace {

constexpr double fp32_max = 3.4028234663852886e38;

struct Element {
  const char* name;
  int bits, mantissa, bias, emax;
  float largest;
  std::uint32_t max_code;
  bool has_inf;
};

constexpr Element elements[] = {
    {"e4m3fn", 8, 3, 7, 8, 448, 0x7E, false},   {"e5m2", 8, 2, 15, 15, 57344, 0x7B, true},
    {"e3m2", 6, 2, 3, 4, 28, 0x1F, false},      {"e2m3", 6, 3, 1, 2, 7.5, 0x1F, false},
    {"e2m1", 4, 1, 1, 2, 6, 0x7, false},        {"e4m2", 7, 2, 7, 8, 448, 0x3F, false},
    {"int8", 8, -1, 0, 0, 127.0f / 64, 0, false}, {"int5", 5, -1, 0, 0, 15.0f / 8, 0, false},
    {"int3", 3, -1, 0, 0, 3.0f / 2, 0, false}};

BlockPlan plan_of(const Element& it, bool by_amax, bool narrow) {
  BlockPlan plan{};
  const bool fixed = it.mantissa < 0;
  const int quantum = fixed ? 2 - it.bits : 1 - it.bias - it.mantissa;
  plan.element = float_grid(fixed ? 23 : it.mantissa, quantum, it.largest);
  plan.element.overflow_up = plan.element.infinity_up = it.largest;
  plan.element.overflow_down = plan.element.infinity_down = -it.largest;
  plan.element.negative_zero = !fixed;
  plan.element_bits = it.bits;
  plan.element_bias = it.bias;
  plan.element_is_fixed = fixed;
  plan.element_has_inf = it.has_inf;
  plan.max_magnitude_code = it.max_code;
  plan.by_amax = by_amax;
  plan.exponent = it.emax;
  plan.carry_from = 1u << 23;
  plan.largest = it.largest;
  plan.least_scale = by_amax ? 0x1p-9f : 0x1p-127f;
  plan.most_scale = by_amax ? 448.0f : 0x1p127f;
  plan.scale = by_amax ? float_grid(3, -9, 448) : float_grid(23, -149, fp32_max);
  plan.scale_is_byte = true;
  plan.tensor_scale = 1;
  plan.carrier = narrow ? float_grid(7, -133, 3.3895313892515355e38) : float_grid(23, -149, fp32_max);
  return plan;
}

std::size_t over(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// As in bindings_blocks.cpp.
std::size_t turns_of(const BlockLayout& it) {
  const std::size_t along = over(it.columns, it.block_columns);
  if (it.down) return it.outer * along * over(it.down, 512);
  const std::size_t together = std::max<std::size_t>(1, 2048 / it.block_columns);
  return it.outer * over(it.rows, it.block_rows) * over(along, together);
}

bool one(const Element& element, const BlockLayout& it, Rounding rounding, bool by_amax, bool bf16,
         bool special) {
  const BlockPlan plan = plan_of(element, by_amax, bf16);
  const std::size_t lines = it.down ? it.down : it.rows, n = it.outer * it.columns * lines;
  const std::size_t along = over(it.columns, it.block_columns);
  const std::size_t blocks = it.outer * along * (it.down ? it.down : over(it.rows, it.block_rows));
  const std::size_t packed = it.outer * lines * over(it.columns * std::size_t(element.bits), 8);
  const std::vector<float> x = random_numbers(n, std::uint32_t(n) + 7, special);
  std::vector<std::uint16_t> words(bf16 ? n : 0);
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::uint32_t word;
    std::memcpy(&word, &x[i], 4);
    words[i] = std::uint16_t(word >> 16);
  }
  const void* numbers = bf16 ? static_cast<const void*>(words.data()) : x.data();
  const Carrier carrier = bf16 ? Carrier::bfloat16 : Carrier::float32;
  std::vector<float> table(256);
  for (int i = 0; i < 256; ++i) table[std::size_t(i)] = i == 255 ? NAN : std::ldexp(1.0f, i % 64 - 32);
  const std::size_t turns = turns_of(it);
  std::vector<std::uint8_t> first_values, first_scales;
  std::vector<std::uint16_t> first_words;
  std::vector<float> first_out, first_back;
  for (const Kernels* kernels : available_kernels()) {
    std::vector<std::uint8_t> values(packed), scales(blocks), again(blocks);
    std::vector<float> out(bf16 ? 0 : n), back(n);
    std::vector<std::uint16_t> out_words(bf16 ? n : 0);
    void* target = bf16 ? static_cast<void*>(out_words.data()) : out.data();
    const Key key{1, 2};
    BlockArrays arrays{numbers, carrier, nullptr, values.data(), scales.data(), nullptr, nullptr, false};
    for (std::size_t turn = 0; turn < turns; ++turn)
      kernels->quantize_blocks(plan, it, arrays, turn, turn + 1, rounding, key);
    for (const bool stream : {false, true}) {
      const BlockArrays fused{numbers, carrier, target, nullptr, again.data(), nullptr, nullptr, stream};
      kernels->quantize_blocks(plan, it, fused, 0, turns, rounding, key);
    }
    for (const bool stream : {false, true}) {
      const BlockArrays stored{nullptr,       Carrier::float32, back.data(),  values.data(),
                               scales.data(), nullptr,          table.data(), stream};
      kernels->dequantize_blocks(plan, it, stored, 0, turns);
    }
    if (first_back.empty() && n > 0) {
      first_values = values, first_scales = scales, first_words = out_words;
      first_out = out, first_back = back;
    }
    if (again != scales || values != first_values || scales != first_scales ||
        out_words != first_words || !same_numbers(out, first_out) || !same_numbers(back, first_back)) {
      std::printf("%s differs: blocks %zu x %zu of %s, %zu x %zu x %zu down %zu, rounding %d%s\n",
                  kernels->name, it.block_rows, it.block_columns, element.name, it.outer, it.rows,
                  it.columns, it.down, int(rounding), by_amax ? ", amax" : "");
      return false;
    }
  }
  return true;
}

// Any bytes are codes.
bool decodes_any_byte(const Element& element, std::size_t n) {
  const BlockPlan plan = plan_of(element, false, false);
  const BlockLayout it{1, 1, n, 0, 1, 32};
  std::vector<unsigned char> values = random_bytes(over(n * std::size_t(element.bits), 8), 5);
  std::vector<unsigned char> scales = random_bytes(over(n, 32), 6);
  std::vector<float> table(256, 0.5f), first;
  for (const Kernels* kernels : available_kernels()) {
    std::vector<float> back(n);
    kernels->dequantize_blocks(plan, it,
                               {nullptr, Carrier::float32, back.data(), values.data(), scales.data(),
                                nullptr, table.data(), false},
                               0, turns_of(it));
    if (first.empty()) first = back;
    if (!same_numbers(back, first)) {
      std::printf("%s decodes %s differently\n", kernels->name, element.name);
      return false;
    }
  }
  return true;
}

bool finds_tops(std::size_t n, std::size_t size) {
  const std::vector<float> x = random_numbers(n, 9, n % 2 == 1);
  std::vector<std::uint32_t> first;
  std::uint32_t first_top = 0;
  for (const Kernels* kernels : available_kernels()) {
    std::vector<std::uint32_t> tops(over(n, size));
    const std::uint32_t top = kernels->top_magnitude(x.data(), n, Carrier::float32, size, tops.data());
    if (top != kernels->top_magnitude(x.data(), n, Carrier::float32, size, nullptr)) return false;
    if (first.empty()) first = tops, first_top = top;
    if (tops != first || top != first_top) return false;
  }
  return true;
}

}  // namespace

bool blocks_are_safe() {
  bool fine = true;
  const BlockLayout layouts[] = {
      {1, 1, 32, 0, 1, 32},    {1, 1, 4096, 0, 1, 16},  {1, 1, 64, 0, 1, 8},    {1, 3, 56, 0, 1, 24},
      {1, 5, 33, 0, 1, 32},    {1, 2, 1, 0, 1, 1},      {1, 2, 7, 0, 1, 7},     {1, 1, 2080, 0, 1, 32},
      {1, 1, 5000, 0, 1, 5000}, {2, 5, 40, 0, 2, 16},   {1, 130, 136, 0, 128, 128}, {1, 1, 40, 3, 1, 8},
      {2, 1, 33, 5, 1, 32},    {1, 1, 16, 600, 1, 16},  {1, 1, 8, 1, 1, 8},     {1, 2, 96, 0, 1, 48}};
  for (const Element& element : elements) {
    for (const BlockLayout& it : layouts) {
      const bool cut = it.block_columns < it.columns;  // blocks must begin at whole bytes
      if (cut && it.block_columns * std::size_t(element.bits) % 8) continue;
      if (it.block_rows > 1 && it.down) continue;
      for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic, Rounding::up})
        for (const bool by_amax : {false, true})
          for (const bool bf16 : {false, true})
            for (const bool special : {false, true})
              fine = one(element, it, rounding, by_amax, bf16, special) && fine;
    }
    for (const std::size_t n : {1, 15, 16, 31, 32, 33, 64, 100, 2049})
      fine = decodes_any_byte(element, n) && fine;
  }
  for (const std::size_t n : {1, 16, 17, 2048, 2049, 5000}) fine = finds_tops(n, 16) && fine;
  return fine;
}

}  // namespace halfstep
