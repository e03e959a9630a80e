// One lane in plain C++, for 32 and for 64 bits. The other lanes_*.hpp have the same members.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "carriers.hpp"
#include "types.hpp"

namespace halfstep {
namespace {

template <class Word, class Number, int mantissa>
struct PortableLanes {
  using word = Word;
  using number = Number;
  using Bits = Word;    // a vector of words
  using Float = Number; // the same, read as numbers
  using Mask = bool;
  using Random = std::uint32_t;  // 32 random bits for each lane
  static constexpr int width = 1;
  static constexpr int mantissa_bits = mantissa;

  static Bits load(const Number* p) { return bits(*p); }
  static Bits load(const Bits* p) { return *p; }
  static void store(Number* p, Bits b) { *p = number_of(b); }
  static void stream(Number* p, Bits b) { store(p, b); }
  static void fence() {}

  static Bits set(Word w) { return w; }
  static Bits bits(Float f) {
    Word w;
    std::memcpy(&w, &f, sizeof w);
    return w;
  }
  static Float number_of(Bits b) {
    Number f;
    std::memcpy(&f, &b, sizeof f);
    return f;
  }
  static Float set_number(Number f) { return f; }

  static Bits and_(Bits a, Bits b) { return a & b; }
  static Bits or_(Bits a, Bits b) { return a | b; }
  static Bits add(Bits a, Bits b) { return a + b; }
  static Bits shift_right(Bits a, int n) { return n >= int(8 * sizeof(Word)) ? 0 : a >> n; }
  static Bits minus(Bits a, Bits b) { return a - b; }
  static Bits larger(Bits a, Bits b) {  // as signed numbers
    constexpr Word sign = Word(1) << (8 * sizeof(Word) - 1);
    return (a ^ sign) < (b ^ sign) ? b : a;
  }
  static Bits shift_left_each(Bits a, Bits n) { return n >= 8 * sizeof(Word) ? 0 : a << n; }
  static Bits shift_right_each(Bits a, Bits n) { return n >= 8 * sizeof(Word) ? 0 : a >> n; }
  static Mask less(Bits a, Bits b) { return a < b; }  // of words below 2^31 (2^63)
  static Bits select(Mask m, Bits yes, Bits no) { return m ? yes : no; }

  static Float plus(Float a, Float b) { return a + b; }
  static Float plus_where(Mask m, Float a, Float b) { return m ? a + b : a; }
  static Float minus(Float a, Float b) { return a - b; }
  static Float times(Float a, Float b) { return a * b; }
  static Mask below(Float a, Float b) { return a < b; }
  static Mask at_least(Float a, Float b) { return a >= b; }
  static bool any(Mask m) { return m; }
  static Mask both(Mask a, Mask b) { return a && b; }
  static Mask not_both(Mask a, Mask b) { return a && !b; }  // a and not b
  static Float select(Mask m, Float yes, Float no) { return m ? yes : no; }
  static Float truncate(Float a) {
    constexpr Number whole = Number(4503599627370496.0);  // from here on all numbers are integers
    return a < whole && -a < whole ? Number(std::int64_t(a)) : a;
  }

  static Bits shift_left(Bits a, int n) { return a << n; }
  static Bits max_words(Bits a, Bits b) { return a < b ? b : a; }
  static Word top_word(Bits a) { return a; }  // the largest of all lanes
  static void store_tops(std::uint32_t* p, Bits a, Bits b, Bits c, Bits d) {  // of four vectors
    p[0] = std::uint32_t(a), p[1] = std::uint32_t(b), p[2] = std::uint32_t(c), p[3] = std::uint32_t(d);
  }
  static Float least(Float a, Float b) { return a < b ? a : b; }
  static Float most(Float a, Float b) { return a > b ? a : b; }
  static Float over(Float a, Float b) { return a / b; }
  // The same quotient, where b is positive and `inverse` is 1 / b, rounded; and nothing is near the ends
  // of the range. With fused multiply-adds that is faster than a division: the remainder of a quotient
  // that is next to the right one is exact, and corrects it (P. Markstein, IBM J. Res. Dev. 34(1), 1990).
  static Float over(Float a, Float b, Float) { return a / b; }
  static Float fused(Float a, Float b, Float c) { return std::fma(a, b, c); }  // a b + c, rounded once
  static Float root(Float a) { return std::sqrt(a); }

  // 16-bit numbers, as many as there are lanes
  using Words = std::uint16_t;
  static Words load_words(const std::uint16_t* p) { return *p; }
  static void store_words(std::uint16_t* p, Words w) { *p = w; }
  static void stream_words(std::uint16_t* p, Words w) { *p = w; }
  static Words pack(Bits a) { return Words(a); }  // of words below 2^16
  static Bits unpack(Words w) { return w; }
  static Words halves(Float a) { return round_half(a); }  // to nearest
  static Float of_halves(Words w) { return FromFloat16::widen(w); }

  static Bits load_bytes(const std::uint8_t* p) { return *p; }  // one for each lane
  static void store_bytes(std::uint8_t* p, Bits a) { *p = std::uint8_t(a); }  // of words below 256
  static void store_bytes(std::uint8_t* p, Bits a, Bits b, Bits c, Bits d) {  // of four vectors
    store_bytes(p, a);
    store_bytes(p + width, b);
    store_bytes(p + 2 * width, c);
    store_bytes(p + 3 * width, d);
  }

  // Random bits of the lanes that follow element `index`
  static Random counter(std::uint32_t index) { return index; }
  static Random xor_(Random a, Random b) { return a ^ b; }
  static Random xor_set(Random a, std::uint32_t b) { return a ^ b; }
  static Random and_set(Random a, std::uint32_t b) { return a & b; }
  static Random xor_shift(Random a, int n) { return a ^ (a >> n); }
  static Random multiply(Random a, std::uint32_t b) { return a * b; }
  // The `shift` uppermost bits of a random number that is 32 bits, and zeros below, long
  static Bits top_bits(Random r, int shift) {
    return shift >= 32 ? Bits(r) << (shift - 32) : Bits(shift == 0 ? 0 : r >> (32 - shift));
  }
  static Bits top_bits_each(Random r, Bits shift) {
    return shift > 63 ? 0 : Bits(top_bits_wide(r, int(shift)));
  }
  // floor(2^32 rest), where a number is less than the quantum, which `dropped` bits are the rest to
  static Bits fraction(Bits magnitude, Bits dropped) {
    constexpr Word hidden = Word(1) << mantissa;
    const Word significand = (magnitude & (hidden - 1)) | hidden;
    constexpr int aligned = mantissa + 1 - 32;  // shift to 32 bits
    return shift_right_each(aligned < 0 ? significand << (-aligned & 31) : significand,
                            dropped - (aligned < 0 ? Word(mantissa) + 1 : Word(32)));
  }
  static Mask carries(Bits fraction, Random r) { return std::uint64_t(fraction) + r > 0xFFFFFFFFu; }

 private:
  static std::uint64_t top_bits_wide(Random r, int shift) {
    return shift >= 32 ? std::uint64_t(r) << (shift - 32) : shift == 0 ? 0 : r >> (32 - shift);
  }
};

using Portable32 = PortableLanes<std::uint32_t, float, 23>;
using Portable64 = PortableLanes<std::uint64_t, double, 52>;

}  // namespace
}  // namespace halfstep
