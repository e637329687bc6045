// Stores past the caches, for results that are larger than these. Compiled once for each
// instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace ait::cpu {
namespace {

// Stores x without reading the line first and without keeping it in cache. `p` is aligned to what
// is stored; whole lines should be stored together. stream_fence() before others read.
template <typename C, typename S>
AIT_INLINE void stream(Vec<C> x, S* p) {
#if defined(__SSE2__)
  alignas(64) S buffer[Vec<C>::size];
  x.store(buffer);
  char* target = reinterpret_cast<char*>(p);
  const char* source = reinterpret_cast<const char*>(buffer);
#if defined(__AVX512F__)
  if constexpr (sizeof buffer == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_load_si512(source));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof buffer == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(source)));
    return;
  }
#endif
  if constexpr (sizeof buffer == 8) {
    long long bits;
    std::memcpy(&bits, source, sizeof bits);
    _mm_stream_si64(reinterpret_cast<long long*>(target), bits);
  } else {
    static_assert(sizeof buffer % 16 == 0);
    for (size_t i = 0; i < sizeof buffer; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(source + i)));
    }
  }
#else
  x.store(p);
#endif
}

AIT_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace ait::cpu
