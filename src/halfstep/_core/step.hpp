// A step of Adam or SGD: gradient, weight, moments and the next 16-bit copy of the weight in one pass over
// memory. The order of the operations and where two of them round once are those of torch's fused kernels
// for CPUs, in vectors. Twin of halfstep/ops/step_reference.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lanes_portable.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

template <class L>
typename L::Float load_number(const float* p) {
  return L::number_of(L::load(p));
}

template <class L>
void store_number(float* p, typename L::Float f) {
  L::store(p, L::bits(f));
}

template <class L, Carrier carrier>
typename L::Float load_gradient(const void* x, std::size_t i) {
  if constexpr (carrier == Carrier::float32) return load_number<L>(static_cast<const float*>(x) + i);
  const auto words = L::load_words(static_cast<const std::uint16_t*>(x) + i);
  if constexpr (carrier == Carrier::float16) return L::of_halves(words);
  return L::number_of(L::shift_left(L::unpack(words), 16));
}

template <class L>
typename L::Words brains(typename L::Float f) {  // to nearest
  const auto bits = L::bits(f);
  const auto upper = L::shift_right(bits, 16);
  const auto odd = L::and_(upper, L::set(1));
  const auto rounded = L::shift_right(L::add(bits, L::add(odd, L::set(0x7FFF))), 16);
  const auto nan = L::less(L::set(0x7F800000u), L::and_(bits, L::set(0x7FFFFFFFu)));
  return L::pack(L::select(nan, L::or_(upper, L::set(0x40)), rounded));
}

// Carrier::float32 stands for no copy.
template <class L, Carrier carrier>
void store_copy(std::uint16_t* p, typename L::Float f, bool stream) {
  if constexpr (carrier != Carrier::float32) {
    typename L::Words words;
    if constexpr (carrier == Carrier::float16)
      words = L::halves(f);
    else
      words = brains<L>(f);
    if (stream)
      L::stream_words(p, words);
    else
      L::store_words(p, words);
  }
}

// The gradient as the step takes it: over the scale, of the sign that descends, with the penalty.
template <class L, Carrier carrier, class Rule>
struct Gradient {
  explicit Gradient(const Rule& rule)
      : rule(rule), scale(L::set_number(rule.scale)), penalty(L::set_number(rule.penalty)) {}

  typename L::Float operator()(const void* x, std::size_t i, typename L::Float weight) const {
    auto g = load_gradient<L, carrier>(x, i);
    if (rule.scale != 1.0f) g = L::over(g, scale);
    if (rule.maximize) g = L::times(g, L::set_number(-1.0f));
    if (rule.penalizes) g = L::fused(weight, penalty, g);
    return g;
  }

  const Rule& rule;
  const typename L::Float scale, penalty;
};

// Elements from i on while there are as many as lanes; returns where it stopped.
template <class L, Carrier gradients, Carrier copies>
std::size_t adam_lanes(const AdamRule& rule, const StepArrays& a, std::size_t i, std::size_t end,
                       bool stream) {
  const Gradient<L, gradients, AdamRule> gradient(rule);
  const auto decay = L::set_number(rule.decay), moment = L::set_number(rule.moment),
             rest = L::set_number(rule.moment - 1.0f), beta2 = L::set_number(rule.beta2),
             square = L::set_number(rule.square), eps = L::set_number(rule.eps),
             root = L::set_number(a.root), step = L::set_number(a.step);
  const bool small = rule.moment < 0.5f;
  for (; i + L::width <= end; i += L::width) {
    auto w = load_number<L>(a.weight + i);
    const auto g = gradient(a.gradient, i, w);
    auto m = load_number<L>(a.mean + i);
    auto v = load_number<L>(a.square + i);
    if (rule.decay != 1.0f) w = L::times(w, decay);
    const auto ahead = L::minus(g, m);  // lerp: from the end that is nearer
    m = small ? L::fused(moment, ahead, m) : L::fused(rest, ahead, g);
    v = L::fused(L::times(square, g), g, L::times(v, beta2));
    const auto below = L::plus(L::over(L::root(v), root), eps);
    w = L::plus(w, L::over(L::times(step, m), below));
    store_number<L>(a.weight + i, w);
    store_number<L>(a.mean + i, m);
    store_number<L>(a.square + i, v);
    store_copy<L, copies>(a.copy + i, w, stream);
  }
  return i;
}

template <class L, Carrier gradients, Carrier copies>
std::size_t sgd_lanes(const SgdRule& rule, const StepArrays& a, std::size_t i, std::size_t end,
                      bool stream) {
  const Gradient<L, gradients, SgdRule> gradient(rule);
  const auto momentum = L::set_number(rule.momentum), gain = L::set_number(rule.gain),
             step = L::set_number(rule.step);
  for (; i + L::width <= end; i += L::width) {
    const auto w = load_number<L>(a.weight + i);
    auto g = gradient(a.gradient, i, w);
    if (a.mean != nullptr) {
      auto m = g;
      if (!rule.fresh) m = L::fused(g, gain, L::times(load_number<L>(a.mean + i), momentum));
      store_number<L>(a.mean + i, m);
      g = rule.nesterov ? L::fused(m, momentum, g) : m;
    }
    const auto moved = L::fused(g, step, w);
    store_number<L>(a.weight + i, moved);
    store_copy<L, copies>(a.copy + i, moved, stream);
  }
  return i;
}

// run(gradients, copies) with both carriers as types
template <Carrier carrier>
struct Carried {
  static constexpr Carrier value = carrier;
};

template <class F>
void with_carriers(const StepArrays& a, const F& run) {
  const auto of_gradient = [&](auto copies) {
    switch (a.gradient_carrier) {
      case Carrier::float16: return run(Carried<Carrier::float16>(), copies);
      case Carrier::bfloat16: return run(Carried<Carrier::bfloat16>(), copies);
      default: return run(Carried<Carrier::float32>(), copies);
    }
  };
  if (a.copy == nullptr) return of_gradient(Carried<Carrier::float32>());
  if (a.copy_carrier == Carrier::float16) return of_gradient(Carried<Carrier::float16>());
  return of_gradient(Carried<Carrier::bfloat16>());
}

// Whether copies may go past the caches: vectors are written where they are aligned.
template <class L>
bool streams(const StepArrays& a, std::size_t begin, bool stream) {
  return stream && reinterpret_cast<std::uintptr_t>(a.copy + begin) % sizeof(typename L::Words) == 0;
}

template <class L>
void adam(const AdamRule& rule, const StepArrays& a, std::size_t begin, std::size_t end, bool stream) {
  with_carriers(a, [&](auto gradients, auto copies) {
    constexpr Carrier g = decltype(gradients)::value, c = decltype(copies)::value;
    const std::size_t i = adam_lanes<L, g, c>(rule, a, begin, end, streams<L>(a, begin, stream));
    adam_lanes<Portable32, g, c>(rule, a, i, end, false);
  });
  L::fence();
}

template <class L>
void sgd(const SgdRule& rule, const StepArrays& a, std::size_t begin, std::size_t end, bool stream) {
  with_carriers(a, [&](auto gradients, auto copies) {
    constexpr Carrier g = decltype(gradients)::value, c = decltype(copies)::value;
    const std::size_t i = sgd_lanes<L, g, c>(rule, a, begin, end, streams<L>(a, begin, stream));
    sgd_lanes<Portable32, g, c>(rule, a, i, end, false);
  });
  L::fence();
}

// The same arrays with one addition each: the memory's share of a step, for benchmarks.
template <class L>
void touch(const StepArrays& a, std::size_t begin, std::size_t end, bool stream) {
  const bool past = streams<L>(a, begin, stream);
  for (std::size_t i = begin; i + L::width <= end; i += L::width) {
    const auto g = load_number<L>(static_cast<const float*>(a.gradient) + i);
    const auto w = L::plus(load_number<L>(a.weight + i), g);
    store_number<L>(a.weight + i, w);
    store_number<L>(a.mean + i, L::plus(load_number<L>(a.mean + i), g));
    if (a.square != nullptr)
      store_number<L>(a.square + i, L::plus(load_number<L>(a.square + i), g));
    const auto words = L::pack(L::shift_right(L::bits(w), 16));
    if (past)
      L::stream_words(a.copy + i, words);
    else
      L::store_words(a.copy + i, words);
  }
  L::fence();
}

}  // namespace
}  // namespace halfstep
