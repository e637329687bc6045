// Vec for AVX2 with FMA and F16C. Included by simd.h alone.
#pragma once

namespace ait::cpu {
namespace {

template <typename C, typename S>
AIT_INLINE Vec<C> load_through_buffer(const S* p, int64_t n);
template <typename C, typename S>
AIT_INLINE void store_through_buffer(Vec<C> x, S* p, int64_t n);

template <>
struct Vec<float> {
  static constexpr int size = 8;
  __m256 raw;

  static AIT_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static AIT_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

  static AIT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static AIT_INLINE Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static AIT_INLINE Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  template <typename S>
  static AIT_INLINE Vec load(const S* p, int64_t n) {
    return load_through_buffer<float>(p, n);
  }

  AIT_INLINE void store(float* p) const { _mm256_storeu_ps(p, raw); }
  AIT_INLINE void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(raw);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(raw, raw, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i low = _mm256_castsi256_si128(result);
    const __m128i high = _mm256_extracti128_si256(result, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  AIT_INLINE void store(Float16* p) const {
    const __m128i half = _mm256_cvtps_ph(raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  template <typename S>
  AIT_INLINE void store(S* p, int64_t n) const {
    store_through_buffer(*this, p, n);
  }
};

template <>
struct Vec<double> {
  static constexpr int size = 4;
  __m256d raw;

  static AIT_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static AIT_INLINE Vec broadcast(double x) { return {_mm256_set1_pd(x)}; }

  static AIT_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static AIT_INLINE Vec load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  template <typename S>
  static AIT_INLINE Vec load(const S* p, int64_t n) {
    return load_through_buffer<double>(p, n);
  }

  AIT_INLINE void store(double* p) const { _mm256_storeu_pd(p, raw); }
  AIT_INLINE void store(float* p) const { _mm_storeu_ps(p, _mm256_cvtpd_ps(raw)); }
  template <typename S>
  AIT_INLINE void store(S* p, int64_t n) const {
    store_through_buffer(*this, p, n);
  }
};

AIT_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) {
  return {_mm256_add_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) {
  return {_mm256_sub_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) {
  return {_mm256_mul_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) {
  return {_mm256_div_ps(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm256_add_pd(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return {_mm256_sub_pd(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return {_mm256_mul_pd(a.raw, b.raw)};
}
AIT_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) {
  return {_mm256_div_pd(a.raw, b.raw)};
}

// a * b + c with one rounding.
AIT_INLINE Vec<float> fmadd(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.raw, b.raw, c.raw)};
}
AIT_INLINE Vec<double> fmadd(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.raw, b.raw, c.raw)};
}

// The larger (smaller) of both; b where either is NaN.
AIT_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.raw, b.raw)}; }
AIT_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.raw, b.raw)}; }
AIT_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.raw, b.raw)}; }
AIT_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.raw, b.raw)}; }

// Bit i is set unless a[i] <= b[i]: where a[i] is greater, or either is NaN.
AIT_INLINE uint32_t not_less_equal_mask(Vec<float> a, Vec<float> b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.raw, b.raw, _CMP_NLE_UQ)));
}
AIT_INLINE uint32_t not_less_equal_mask(Vec<double> a, Vec<double> b) {
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(a.raw, b.raw, _CMP_NLE_UQ)));
}

// Sum of all lanes, the upper half onto the lower, until one is left.
AIT_INLINE float reduce_add(Vec<float> x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.raw), _mm256_extractf128_ps(x.raw, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
AIT_INLINE double reduce_add(Vec<double> x) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x.raw), _mm256_extractf128_pd(x.raw, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// Largest of all lanes; unspecified if one is NaN.
AIT_INLINE float reduce_max(Vec<float> x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x.raw), _mm256_extractf128_ps(x.raw, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
AIT_INLINE double reduce_max(Vec<double> x) {
  const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(x.raw), _mm256_extractf128_pd(x.raw, 1));
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}

// Lane r of the result is what reduce_add or reduce_max of rows[r] is, for op + or max: halves are
// folded as there, but of two rows at once.
template <typename Op>
AIT_INLINE Vec<float> reduce_each(const Vec<float> (&rows)[8], Op op) {
  Vec<float> fours[4], twos[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 a = rows[i].raw, b = rows[i + 4].raw;
    fours[i] = op(Vec<float>{_mm256_permute2f128_ps(a, b, 0x20)},
                  Vec<float>{_mm256_permute2f128_ps(a, b, 0x31)});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 a = fours[2 * i].raw, b = fours[2 * i + 1].raw;
    twos[i] =
        op(Vec<float>{_mm256_shuffle_ps(a, b, 0x44)}, Vec<float>{_mm256_shuffle_ps(a, b, 0xee)});
  }
  const __m256 a = twos[0].raw, b = twos[1].raw;
  return op(Vec<float>{_mm256_shuffle_ps(a, b, 0x88)}, Vec<float>{_mm256_shuffle_ps(a, b, 0xdd)});
}
template <typename Op>
AIT_INLINE Vec<double> reduce_each(const Vec<double> (&rows)[4], Op op) {
  Vec<double> twos[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d a = rows[i].raw, b = rows[i + 2].raw;
    twos[i] = op(Vec<double>{_mm256_permute2f128_pd(a, b, 0x20)},
                 Vec<double>{_mm256_permute2f128_pd(a, b, 0x31)});
  }
  const __m256d a = twos[0].raw, b = twos[1].raw;
  return op(Vec<double>{_mm256_unpacklo_pd(a, b)}, Vec<double>{_mm256_unpackhi_pd(a, b)});
}

// x * 2^n for integral n of at most twice the exponent range. Multiplies by two powers of about
// half of n each: the first product is exact, so the result is rounded once.
AIT_INLINE Vec<float> scale_by_power_of_two(Vec<float> x, Vec<float> n) {
  const __m256i exponent = _mm256_cvtps_epi32(n.raw);
  const __m256i first = _mm256_srai_epi32(exponent, 1);
  const __m256i second = _mm256_sub_epi32(exponent, first);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.raw, a), b)};
}
AIT_INLINE Vec<double> scale_by_power_of_two(Vec<double> x, Vec<double> n) {
  const __m128i exponent = _mm256_cvtpd_epi32(n.raw);
  const __m128i first = _mm_srai_epi32(exponent, 1);
  const __m128i second = _mm_sub_epi32(exponent, first);
  const __m128i bias = _mm_set1_epi32(1023);
  const __m256i wide_first = _mm256_cvtepi32_epi64(_mm_add_epi32(first, bias));
  const __m256i wide_second = _mm256_cvtepi32_epi64(_mm_add_epi32(second, bias));
  const __m256d a = _mm256_castsi256_pd(_mm256_slli_epi64(wide_first, 52));
  const __m256d b = _mm256_castsi256_pd(_mm256_slli_epi64(wide_second, 52));
  return {_mm256_mul_pd(_mm256_mul_pd(x.raw, a), b)};
}

}  // namespace
}  // namespace ait::cpu
