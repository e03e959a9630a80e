// Sixteen lanes of float32, and eight of float64, in AVX-512 (F, BW, DQ, VL). Members as in lanes_portable.hpp.
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
  static Bits load(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
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
  static Bits minus(Bits a, Bits b) { return _mm512_sub_epi32(a, b); }
  static Bits larger(Bits a, Bits b) { return _mm512_max_epi32(a, b); }
  static Bits shift_left_each(Bits a, Bits n) { return _mm512_sllv_epi32(a, n); }
  static Bits shift_right_each(Bits a, Bits n) { return _mm512_srlv_epi32(a, n); }
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
  static void store_tops(std::uint32_t* p, Bits a, Bits b, Bits c, Bits d) {
    const auto pairs = [](Bits x, Bits y) {
      return _mm512_max_epu32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    };
    const Bits ab = pairs(a, b), cd = pairs(c, d);
    const Bits all = _mm512_max_epu32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  static Float least(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float most(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float over(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float over(Float a, Float b, Float inverse) {
    Float q = _mm512_mul_ps(a, inverse);
    q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, b, a), inverse, q);
    q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, b, a), inverse, q);
    return _mm512_or_ps(q, _mm512_and_ps(a, _mm512_set1_ps(-0.0f)));
  }
  static Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float root(Float a) { return _mm512_sqrt_ps(a); }

  using Words = __m256i;
  static Words load_words(const std::uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_words(std::uint16_t* p, Words w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w);
  }
  static void stream_words(std::uint16_t* p, Words w) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), w);
  }
  static Words pack(Bits a) { return _mm512_cvtepi32_epi16(a); }
  static Bits unpack(Words w) { return _mm512_cvtepu16_epi32(w); }
  static Words halves(Float a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
  static Float of_halves(Words w) { return _mm512_cvtph_ps(w); }

  static Bits load_bytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(std::uint8_t* p, Bits a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static void store_bytes(std::uint8_t* p, Bits a, Bits b, Bits c, Bits d) {
    // packed within quarters, which then change places
    const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, packed));
  }

  static Random counter(std::uint32_t index) {
    const __m512i steps =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_set1_epi32(int(index)), steps);
  }
  static Random xor_set(Random a, std::uint32_t b) { return _mm512_xor_si512(a, set(b)); }
  static Random and_set(Random a, std::uint32_t b) { return _mm512_and_si512(a, set(b)); }
  static Random xor_shift(Random a, int n) {
    return _mm512_xor_si512(a, _mm512_srli_epi32(a, unsigned(n)));
  }
  static Random multiply(Random a, std::uint32_t b) { return _mm512_mullo_epi32(a, set(b)); }
  static Bits top_bits(Random r, int shift) { return shift_right(r, 32 - shift); }
  static Bits top_bits_each(Random r, Bits shift) {
    return shift_right_each(r, minus(set(32), shift));
  }
  static Bits fraction(Bits magnitude, Bits dropped) {
    const Bits significand = or_(_mm512_slli_epi32(magnitude, 8), set(0x80000000u));
    return shift_right_each(significand, minus(dropped, set(24)));
  }
  static Mask carries(Bits fraction, Random r) {
    return _mm512_cmpgt_epu32_mask(fraction, _mm512_xor_si512(r, set(0xFFFFFFFFu)));
  }
};

struct Avx512Lanes64 {
  using word = std::uint64_t;
  using number = double;
  using Bits = __m512i;
  using Float = __m512d;
  using Mask = __mmask8;
  using Random = __m512i;  // 32 bits in the lower half of each lane
  static constexpr int width = 8;
  static constexpr int mantissa_bits = 52;

  static Bits load(const double* p) { return _mm512_loadu_si512(p); }
  static void store(double* p, Bits b) { _mm512_storeu_si512(p, b); }
  static void stream(double* p, Bits b) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), b); }
  static void fence() { _mm_sfence(); }

  static Bits set(std::uint64_t w) { return _mm512_set1_epi64(std::int64_t(w)); }
  static Bits bits(Float f) { return _mm512_castpd_si512(f); }
  static Float number_of(Bits b) { return _mm512_castsi512_pd(b); }
  static Float set_number(double f) { return _mm512_set1_pd(f); }

  static Bits and_(Bits a, Bits b) { return _mm512_and_si512(a, b); }
  static Bits or_(Bits a, Bits b) { return _mm512_or_si512(a, b); }
  static Bits add(Bits a, Bits b) { return _mm512_add_epi64(a, b); }
  static Bits shift_right(Bits a, int n) { return _mm512_srl_epi64(a, _mm_cvtsi32_si128(n)); }
  static Bits minus(Bits a, Bits b) { return _mm512_sub_epi64(a, b); }
  static Bits larger(Bits a, Bits b) { return _mm512_max_epi64(a, b); }
  static Bits shift_left_each(Bits a, Bits n) { return _mm512_sllv_epi64(a, n); }
  static Bits shift_right_each(Bits a, Bits n) { return _mm512_srlv_epi64(a, n); }
  static Mask less(Bits a, Bits b) { return _mm512_cmplt_epi64_mask(a, b); }
  static Bits select(Mask m, Bits yes, Bits no) { return _mm512_mask_blend_epi64(m, no, yes); }

  static Float plus(Float a, Float b) { return _mm512_add_pd(a, b); }
  static Float plus_where(Mask m, Float a, Float b) { return _mm512_mask_add_pd(a, m, a, b); }
  static Float minus(Float a, Float b) { return _mm512_sub_pd(a, b); }
  static Float times(Float a, Float b) { return _mm512_mul_pd(a, b); }
  static Mask below(Float a, Float b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static Mask at_least(Float a, Float b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
  static bool any(Mask m) { return m != 0; }
  static Mask both(Mask a, Mask b) { return Mask(a & b); }
  static Mask not_both(Mask a, Mask b) { return Mask(a & ~b); }
  static Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_pd(m, no, yes); }
  static Float truncate(Float a) {
    return _mm512_roundscale_pd(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }

  static Random counter(std::uint32_t index) {
    return _mm512_add_epi64(set(index), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Random xor_set(Random a, std::uint32_t b) { return _mm512_xor_si512(a, set(b)); }
  static Random and_set(Random a, std::uint32_t b) { return _mm512_and_si512(a, set(b)); }
  static Random xor_shift(Random a, int n) {
    return _mm512_xor_si512(a, _mm512_srli_epi64(a, unsigned(n)));
  }
  static Random multiply(Random a, std::uint32_t b) {
    return and_set(_mm512_mul_epu32(a, set(b)), 0xFFFFFFFFu);
  }
  static Bits top_bits(Random r, int shift) {
    return shift >= 32 ? _mm512_sll_epi64(r, _mm_cvtsi32_si128(shift - 32))
                       : shift_right(r, 32 - shift);
  }
  static Bits top_bits_each(Random r, Bits shift) {
    return or_(shift_left_each(r, minus(shift, set(32))), shift_right_each(r, minus(set(32), shift)));
  }
  static Bits fraction(Bits magnitude, Bits dropped) {
    const Bits hidden = set(std::uint64_t(1) << mantissa_bits);
    const Bits mantissa = and_(magnitude, minus(hidden, set(1)));
    return shift_right_each(or_(mantissa, hidden), minus(dropped, set(32)));
  }
  static Mask carries(Bits fraction, Random r) { return less(set(0xFFFFFFFFu), add(fraction, r)); }
};

}  // namespace
}  // namespace halfstep
