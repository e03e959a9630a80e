// Eight lanes of float32, and four of float64, in AVX2. Members as in lanes_portable.hpp; a mask is a vector of all ones or zeros.
#pragma once

#include <immintrin.h>

#include "types.hpp"

namespace halfstep {
namespace {

struct Avx2Lanes {
  using word = std::uint32_t;
  using number = float;
  using Bits = __m256i;
  using Float = __m256;
  struct Mask {
    __m256i m;
  };
  using Random = __m256i;
  static constexpr int width = 8;
  static constexpr int mantissa_bits = 23;

  static Bits load(const std::uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Bits load(const float* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(float* p, Bits b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b); }
  static void stream(float* p, Bits b) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), b); }
  static void fence() { _mm_sfence(); }

  static Bits set(std::uint32_t w) { return _mm256_set1_epi32(int(w)); }
  static Bits bits(Float f) { return _mm256_castps_si256(f); }
  static Float number_of(Bits b) { return _mm256_castsi256_ps(b); }
  static Float set_number(float f) { return _mm256_set1_ps(f); }

  static Bits and_(Bits a, Bits b) { return _mm256_and_si256(a, b); }
  static Bits or_(Bits a, Bits b) { return _mm256_or_si256(a, b); }
  static Bits add(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
  static Bits shift_right(Bits a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static Bits minus(Bits a, Bits b) { return _mm256_sub_epi32(a, b); }
  static Bits larger(Bits a, Bits b) { return _mm256_max_epi32(a, b); }
  static Bits shift_left_each(Bits a, Bits n) { return _mm256_sllv_epi32(a, n); }
  static Bits shift_right_each(Bits a, Bits n) { return _mm256_srlv_epi32(a, n); }
  static Mask less(Bits a, Bits b) { return {_mm256_cmpgt_epi32(b, a)}; }
  static Bits select(Mask m, Bits yes, Bits no) { return _mm256_blendv_epi8(no, yes, m.m); }

  static Float plus(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float plus_where(Mask m, Float a, Float b) {  // of a that is not -0
    return _mm256_add_ps(a, _mm256_and_ps(number_of(m.m), b));
  }
  static Float minus(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float times(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Mask below(Float a, Float b) { return {bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ))}; }
  static Mask at_least(Float a, Float b) { return {bits(_mm256_cmp_ps(a, b, _CMP_GE_OQ))}; }
  static bool any(Mask m) { return _mm256_movemask_epi8(m.m) != 0; }
  static Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.m, b.m)}; }
  static Mask not_both(Mask a, Mask b) { return {_mm256_andnot_si256(b.m, a.m)}; }
  static Float select(Mask m, Float yes, Float no) {
    return _mm256_blendv_ps(no, yes, number_of(m.m));
  }
  static Float truncate(Float a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }

  static Bits shift_left(Bits a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  static Bits max_words(Bits a, Bits b) { return _mm256_max_epu32(a, b); }
  static std::uint32_t top_word(Bits a) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return std::uint32_t(_mm_cvtsi128_si32(m));
  }
  static void store_tops(std::uint32_t* p, Bits a, Bits b, Bits c, Bits d) {
    const auto pairs = [](Bits x, Bits y) {
      return _mm256_max_epu32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
    };
    const Bits ab = pairs(a, b), cd = pairs(c, d);
    const Bits all = _mm256_max_epu32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  }
  static Float least(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float most(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float over(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float over(Float a, Float b, Float inverse) {
    Float q = _mm256_mul_ps(a, inverse);
    q = _mm256_fmadd_ps(_mm256_fnmadd_ps(q, b, a), inverse, q);
    q = _mm256_fmadd_ps(_mm256_fnmadd_ps(q, b, a), inverse, q);
    return _mm256_or_ps(q, _mm256_and_ps(a, _mm256_set1_ps(-0.0f)));
  }
  static Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float root(Float a) { return _mm256_sqrt_ps(a); }

  using Words = __m128i;
  static Words load_words(const std::uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static void store_words(std::uint16_t* p, Words w) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), w);
  }
  static void stream_words(std::uint16_t* p, Words w) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), w);
  }
  static Words pack(Bits a) {
    return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  }
  static Bits unpack(Words w) { return _mm256_cvtepu16_epi32(w); }
  static Words halves(Float a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
  static Float of_halves(Words w) { return _mm256_cvtph_ps(w); }

  static Bits load_bytes(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(std::uint8_t* p, Bits a) {
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
  }
  static void store_bytes(std::uint8_t* p, Bits a, Bits b, Bits c, Bits d) {
    const __m256i mixed = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_permutevar8x32_epi32(mixed, order));
  }

  static Random counter(std::uint32_t index) {
    return _mm256_add_epi32(set(index), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Random xor_set(Random a, std::uint32_t b) { return _mm256_xor_si256(a, set(b)); }
  static Random and_set(Random a, std::uint32_t b) { return _mm256_and_si256(a, set(b)); }
  static Random xor_shift(Random a, int n) {
    return _mm256_xor_si256(a, _mm256_srli_epi32(a, n));
  }
  static Random multiply(Random a, std::uint32_t b) { return _mm256_mullo_epi32(a, set(b)); }
  static Bits top_bits(Random r, int shift) { return shift_right(r, 32 - shift); }
  static Bits top_bits_each(Random r, Bits shift) {
    return shift_right_each(r, minus(set(32), shift));
  }
  static Bits fraction(Bits magnitude, Bits dropped) {
    const Bits significand = or_(_mm256_slli_epi32(magnitude, 8), set(0x80000000u));
    return shift_right_each(significand, minus(dropped, set(24)));
  }
  static Mask carries(Bits fraction, Random r) {
    // fraction > ~r, unsigned: flip the sign bits and compare signed
    const Bits limit = _mm256_xor_si256(r, set(0x7FFFFFFFu));
    return {_mm256_cmpgt_epi32(_mm256_xor_si256(fraction, set(0x80000000u)), limit)};
  }
};

struct Avx2Lanes64 {
  using word = std::uint64_t;
  using number = double;
  using Bits = __m256i;
  using Float = __m256d;
  using Mask = Avx2Lanes::Mask;
  using Random = __m256i;  // 32 bits in the lower half of each lane
  static constexpr int width = 4;
  static constexpr int mantissa_bits = 52;

  static Bits load(const double* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(double* p, Bits b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b); }
  static void stream(double* p, Bits b) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), b); }
  static void fence() { _mm_sfence(); }

  static Bits set(std::uint64_t w) { return _mm256_set1_epi64x(std::int64_t(w)); }
  static Bits bits(Float f) { return _mm256_castpd_si256(f); }
  static Float number_of(Bits b) { return _mm256_castsi256_pd(b); }
  static Float set_number(double f) { return _mm256_set1_pd(f); }

  static Bits and_(Bits a, Bits b) { return _mm256_and_si256(a, b); }
  static Bits or_(Bits a, Bits b) { return _mm256_or_si256(a, b); }
  static Bits add(Bits a, Bits b) { return _mm256_add_epi64(a, b); }
  static Bits shift_right(Bits a, int n) { return _mm256_srl_epi64(a, _mm_cvtsi32_si128(n)); }
  static Bits minus(Bits a, Bits b) { return _mm256_sub_epi64(a, b); }
  static Bits larger(Bits a, Bits b) { return select(less(a, b), b, a); }
  static Bits shift_left_each(Bits a, Bits n) { return _mm256_sllv_epi64(a, n); }
  static Bits shift_right_each(Bits a, Bits n) { return _mm256_srlv_epi64(a, n); }
  static Mask less(Bits a, Bits b) { return {_mm256_cmpgt_epi64(b, a)}; }
  static Bits select(Mask m, Bits yes, Bits no) { return _mm256_blendv_epi8(no, yes, m.m); }

  static Float plus(Float a, Float b) { return _mm256_add_pd(a, b); }
  static Float plus_where(Mask m, Float a, Float b) {  // of a that is not -0
    return _mm256_add_pd(a, _mm256_and_pd(number_of(m.m), b));
  }
  static Float minus(Float a, Float b) { return _mm256_sub_pd(a, b); }
  static Float times(Float a, Float b) { return _mm256_mul_pd(a, b); }
  static Mask below(Float a, Float b) { return {bits(_mm256_cmp_pd(a, b, _CMP_LT_OQ))}; }
  static Mask at_least(Float a, Float b) { return {bits(_mm256_cmp_pd(a, b, _CMP_GE_OQ))}; }
  static bool any(Mask m) { return _mm256_movemask_epi8(m.m) != 0; }
  static Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.m, b.m)}; }
  static Mask not_both(Mask a, Mask b) { return {_mm256_andnot_si256(b.m, a.m)}; }
  static Float select(Mask m, Float yes, Float no) {
    return _mm256_blendv_pd(no, yes, number_of(m.m));
  }
  static Float truncate(Float a) {
    return _mm256_round_pd(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }

  static Random counter(std::uint32_t index) {
    return _mm256_add_epi64(set(index), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static Random xor_set(Random a, std::uint32_t b) { return _mm256_xor_si256(a, set(b)); }
  static Random and_set(Random a, std::uint32_t b) { return _mm256_and_si256(a, set(b)); }
  static Random xor_shift(Random a, int n) {
    return _mm256_xor_si256(a, _mm256_srli_epi64(a, n));
  }
  static Random multiply(Random a, std::uint32_t b) {
    return and_set(_mm256_mul_epu32(a, set(b)), 0xFFFFFFFFu);
  }
  static Bits top_bits(Random r, int shift) {
    return shift >= 32 ? _mm256_sll_epi64(r, _mm_cvtsi32_si128(shift - 32))
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
