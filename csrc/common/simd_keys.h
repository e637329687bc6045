// Comparing and compacting arrays of integers, kLanes at a time (kLanes = Vec<float>::size for
// int32_t, Vec<double>::size for int64_t and what lies beside it).
#pragma once

#include "simd.h"

namespace ait::cpu {
namespace {

// Bit i is set where p[i] > bound, for kLanes elements.
template <int kLanes, typename T>
AIT_INLINE uint32_t greater_mask(const T* p, T bound) {
#if defined(__AVX512F__)
  if constexpr (kLanes * sizeof(T) == 64 && sizeof(T) == 4) {
    return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(bound));
  } else if constexpr (kLanes * sizeof(T) == 64) {
    return _mm512_cmpgt_epi64_mask(_mm512_loadu_si512(p), _mm512_set1_epi64(bound));
  }
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (sizeof(T) == 4) {
    const __m256i greater = _mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(bound));
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(greater)));
  } else {
    const __m256i greater = _mm256_cmpgt_epi64(lanes, _mm256_set1_epi64x(bound));
    return uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(greater)));
  }
#endif
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(p[i] > bound) << i;
  return mask;
}

// Bit i is set where p[i] == value, for kLanes elements.
template <int kLanes, typename T>
AIT_INLINE uint32_t equal_mask(const T* p, T value) {
#if defined(__AVX512F__)
  if constexpr (kLanes * sizeof(T) == 64 && sizeof(T) == 4) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(value));
  } else if constexpr (kLanes * sizeof(T) == 64) {
    return _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(p), _mm512_set1_epi64(value));
  }
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (sizeof(T) == 4) {
    const __m256i equal = _mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(value));
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(equal)));
  } else {
    const __m256i equal = _mm256_cmpeq_epi64(lanes, _mm256_set1_epi64x(value));
    return uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(equal)));
  }
#endif
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(p[i] == value) << i;
  return mask;
}

// Writes those of kLanes elements whose bit is set to `to`, side by side. May write anything to the
// rest of the kLanes elements there; `to` may be `from`, or lie before it.
template <int kLanes, typename T>
AIT_INLINE void compact(T* to, const T* from, uint32_t mask) {
#if defined(__AVX512F__)
  if constexpr (kLanes * sizeof(T) == 64 && sizeof(T) == 4) {
    const __m512i lanes = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(mask), lanes));
    return;
  } else if constexpr (kLanes * sizeof(T) == 64) {
    const __m512i lanes = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(__mmask8(mask), lanes));
    return;
  } else if constexpr (kLanes * sizeof(T) == 32 && sizeof(T) == 4) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i kept = _mm256_maskz_compress_epi32(__mmask8(mask), lanes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), kept);
    return;
  }
#endif
  for (; mask != 0; mask &= mask - 1) *to++ = from[__builtin_ctz(mask)];
}

}  // namespace
}  // namespace ait::cpu
