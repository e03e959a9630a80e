// Optimizer steps under the sanitizers: every instruction set, dtype and branch, on arrays without an
// element to spare.
#include "sanitize.hpp"

namespace halfstep {
namespace {

constexpr Carrier floats[] = {Carrier::float32, Carrier::float16, Carrier::bfloat16};

// What one step reads and writes; the gradient is finite in every carrier.
struct State {
  State(std::size_t n, Carrier gradient_carrier)
      : gradient(random_bytes(n * bytes_of(gradient_carrier), 1)),
        weight(random_numbers(n, 2)),
        mean(random_numbers(n, 3)),
        square(random_numbers(n, 4)),
        copy(n) {
    for (float& number : square) number = std::fabs(number);
    const std::size_t size = bytes_of(gradient_carrier);
    for (std::size_t i = size - 1; i < gradient.size(); i += size) gradient[i] &= 0xBF;
  }

  StepArrays arrays(Carrier gradient_carrier, const Carrier* copy_carrier, bool has_mean) {
    return {gradient.data(), gradient_carrier, weight.data(), has_mean ? mean.data() : nullptr, square.data(),
            copy_carrier ? copy.data() : nullptr, copy_carrier ? *copy_carrier : Carrier::float16, 0.5f, -0.25f};
  }

  bool operator==(const State& other) const {
    return same_numbers(weight, other.weight) && same_numbers(mean, other.mean) &&
           same_numbers(square, other.square) && copy == other.copy;
  }

  std::vector<unsigned char> gradient;
  std::vector<float> weight, mean, square;
  std::vector<std::uint16_t> copy;
};

// `step(kernels, arrays, stream)` in every instruction set, from the same state.
template <class Step>
bool steps_alike(const char* name, std::size_t n, Carrier carrier, const Carrier* copy, bool has_mean, Step step) {
  State first(n, carrier);
  bool any = false;
  for (const Kernels* kernels : available_kernels())
    for (const bool stream : {false, true}) {
      State state(n, carrier);
      step(*kernels, state.arrays(carrier, copy, has_mean), stream);
      if (!any) first = state;
      any = true;
      if (state == first) continue;
      std::printf("%s steps differently: %s, %zu elements, gradient %d\n", kernels->name, name, n, int(carrier));
      return false;
    }
  return true;
}

}  // namespace

bool steps_are_safe() {
  bool fine = true;
  for (const std::size_t n : {0, 1, 7, 8, 15, 16, 17, 63, 200})
    for (const Carrier carrier : floats)
      for (const Carrier* copy : {(const Carrier*)nullptr, floats + 1, floats + 2})
        for (int branch = 0; branch < 8; ++branch) {
          const bool a = branch & 1, b = branch & 2, c = branch & 4;
          const AdamRule adam{a ? 8.0f : 1.0f, b, c, 0.125f, c ? 1.0f : 0.75f, a ? 0.25f : 0.75f, 0.5f, 0.5f, 0x1p-10f};
          fine = steps_alike("adam", n, carrier, copy, true, [&](const Kernels& k, const StepArrays& arrays, bool stream) {
            k.adam(adam, arrays, 0, n, stream);
          }) && fine;
          for (const bool has_mean : {false, true}) {
            const SgdRule sgd{a ? 8.0f : 1.0f, b, c, 0.125f, a, has_mean && b, has_mean ? 0.5f : 0.0f, 0.75f, -0.25f};
            fine = steps_alike("sgd", n, carrier, copy, has_mean, [&](const Kernels& k, const StepArrays& arrays, bool stream) {
              k.sgd(sgd, arrays, 0, n, stream);
            }) && fine;
          }
        }
  return fine;
}

}  // namespace halfstep
