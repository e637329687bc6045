// Vec of 16 bytes in GCC/Clang vector extensions, for any machine. Included by simd.h alone.
#pragma once

namespace ait::cpu {
namespace {

template <typename C, typename S>
AIT_INLINE Vec<C> load_through_buffer(const S* p, int64_t n);
template <typename C, typename S>
AIT_INLINE void store_through_buffer(Vec<C> x, S* p, int64_t n);

template <typename C>
struct VecTypes;

template <>
struct VecTypes<float> {
  typedef float Raw __attribute__((vector_size(16)));
  typedef int32_t Integers __attribute__((vector_size(16)));
  static constexpr int32_t exponent_bias = 127, mantissa_bits = 23;
};

template <>
struct VecTypes<double> {
  typedef double Raw __attribute__((vector_size(16)));
  typedef int64_t Integers __attribute__((vector_size(16)));
  static constexpr int64_t exponent_bias = 1023, mantissa_bits = 52;
};

template <typename C>
struct Vec {
  static constexpr int size = 16 / sizeof(C);
  typename VecTypes<C>::Raw raw;

  static AIT_INLINE Vec zero() { return broadcast(C(0)); }
  // Here and below, assigning elements of `raw` one by one would compile to as many shuffles.
  static AIT_INLINE Vec broadcast(C x) {
    if constexpr (size == 4) {
      return {typename VecTypes<C>::Raw{x, x, x, x}};
    } else {
      return {typename VecTypes<C>::Raw{x, x}};
    }
  }

  static AIT_INLINE Vec load(const C* p) {
    Vec result;
    std::memcpy(&result.raw, p, sizeof result.raw);
    return result;
  }
  template <typename S>
  static AIT_INLINE Vec load(const S* p) {
    C converted[size];
    for (int i = 0; i < size; ++i) converted[i] = convert<C>(p[i]);
    return load(converted);
  }
  template <typename S>
  static AIT_INLINE Vec load(const S* p, int64_t n) {
    return load_through_buffer<C>(p, n);
  }

  AIT_INLINE void store(C* p) const { std::memcpy(p, &raw, sizeof raw); }
  template <typename S>
  AIT_INLINE void store(S* p) const {
    C exact[size];
    store(exact);
    for (int i = 0; i < size; ++i) p[i] = convert<S>(exact[i]);
  }
  template <typename S>
  AIT_INLINE void store(S* p, int64_t n) const {
    store_through_buffer(*this, p, n);
  }
};

template <typename C>
AIT_INLINE Vec<C> operator+(Vec<C> a, Vec<C> b) {
  return {a.raw + b.raw};
}
template <typename C>
AIT_INLINE Vec<C> operator-(Vec<C> a, Vec<C> b) {
  return {a.raw - b.raw};
}
template <typename C>
AIT_INLINE Vec<C> operator*(Vec<C> a, Vec<C> b) {
  return {a.raw * b.raw};
}
template <typename C>
AIT_INLINE Vec<C> operator/(Vec<C> a, Vec<C> b) {
  return {a.raw / b.raw};
}

// a * b + c, rounded twice: there may be no fused instruction, and libm's fma would be slow.
template <typename C>
AIT_INLINE Vec<C> fmadd(Vec<C> a, Vec<C> b, Vec<C> c) {
  return {a.raw * b.raw + c.raw};
}

// The larger (smaller) of both; b where either is NaN.
template <typename C>
AIT_INLINE Vec<C> max(Vec<C> a, Vec<C> b) {
  return {a.raw > b.raw ? a.raw : b.raw};
}
template <typename C>
AIT_INLINE Vec<C> min(Vec<C> a, Vec<C> b) {
  return {a.raw < b.raw ? a.raw : b.raw};
}

// Bit i is set unless a[i] <= b[i]: where a[i] is greater, or either is NaN.
AIT_INLINE uint32_t not_less_equal_mask(Vec<float> a, Vec<float> b) {
#if defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(_mm_cmpnle_ps(a.raw, b.raw)));
#else
  const auto below = a.raw <= b.raw;
  return (below[0] ? 0u : 1u) | (below[1] ? 0u : 2u) | (below[2] ? 0u : 4u) | (below[3] ? 0u : 8u);
#endif
}
AIT_INLINE uint32_t not_less_equal_mask(Vec<double> a, Vec<double> b) {
#if defined(__SSE2__)
  return uint32_t(_mm_movemask_pd(_mm_cmpnle_pd(a.raw, b.raw)));
#else
  const auto below = a.raw <= b.raw;
  return (below[0] ? 0u : 1u) | (below[1] ? 0u : 2u);
#endif
}

// Sum of all lanes, the upper half onto the lower, until one is left.
AIT_INLINE float reduce_add(Vec<float> x) { return (x.raw[0] + x.raw[2]) + (x.raw[1] + x.raw[3]); }
AIT_INLINE double reduce_add(Vec<double> x) { return x.raw[0] + x.raw[1]; }

// Largest of all lanes; unspecified if one is NaN.
template <typename C>
AIT_INLINE C reduce_max(Vec<C> x) {
  C result = x.raw[0];
  for (int i = 1; i < Vec<C>::size; ++i) result = x.raw[i] > result ? x.raw[i] : result;
  return result;
}

// Lane r of the result is what reduce_add or reduce_max of rows[r] is, for op + or max.
template <typename Op>
AIT_INLINE Vec<float> reduce_each(const Vec<float> (&rows)[4], Op op) {
  const auto lane = [&](int i) {
    return Vec<float>{{rows[0].raw[i], rows[1].raw[i], rows[2].raw[i], rows[3].raw[i]}};
  };
  return op(op(lane(0), lane(2)), op(lane(1), lane(3)));
}
template <typename Op>
AIT_INLINE Vec<double> reduce_each(const Vec<double> (&rows)[2], Op op) {
  const auto lane = [&](int i) { return Vec<double>{{rows[0].raw[i], rows[1].raw[i]}}; };
  return op(lane(0), lane(1));
}

// x * 2^n for integral n of at most twice the exponent range. Multiplies by two powers of about
// half of n each: the first product is exact, so the result is rounded once.
template <typename C>
AIT_INLINE Vec<C> scale_by_power_of_two(Vec<C> x, Vec<C> n) {
  using Types = VecTypes<C>;
  using Integers = typename Types::Integers;
  const Integers exponent = __builtin_convertvector(n.raw, Integers);
  const Integers first = exponent >> 1;
  const Integers second = exponent - first;
  const auto a = (typename Types::Raw)((first + Types::exponent_bias) << Types::mantissa_bits);
  const auto b = (typename Types::Raw)((second + Types::exponent_bias) << Types::mantissa_bits);
  return {x.raw * a * b};
}

}  // namespace
}  // namespace ait::cpu
