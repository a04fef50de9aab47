// Conversions between bits and numbers with the GPU's rounding: to nearest, ties to even (tf32: ties away from zero).
#pragma once
#include <stdint.h>
#include <string.h>

namespace host {

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline float bf16_to_float(uint16_t x) { return bits<float>((uint32_t)x << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  if (x != x) return 0x7fff;  // the NaN that cvt.rn.bf16.f32 gives
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 0) {  // zero and subnormal numbers: fraction * 2^-24
    const float size = (float)fraction * 5.9604644775390625e-8f;
    return sign ? -size : size;
  }
  return bits<float>(sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13);
}

inline uint16_t float_to_half(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (x != x) return 0x7fff;
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above: infinity
  if (size < 0x38800000) {                                   // below 2^-14: fraction = size * 2^24, rounded by an addition
    const float shifted = bits<float>(size) + 0.5f;          // the spacing of floats at 1/2 is 2^-24
    return (uint16_t)(sign | (bits<uint32_t>(shifted) - 0x3f000000));
  }
  return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

inline uint32_t float_to_tf32(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return (u & 0x7f800000) == 0x7f800000 ? u : (u + 0x1000) & 0xffffe000;
}

inline float tf32_seen(uint32_t x) { return bits<float>(x & 0xffffe000); }  // mma reads only these bits

}  // namespace host
