// Vec for AVX-512 (F, BW, DQ, VL). Included by simd.h alone.
#pragma once

namespace ait::cpu {
namespace {

template <typename C, typename S>
AIT_INLINE Vec<C> load_through_buffer(const S* p, int64_t n);
template <typename C, typename S>
AIT_INLINE void store_through_buffer(Vec<C> x, S* p, int64_t n);

template <>
struct Vec<float> {
  static constexpr int size = 16;
  __m512 raw;

  static AIT_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static AIT_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static AIT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static AIT_INLINE Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static AIT_INLINE Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static AIT_INLINE Vec load(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
  }
  template <typename S>
  static AIT_INLINE Vec load(const S* p, int64_t n) {
    return load_through_buffer<float>(p, n);
  }

  AIT_INLINE void store(float* p) const { _mm512_storeu_ps(p, raw); }
  AIT_INLINE void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(raw);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(raw, raw, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
  }
  AIT_INLINE void store(Float16* p) const {
    const __m256i half = _mm512_cvtps_ph(raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  AIT_INLINE void store(float* p, int64_t n) const {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), raw);
  }
  template <typename S>
  AIT_INLINE void store(S* p, int64_t n) const {
    store_through_buffer(*this, p, n);
  }
};

template <>
struct Vec<double> {
  static constexpr int size = 8;
  __m512d raw;

  static AIT_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static AIT_INLINE Vec broadcast(double x) { return {_mm512_set1_pd(x)}; }

  static AIT_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static AIT_INLINE Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static AIT_INLINE Vec load(const double* p, int64_t n) {
    return {_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p)};
  }
  static AIT_INLINE Vec load(const float* p, int64_t n) {
    return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(__mmask8((1u << n) - 1), p))};
  }

  AIT_INLINE void store(double* p) const { _mm512_storeu_pd(p, raw); }
  AIT_INLINE void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(raw)); }
  AIT_INLINE void store(double* p, int64_t n) const {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), raw);
  }
  AIT_INLINE void store(float* p, int64_t n) const {
    _mm256_mask_storeu_ps(p, __mmask8((1u << n) - 1), _mm512_cvtpd_ps(raw));
  }
};

AIT_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) {
  return {_mm512_add_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) {
  return {_mm512_sub_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) {
  return {_mm512_mul_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) {
  return {_mm512_div_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm512_add_pd(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return {_mm512_sub_pd(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return {_mm512_mul_pd(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) {
  return {_mm512_div_pd(a.raw, b.raw)};
}

// a * b + c with one rounding.
AIT_INLINE Vec<float> fmadd(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.raw, b.raw, c.raw)};
}
AIT_INLINE Vec<double> fmadd(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.raw, b.raw, c.raw)};
}

#if defined(__AVX512BF16__)
// As many pairs of BFloat16 as Vec<float> has lanes.
struct BFloat16Pairs {
  __m512bh raw;

  static AIT_INLINE BFloat16Pairs load(const BFloat16* p) {
    return {(__m512bh)_mm512_loadu_si512(p)};
  }
  static AIT_INLINE BFloat16Pairs broadcast(const BFloat16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
  }
};

// c plus the products of both elements of each pair. Subnormal numbers count as zero.
AIT_INLINE Vec<float> fmadd(BFloat16Pairs a, BFloat16Pairs b, Vec<float> c) {
  return {_mm512_dpbf16_ps(c.raw, a.raw, b.raw)};
}

// Stores x as operands of such products, subnormal numbers as 0; returns what was stored.
AIT_INLINE Vec<float> store_as_operand(Vec<float> x, BFloat16* p) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(x.raw);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
#endif

// The larger (smaller) of both; b where either is NaN.
AIT_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.raw, b.raw)}; }
AIT_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.raw, b.raw)}; }
AIT_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.raw, b.raw)}; }
AIT_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.raw, b.raw)}; }

// Bit i is set unless a[i] <= b[i]: where a[i] is greater, or either is NaN.
AIT_INLINE uint32_t not_less_equal_mask(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_NLE_UQ);
}
AIT_INLINE uint32_t not_less_equal_mask(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(a.raw, b.raw, _CMP_NLE_UQ);
}

// Sum of all lanes, the upper half onto the lower, until one is left.
AIT_INLINE float reduce_add(Vec<float> x) {
  const __m256 upper = _mm512_extractf32x8_ps(x.raw, 1);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.raw), upper);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
AIT_INLINE double reduce_add(Vec<double> x) {
  const __m256d upper = _mm512_extractf64x4_pd(x.raw, 1);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(x.raw), upper);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// Largest of all lanes; unspecified if one is NaN.
AIT_INLINE float reduce_max(Vec<float> x) {
  const __m256 upper = _mm512_extractf32x8_ps(x.raw, 1);
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.raw), upper);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
AIT_INLINE double reduce_max(Vec<double> x) {
  const __m256d upper = _mm512_extractf64x4_pd(x.raw, 1);
  const __m256d four = _mm256_max_pd(_mm512_castpd512_pd256(x.raw), upper);
  const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}

// Lane r of the result is what reduce_add or reduce_max of rows[r] is, for op + or max: halves are
// folded as there, but of two rows at once.
template <typename Op>
AIT_INLINE Vec<float> reduce_each(const Vec<float> (&rows)[16], Op op) {
  Vec<float> eights[8], fours[4], twos[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    // Rows in the order that the last fold leaves: row 4 * (x % 4) + x / 4 is the x-th.
    const __m512 a = rows[4 * (2 * i % 4) + i / 2].raw, b = rows[4 * (2 * i % 4 + 1) + i / 2].raw;
    eights[i] = op(Vec<float>{_mm512_shuffle_f32x4(a, b, 0x44)},
                   Vec<float>{_mm512_shuffle_f32x4(a, b, 0xee)});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = eights[2 * i].raw, b = eights[2 * i + 1].raw;
    fours[i] = op(Vec<float>{_mm512_shuffle_f32x4(a, b, 0x88)},
                  Vec<float>{_mm512_shuffle_f32x4(a, b, 0xdd)});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = fours[2 * i].raw, b = fours[2 * i + 1].raw;
    twos[i] =
        op(Vec<float>{_mm512_shuffle_ps(a, b, 0x44)}, Vec<float>{_mm512_shuffle_ps(a, b, 0xee)});
  }
  const __m512 a = twos[0].raw, b = twos[1].raw;
  return op(Vec<float>{_mm512_shuffle_ps(a, b, 0x88)}, Vec<float>{_mm512_shuffle_ps(a, b, 0xdd)});
}
template <typename Op>
AIT_INLINE Vec<double> reduce_each(const Vec<double> (&rows)[8], Op op) {
  Vec<double> fours[4], twos[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = rows[2 * (2 * i % 4) + i / 2].raw, b = rows[2 * (2 * i % 4 + 1) + i / 2].raw;
    fours[i] = op(Vec<double>{_mm512_shuffle_f64x2(a, b, 0x44)},
                  Vec<double>{_mm512_shuffle_f64x2(a, b, 0xee)});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = fours[2 * i].raw, b = fours[2 * i + 1].raw;
    twos[i] = op(Vec<double>{_mm512_shuffle_f64x2(a, b, 0x88)},
                 Vec<double>{_mm512_shuffle_f64x2(a, b, 0xdd)});
  }
  const __m512d a = twos[0].raw, b = twos[1].raw;
  return op(Vec<double>{_mm512_unpacklo_pd(a, b)}, Vec<double>{_mm512_unpackhi_pd(a, b)});
}

// x * 2^n for integral n, rounded once.
AIT_INLINE Vec<float> scale_by_power_of_two(Vec<float> x, Vec<float> n) {
  return {_mm512_scalef_ps(x.raw, n.raw)};
}
AIT_INLINE Vec<double> scale_by_power_of_two(Vec<double> x, Vec<double> n) {
  return {_mm512_scalef_pd(x.raw, n.raw)};
}

}  // namespace
}  // namespace ait::cpu
