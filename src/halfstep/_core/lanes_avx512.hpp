// Sixteen lanes in AVX-512 (F, BW, DQ, VL). Members as in lanes_portable.hpp.
#pragma once

#include <immintrin.h>

#include "types.hpp"

namespace halfstep {
namespace {

struct Avx512Lanes {
  using word = std::uint32_t;
  using number = float;
  using Bits = __m512i;
  using Float = __m512;
  using Mask = __mmask16;
  using Random = __m512i;
  static constexpr int width = 16;
  static constexpr int mantissa_bits = 23;

  static Bits load(const float* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, Bits b) { _mm512_storeu_si512(p, b); }
  static void stream(float* p, Bits b) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), b); }
  static void fence() { _mm_sfence(); }

  static Bits set(std::uint32_t w) { return _mm512_set1_epi32(int(w)); }
  static Bits bits(Float f) { return _mm512_castps_si512(f); }
  static Float number_of(Bits b) { return _mm512_castsi512_ps(b); }
  static Float set_number(float f) { return _mm512_set1_ps(f); }

  static Bits and_(Bits a, Bits b) { return _mm512_and_si512(a, b); }
  static Bits or_(Bits a, Bits b) { return _mm512_or_si512(a, b); }
  static Bits add(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
  static Bits shift_right(Bits a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static Mask less(Bits a, Bits b) { return _mm512_cmplt_epi32_mask(a, b); }
  static Bits select(Mask m, Bits yes, Bits no) { return _mm512_mask_blend_epi32(m, no, yes); }

  static Float plus(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float plus_where(Mask m, Float a, Float b) { return _mm512_mask_add_ps(a, m, a, b); }
  static Float minus(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float times(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Mask below(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static bool any(Mask m) { return m != 0; }
  static Mask both(Mask a, Mask b) { return Mask(a & b); }
  static Mask not_both(Mask a, Mask b) { return Mask(a & ~b); }
  static Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }
  static Float truncate(Float a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }

  static Bits shift_left(Bits a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  static Bits max_words(Bits a, Bits b) { return _mm512_max_epu32(a, b); }
  static std::uint32_t top_word(Bits a) { return _mm512_reduce_max_epu32(a); }
  static Float least(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float most(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float over(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Bits load_bytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(std::uint8_t* p, Bits a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }

  static Random counter(std::uint32_t index) {
    const __m512i steps =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_set1_epi32(int(index)), steps);
  }
  static Random xor_set(Random a, std::uint32_t b) { return _mm512_xor_si512(a, set(b)); }
  static Random xor_shift(Random a, int n) {
    return _mm512_xor_si512(a, _mm512_srli_epi32(a, unsigned(n)));
  }
  static Random multiply(Random a, std::uint32_t b) { return _mm512_mullo_epi32(a, set(b)); }
  static Bits top_bits(Random r, int shift) { return shift_right(r, 32 - shift); }
  static Mask carries(Float rest, Random r) {
    const Bits fraction = _mm512_cvttps_epu32(times(rest, set_number(4294967296.0f)));
    return _mm512_cmpgt_epu32_mask(fraction, _mm512_xor_si512(r, set(0xFFFFFFFFu)));
  }
};

}  // namespace
}  // namespace halfstep
