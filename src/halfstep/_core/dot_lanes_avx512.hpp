// Sixteen lanes in AVX-512 for dot_fast.hpp; members as in dot_lanes_avx2.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace halfstep {
namespace {

struct Avx512Dot {
  using Numbers = __m512;
  using Words = __m512i;
  using Flags = __mmask16;
  static constexpr int width = 16;
  static constexpr int most_rows = 8;
  static constexpr bool directed = true;

  static Numbers load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Numbers x) { _mm512_storeu_ps(p, x); }
  static Numbers repeat(const float* p) { return _mm512_set1_ps(*p); }
  static Numbers set(float x) { return _mm512_set1_ps(x); }
  static Words set_word(std::uint32_t w) { return _mm512_set1_epi32(int(w)); }
  static Words words(Numbers x) { return _mm512_castps_si512(x); }
  static Numbers numbers(Words x) { return _mm512_castsi512_ps(x); }

  static Numbers fma(Numbers a, Numbers b, Numbers c) { return _mm512_fmadd_ps(a, b, c); }
  static Numbers minus_product(Numbers a, Numbers b, Numbers c) { return _mm512_fnmadd_ps(a, b, c); }
  static Numbers product_less(Numbers a, Numbers b, Numbers c) { return _mm512_fmsub_ps(a, b, c); }
  static Numbers times(Numbers a, Numbers b) { return _mm512_mul_ps(a, b); }
  static Numbers plus(Numbers a, Numbers b) { return _mm512_add_ps(a, b); }
  static Numbers minus(Numbers a, Numbers b) { return _mm512_sub_ps(a, b); }
  static Numbers larger(Numbers a, Numbers b) { return _mm512_max_ps(a, b); }

  static Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
  static Words and_(Words a, Words b) { return _mm512_and_si512(a, b); }
  static Words or_(Words a, Words b) { return _mm512_or_si512(a, b); }
  static Words and_not(Words a, Words b) { return _mm512_andnot_si512(b, a); }
  static Words xor_(Words a, Words b) { return _mm512_xor_si512(a, b); }
  static Words multiply(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
  static void store_words(std::uint32_t* p, Words a) { _mm512_storeu_si512(p, a); }
  static Words load_words(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  static Words shift_right(Words a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static Words signs(Words a) { return _mm512_srai_epi32(a, 31); }

  static Flags equal(Words a, Words b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static Flags above(Numbers a, Numbers b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Flags same(Numbers a, Numbers b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Flags differ(Numbers a, Numbers b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
  static Flags either(Flags a, Flags b) { return Flags(a | b); }
  static Flags both(Flags a, Flags b) { return Flags(a & b); }
  static Flags not_both(Flags a, Flags b) { return Flags(a & ~b); }
  static unsigned lanes(Flags a) { return unsigned(a); }
  static Words mark(Words a, Flags f) { return _mm512_mask_mov_epi32(a, f, _mm512_set1_epi32(-1)); }
  static Words where(Flags f, Words x) { return _mm512_maskz_mov_epi32(f, x); }  // zero elsewhere
  static Words select(Flags f, Words yes, Words no) { return _mm512_mask_blend_epi32(f, no, yes); }

  // Of dot_steps_directed.hpp.
  static Numbers fma_down(Numbers a, Numbers b, Numbers c) {
    return _mm512_fmadd_round_ps(a, b, c, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static Numbers fma_up(Numbers a, Numbers b, Numbers c) {
    return _mm512_fmadd_round_ps(a, b, c, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  }
  // With one number of memory in all lanes, which costs no operation of its own here; the compiler would load it
  // once for several.
  static Numbers times_one(const float* a, Numbers b) {
    Numbers product;
    __asm__("vmulps %2%{1to16%}, %1, %0" : "=v"(product) : "v"(b), "m"(*a));
    return product;
  }
  static Numbers fma_one(const float* a, Numbers b, Numbers c) {
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
  static Numbers product_one_less(const float* a, Numbers b, Numbers c) {
    __asm__("vfmsub231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
  static Numbers farther(Numbers a, Numbers b) { return _mm512_range_ps(a, b, 0x3); }  // from zero; signed as a
  static Numbers choose(Flags f, Numbers yes, Numbers no) { return _mm512_mask_blend_ps(f, no, yes); }
  static Words signed_as(Words a, Words b, Words sign) { return _mm512_ternarylogic_epi32(a, b, sign, 0xF8); }  // a | (b & sign)
  static Words least_word(Words a, Words b) { return _mm512_min_epu32(a, b); }
  static std::uint32_t least_of(Words a) { return _mm512_reduce_min_epu32(a); }
  static Flags share(Words a, Words b) { return _mm512_test_epi32_mask(a, b); }  // a and b is not zero
  static Flags share_none(Words a, Words b) { return _mm512_testn_epi32_mask(a, b); }
  static Flags also_share(Flags f, Words a, Words b) { return _mm512_mask_test_epi32_mask(f, a, b); }
  static Flags all() { return 0xFFFF; }
  static bool is_all(Flags f) { return _kortestc_mask16_u8(f, f) != 0; }
};

}  // namespace
}  // namespace halfstep
