// The edge to Python of step.hpp; arguments are checked in halfstep/ops/native_step.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "types.hpp"

namespace nb = nanobind;
using namespace halfstep;

void bind_step(nb::module_& m);

namespace {

using Addresses = std::vector<std::uintptr_t>;

// All arrays of one step. Lists that are empty stand for arrays that there are none of.
std::vector<StepArrays> tabulate(const Addresses& weights, const Addresses& gradients,
                                 const std::vector<int>& gradient_carriers, const Addresses& means,
                                 const Addresses& squares, const Addresses& copies,
                                 const std::vector<int>& copy_carriers,
                                 const std::vector<float>& roots, const std::vector<float>& steps) {
  const auto at = [](const Addresses& list, std::size_t i) {
    return list.empty() ? std::uintptr_t(0) : list[i];
  };
  std::vector<StepArrays> all;
  for (std::size_t i = 0; i < weights.size(); ++i)
    all.push_back({reinterpret_cast<const void*>(gradients[i]), Carrier(gradient_carriers[i]),
                   reinterpret_cast<float*>(weights[i]), reinterpret_cast<float*>(at(means, i)),
                   reinterpret_cast<float*>(at(squares, i)),
                   reinterpret_cast<std::uint16_t*>(at(copies, i)),
                   copies.empty() ? Carrier::float32 : Carrier(copy_carriers[i]),
                   roots.empty() ? 1.0f : roots[i], steps.empty() ? 0.0f : steps[i]});
  return all;
}

// f(arrays, begin, end, stream) over all of them.
template <class F>
void run(const std::vector<StepArrays>& all, const std::vector<std::size_t>& sizes, int threads,
         const F& f) {
  std::size_t total = 0;
  for (const std::size_t size : sizes) total += size;
  const bool stream = total * sizeof(std::uint16_t) >= stream_from;
  over_arrays(sizes, threads, [&](std::size_t array, std::size_t begin, std::size_t end) {
    f(all[array], begin, end, stream);
  });
}

void adam(const AdamRule& rule, const Addresses& weights, const Addresses& gradients,
          const std::vector<int>& gradient_carriers, const Addresses& means,
          const Addresses& squares, const Addresses& copies, const std::vector<int>& copy_carriers,
          const std::vector<std::size_t>& sizes, const std::vector<float>& roots,
          const std::vector<float>& steps, int threads) {
  const auto all = tabulate(weights, gradients, gradient_carriers, means, squares, copies,
                            copy_carriers, roots, steps);
  const Kernels* kernels = kernels_in_use();
  run(all, sizes, threads,
      [&](const StepArrays& a, std::size_t begin, std::size_t end, bool stream) {
        kernels->adam(rule, a, begin, end, stream);
      });
}

void sgd(const SgdRule& rule, const Addresses& weights, const Addresses& gradients,
         const std::vector<int>& gradient_carriers, const Addresses& means, const Addresses& copies,
         const std::vector<int>& copy_carriers, const std::vector<std::size_t>& sizes, int threads) {
  const auto all =
      tabulate(weights, gradients, gradient_carriers, means, {}, copies, copy_carriers, {}, {});
  const Kernels* kernels = kernels_in_use();
  run(all, sizes, threads,
      [&](const StepArrays& a, std::size_t begin, std::size_t end, bool stream) {
        kernels->sgd(rule, a, begin, end, stream);
      });
}

void touch(const Addresses& weights, const Addresses& gradients, const Addresses& means,
           const Addresses& squares, const Addresses& copies, const std::vector<std::size_t>& sizes,
           int threads) {
  const std::vector<int> floats(weights.size(), int(Carrier::float32));
  const auto all = tabulate(weights, gradients, floats, means, squares, copies, floats, {}, {});
  const Kernels* kernels = kernels_in_use();
  run(all, sizes, threads,
      [&](const StepArrays& a, std::size_t begin, std::size_t end, bool stream) {
        kernels->touch(a, begin, end, stream);
      });
}

// Whether no array that is written shares a byte with another one.
bool disjoint(const Addresses& written, const std::vector<std::size_t>& written_bytes,
              const Addresses& read, const std::vector<std::size_t>& read_bytes) {
  struct Span {
    std::uintptr_t begin, end;
    bool written;
  };
  std::vector<Span> spans;
  const auto take = [&](const Addresses& from, const std::vector<std::size_t>& bytes, bool writes) {
    for (std::size_t i = 0; i < from.size(); ++i)
      if (bytes[i] > 0) spans.push_back({from[i], from[i] + bytes[i], writes});
  };
  take(written, written_bytes, true);
  take(read, read_bytes, false);
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::uintptr_t any = 0, writes = 0;  // where what was seen ends
  for (const Span& span : spans) {
    if (span.begin < (span.written ? any : writes)) return false;
    any = std::max(any, span.end);
    if (span.written) writes = std::max(writes, span.end);
  }
  return true;
}

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<AdamRule>(m, "AdamRule", "What a step of Adam does to each element; see types.hpp.")
      .def(
          "__init__",
          [](AdamRule* self, float scale, bool maximize, bool penalizes, float penalty, float decay,
             float moment, float beta2, float square, float eps) {
            new (self) AdamRule{scale,  maximize, penalizes, penalty, decay,
                                moment, beta2,    square,    eps};
          },
          nb::kw_only(), nb::arg("scale"), nb::arg("maximize"), nb::arg("penalizes"),
          nb::arg("penalty"), nb::arg("decay"), nb::arg("moment"), nb::arg("beta2"),
          nb::arg("square"), nb::arg("eps"));
  nb::class_<SgdRule>(m, "SgdRule", "What a step of SGD does to each element; see types.hpp.")
      .def(
          "__init__",
          [](SgdRule* self, float scale, bool maximize, bool penalizes, float penalty, bool fresh,
             bool nesterov, float momentum, float gain, float step) {
            new (self) SgdRule{scale, maximize, penalizes, penalty, fresh,
                               nesterov, momentum, gain, step};
          },
          nb::kw_only(), nb::arg("scale"), nb::arg("maximize"), nb::arg("penalizes"),
          nb::arg("penalty"), nb::arg("fresh"), nb::arg("nesterov"), nb::arg("momentum"),
          nb::arg("gain"), nb::arg("step"));

  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("adam", &adam, nb::kw_only(), nb::arg("rule"), nb::arg("weights"), nb::arg("gradients"),
        nb::arg("gradient_carriers"), nb::arg("means"), nb::arg("squares"), nb::arg("copies"),
        nb::arg("copy_carriers"), nb::arg("sizes"), nb::arg("roots"), nb::arg("steps"),
        nb::arg("threads"), released);
  m.def("sgd", &sgd, nb::kw_only(), nb::arg("rule"), nb::arg("weights"), nb::arg("gradients"),
        nb::arg("gradient_carriers"), nb::arg("means"), nb::arg("copies"), nb::arg("copy_carriers"),
        nb::arg("sizes"), nb::arg("threads"), released);
  m.def("touch", &touch, nb::kw_only(), nb::arg("weights"), nb::arg("gradients"), nb::arg("means"),
        nb::arg("squares"), nb::arg("copies"), nb::arg("sizes"), nb::arg("threads"), released);
  m.def("disjoint", &disjoint, nb::arg("written"), nb::arg("written_bytes"), nb::arg("read"),
        nb::arg("read_bytes"), released);
}
