// Eight lanes in AVX2 for dot_fast.hpp. `Flags` tells lanes apart.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace halfstep {
namespace {

struct Avx2Dot {
  using Numbers = __m256;
  using Words = __m256i;
  using Flags = __m256i;
  static constexpr int width = 8;
  static constexpr int most_rows = 6;  // of sums in registers, two vectors a row
  static constexpr bool directed = false;  // an instruction rounds its own way: dot_steps_directed.hpp

  static Numbers load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Numbers x) { _mm256_storeu_ps(p, x); }
  static Numbers repeat(const float* p) { return _mm256_broadcast_ss(p); }
  static Numbers set(float x) { return _mm256_set1_ps(x); }
  static Words set_word(std::uint32_t w) { return _mm256_set1_epi32(int(w)); }
  static Words words(Numbers x) { return _mm256_castps_si256(x); }
  static Numbers numbers(Words x) { return _mm256_castsi256_ps(x); }

  static Numbers fma(Numbers a, Numbers b, Numbers c) { return _mm256_fmadd_ps(a, b, c); }
  static Numbers minus_product(Numbers a, Numbers b, Numbers c) { return _mm256_fnmadd_ps(a, b, c); }
  static Numbers product_less(Numbers a, Numbers b, Numbers c) { return _mm256_fmsub_ps(a, b, c); }
  static Numbers times(Numbers a, Numbers b) { return _mm256_mul_ps(a, b); }
  static Numbers plus(Numbers a, Numbers b) { return _mm256_add_ps(a, b); }
  static Numbers minus(Numbers a, Numbers b) { return _mm256_sub_ps(a, b); }
  static Numbers larger(Numbers a, Numbers b) { return _mm256_max_ps(a, b); }

  static Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
  static Words and_(Words a, Words b) { return _mm256_and_si256(a, b); }
  static Words or_(Words a, Words b) { return _mm256_or_si256(a, b); }
  static Words and_not(Words a, Words b) { return _mm256_andnot_si256(b, a); }  // a and not b
  static Words xor_(Words a, Words b) { return _mm256_xor_si256(a, b); }
  static Words multiply(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
  static void store_words(std::uint32_t* p, Words a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static Words load_words(const std::uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Words shift_right(Words a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static Words signs(Words a) { return _mm256_srai_epi32(a, 31); }  // all ones where negative

  static Flags equal(Words a, Words b) { return _mm256_cmpeq_epi32(a, b); }
  static Flags above(Numbers a, Numbers b) { return words(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static Flags same(Numbers a, Numbers b) { return words(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
  static Flags differ(Numbers a, Numbers b) { return words(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)); }
  static Flags either(Flags a, Flags b) { return _mm256_or_si256(a, b); }
  static Flags both(Flags a, Flags b) { return _mm256_and_si256(a, b); }
  static Flags not_both(Flags a, Flags b) { return _mm256_andnot_si256(b, a); }  // a and not b
  static unsigned lanes(Flags a) { return unsigned(_mm256_movemask_ps(numbers(a))); }
  static Words mark(Words a, Flags f) { return _mm256_or_si256(a, f); }  // all ones where f
  static Words where(Flags f, Words x) { return _mm256_and_si256(f, x); }  // zero elsewhere
  static Words select(Flags f, Words yes, Words no) { return _mm256_blendv_epi8(no, yes, f); }
};

}  // namespace
}  // namespace halfstep
