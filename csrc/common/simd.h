// Vectors of float and double as wide as the instruction set for which this file is compiled:
// 64 bytes (AVX-512), 32 bytes (AVX2 with FMA and F16C) or 16 bytes (GCC/Clang vector extensions,
// any machine).
//
// Kernel sources are compiled once for each instruction set and linked together. So everything here
// lives in an anonymous namespace: a function with external linkage could be merged by the linker
// with its twin of another instruction set.
//
// Vec<C> for the compute type C (float or double) offers
//   size, zero(), broadcast(x), load(p), load(p, n), store(p), store(p, n), where p may point to C
//   or to a narrower storage type (float: BFloat16, Float16; double: float); stores round to
//   nearest even, n < size touches n elements only, and a partial load fills with zeros;
//   + - * /, fmadd, max, min, reduce_add, reduce_max, reduce_each, not_less_equal_mask, set_lane,
//   exp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half_types.h"

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 warns about its own _mm512_undefined_ps() and the like (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define AIT_INLINE inline __attribute__((always_inline))

namespace ait::cpu {
namespace {

template <typename C>
struct Vec;

// ---- Scalars ------------------------------------------------------------------------------------

AIT_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

AIT_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

AIT_INLINE float to_float(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

AIT_INLINE float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or NaN made quiet
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | quiet);
  }
  if (magnitude < 0x400u) {  // zero and subnormal: magnitude * 2^-24, exact in float
    return bits_to_float(sign | float_bits(float(magnitude) * 0x1p-24f));
  }
  return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
}

AIT_INLINE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return BFloat16{0x7fc0u};
  return BFloat16{uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

AIT_INLINE Float16 to_float16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return Float16{uint16_t(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu))};
  }
  if (magnitude >= 0x477ff000u) return Float16{uint16_t(sign | 0x7c00u)};  // 65520 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 lets the adder round to a multiple of 2^-24.
    const uint32_t rounded = float_bits(bits_to_float(magnitude) + 0.5f) - float_bits(0.5f);
    return Float16{uint16_t(sign | rounded)};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u);
  return Float16{uint16_t(sign | rounded >> 13)};
}

// convert<To>(x): x rounded to the type To, whatever pair of storage and compute types it is.
template <typename To, typename From>
AIT_INLINE To convert(From x) {
  if constexpr (__is_same(From, BFloat16) || __is_same(From, Float16)) {
    return convert<To>(to_float(x));
  } else if constexpr (__is_same(To, BFloat16)) {
    return to_bfloat16(x);
  } else if constexpr (__is_same(To, Float16)) {
    return to_float16(x);
  } else {
    return To(x);
  }
}

}  // namespace
}  // namespace ait::cpu

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_baseline.h"
#endif

namespace ait::cpu {
namespace {

// ---- The rest, in terms of the above ------------------------------------------------------------

// Loads and stores of n < size elements, through a buffer.
template <typename C, typename S>
AIT_INLINE Vec<C> load_through_buffer(const S* p, int64_t n) {
  S buffer[Vec<C>::size] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(S));
  return Vec<C>::load(buffer);
}

template <typename C, typename S>
AIT_INLINE void store_through_buffer(Vec<C> x, S* p, int64_t n) {
  S buffer[Vec<C>::size];
  x.store(buffer);
  std::memcpy(p, buffer, size_t(n) * sizeof(S));
}

template <typename C>
AIT_INLINE Vec<C>& operator+=(Vec<C>& a, Vec<C> b) {
  return a = a + b;
}
template <typename C>
AIT_INLINE Vec<C>& operator*=(Vec<C>& a, Vec<C> b) {
  return a = a * b;
}

// x[lane] = value. The lane should be known when this is compiled, as in an unrolled loop.
template <typename C>
AIT_INLINE void set_lane(Vec<C>& x, int lane, C value) {
  x.raw[lane] = value;
}

template <typename C>
struct ExpConstants;

// ln2 = ln2_high + ln2_low, where n * ln2_high is exact for every exponent n. Beyond [lowest,
// highest] the result is 0 or infinity. Taylor's series up to r^degree on |r| <= ln2 / 2 leaves a
// relative error below 1/8 ulp.
template <>
struct ExpConstants<float> {
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -104.0f, highest = 89.0f;
  static constexpr float to_integer = 0x1.8p23f;
  static constexpr int degree = 7;
};

template <>
struct ExpConstants<double> {
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double to_integer = 0x1.8p52;
  static constexpr int degree = 13;
};

// e^x within 2 ulp: NaN stays NaN, overflow gives infinity, and results below the normal range are
// rounded once. Coefficients are folded at compile time.
template <typename C>
AIT_INLINE Vec<C> exp(Vec<C> x) {
  using K = ExpConstants<C>;
  using V = Vec<C>;
  // Of a NaN and a number, max and min return their second argument: so a NaN in x survives here.
  x = min(V::broadcast(K::highest), max(V::broadcast(K::lowest), x));
  const V shift = V::broadcast(K::to_integer);
  const V n = fmadd(x, V::broadcast(C(1.44269504088896340736)), shift) - shift;
  V r = fmadd(n, V::broadcast(-K::ln2_high), x);
  r = fmadd(n, V::broadcast(-K::ln2_low), r);
  C factorial = 1;
  for (int i = 2; i <= K::degree; ++i) factorial *= C(i);
  V sum = V::broadcast(C(1) / factorial);
#pragma GCC unroll 16
  for (int i = K::degree; i >= 1; --i) {
    factorial /= C(i);
    sum = fmadd(sum, r, V::broadcast(C(1) / factorial));
  }
  return scale_by_power_of_two(sum, n);
}

}  // namespace
}  // namespace ait::cpu
