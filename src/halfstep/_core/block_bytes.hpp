// Codes of up to 8 bits, one a byte, as bytes without gaps, and back; the twin of
// halfstep/ops/bit_packing.py.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace halfstep {
namespace {

// The fewest codes that fill whole bytes.
inline std::size_t codes_a_word(std::size_t bits) {
  return bits % 8 == 0 ? 1 : bits % 4 == 0 ? 2 : bits % 2 == 0 ? 4 : 8;
}

// As many of n codes of 4 or 6 bits as fill whole vectors; how many that were.
inline std::size_t pack_vectors(const std::uint8_t* codes, std::size_t n, std::size_t bits,
                                std::uint8_t* to) {
  std::size_t i = 0;
#if defined(__AVX2__)
  const auto load = [&](std::size_t at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at));
  };
  const auto store = [](std::uint8_t* p, __m128i bytes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  };
  if (bits == 4) {
    const __m256i places = _mm256_set1_epi16(0x1001);  // 1 and 2^4
    for (; i + 32 <= n; i += 32) {
      const __m256i pairs = _mm256_maddubs_epi16(load(i), places);
      store(to + i / 2,
            _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
    }
  } else if (bits == 6) {
    const __m256i places = _mm256_set1_epi16(0x4001), pair_places = _mm256_set1_epi32(0x10000001);
    const __m256i three_of_four = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    for (; i + 32 <= n; i += 32) {
      const __m256i pairs = _mm256_maddubs_epi16(load(i), places);
      const __m256i bytes =
          _mm256_shuffle_epi8(_mm256_madd_epi16(pairs, pair_places), three_of_four);
      const __m256i close =
          _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7));
      store(to + i / 4 * 3, _mm256_castsi256_si128(close));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i / 4 * 3 + 16),
                       _mm256_extracti128_si256(close, 1));
    }
  }
#else
  (void)codes, (void)n, (void)bits, (void)to;
#endif
  return i;
}

inline std::size_t unpack_vectors(const std::uint8_t* from, std::size_t n, std::size_t bits,
                                  std::uint8_t* codes) {
  std::size_t i = 0;
#if defined(__AVX2__)
  const auto load = [&](std::size_t at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
  };
  const auto store = [&](__m256i all) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), all);
  };
  if (bits == 4) {
    const __m256i low = _mm256_set1_epi16(0x000F), high = _mm256_set1_epi16(0x0F00);
    for (; i + 32 <= n; i += 32) {
      const __m256i bytes = _mm256_cvtepu8_epi16(load(i / 2));
      store(_mm256_or_si256(_mm256_and_si256(bytes, low),
                            _mm256_and_si256(_mm256_slli_epi16(bytes, 4), high)));
    }
  } else if (bits == 6) {
    // three bytes to a word of 32 bits; those of the upper half were loaded from 8 on, not 12
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                            4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    const auto parts = [](__m256i a, std::uint32_t lower, int shift, std::uint32_t upper) {
      return _mm256_or_si256(
          _mm256_and_si256(a, _mm256_set1_epi32(int(lower))),
          _mm256_and_si256(_mm256_slli_epi32(a, shift), _mm256_set1_epi32(int(upper))));
    };
    for (; i + 32 <= n; i += 32) {
      const std::size_t at = i / 4 * 3;
      const __m256i words = _mm256_shuffle_epi8(
          _mm256_inserti128_si256(_mm256_castsi128_si256(load(at)), load(at + 8), 1), spread);
      const __m256i pairs = parts(words, 0x00000FFFu, 4, 0x0FFF0000u);
      store(parts(pairs, 0x003F003Fu, 2, 0x3F003F00u));
    }
  }
#else
  (void)from, (void)n, (void)bits, (void)codes;
#endif
  return i;
}

inline void pack_bytes(const std::uint8_t* codes, std::size_t n, std::size_t bits,
                       std::uint8_t* to) {
  const std::size_t together = codes_a_word(bits);
  std::size_t i = pack_vectors(codes, n, bits, to);
  to += i * bits / 8;
  if (bits == 4)
    for (; i + 2 <= n; i += 2) *to++ = std::uint8_t(codes[i] | codes[i + 1] << 4);
  while (i < n) {
    std::uint64_t word = 0;
    const std::size_t count = n - i < together ? n - i : together;
    for (std::size_t k = 0; k < count; ++k) word |= std::uint64_t(codes[i + k]) << (k * bits);
    for (std::size_t k = 0; k < (count * bits + 7) / 8; ++k) *to++ = std::uint8_t(word >> (8 * k));
    i += count;
  }
}

inline void unpack_bytes(const std::uint8_t* from, std::size_t n, std::size_t bits,
                         std::uint8_t* codes) {
  const std::size_t together = codes_a_word(bits);
  const std::uint64_t mask = (1u << bits) - 1;
  std::size_t i = unpack_vectors(from, n, bits, codes);
  for (from += i * bits / 8; i < n;) {
    const std::size_t count = n - i < together ? n - i : together;
    std::uint64_t word = 0;
    for (std::size_t k = 0; k < (count * bits + 7) / 8; ++k) word |= std::uint64_t(*from++) << (8 * k);
    for (std::size_t k = 0; k < count; ++k) codes[i + k] = std::uint8_t(word >> (k * bits) & mask);
    i += count;
  }
}

// The same down the columns: `count` rows of codes, `pitch` apart, to rows of bytes `stride` apart.
inline void pack_rows(const std::uint8_t* codes, std::size_t pitch, std::size_t count,
                      std::size_t width, std::size_t bits, std::uint8_t* to, std::size_t stride) {
  for (std::size_t byte = 0; byte < (count * bits + 7) / 8; ++byte)
    for (std::size_t i = 0; i < width; ++i) {
      std::uint64_t word = 0;
      for (std::size_t k = 0; k < count; ++k)
        word |= std::uint64_t(codes[k * pitch + i]) << (k * bits);
      to[byte * stride + i] = std::uint8_t(word >> (8 * byte));
    }
}

inline void unpack_rows(const std::uint8_t* from, std::size_t stride, std::size_t count,
                        std::size_t width, std::size_t bits, std::uint8_t* codes,
                        std::size_t pitch) {
  const std::uint64_t mask = (1u << bits) - 1;
  for (std::size_t i = 0; i < width; ++i) {
    std::uint64_t word = 0;
    for (std::size_t byte = 0; byte < (count * bits + 7) / 8; ++byte)
      word |= std::uint64_t(from[byte * stride + i]) << (8 * byte);
    for (std::size_t k = 0; k < count; ++k)
      codes[k * pitch + i] = std::uint8_t(word >> (k * bits) & mask);
  }
}

}  // namespace
}  // namespace halfstep
