// What all threads of a warp compute together. Every lane gets the same bits.
#pragma once

#include <cuda/device.h>

namespace ait::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename C>
__device__ inline C warp_sum(C value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// The largest value; NaN only where all are NaN.
template <typename C>
__device__ inline C warp_max(C value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const C other = __shfl_xor_sync(kAllLanes, value, step);
    value = fmax(value, other);
  }
  return value;
}

// The type in which sums are computed.
template <typename T>
using ComputeOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Four elements from i on, at a multiple of the size of a Pack, as the compute type. Without a
// branch, so that the loads of a loop are on their way together.
template <typename T>
__device__ inline auto load_pack(const Array<const T>& source, int64_t i) {
  const Pack<T> raw = source.load4(i);
  Pack<ComputeOf<T>> result;
#pragma unroll
  for (int c = 0; c < 4; ++c) result[c] = to_compute(raw[c]);
  return result;
}

// Four elements from i on as the compute type, of which `count` exist; the others are zero.
template <typename T>
__device__ inline auto load4(const Array<const T>& source, int64_t i, int64_t count, bool aligned) {
  if (aligned && count >= 4) return load_pack(source, i);
  Pack<ComputeOf<T>> result;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    result[c] = 0;
    if (c < count) {
      const T raw = source[i + c];
      result[c] = to_compute(raw);
    }
  }
  return result;
}

template <typename T, typename C>
__device__ inline void store4(const Array<T>& target, int64_t i, int64_t count, bool aligned,
                              const Pack<C>& values) {
  if (aligned && count >= 4) {
    Pack<T> raw;
#pragma unroll
    for (int c = 0; c < 4; ++c) raw[c] = to_storage<T>(values[c]);
    target.store4(i, raw);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < count) target[i + c] = to_storage<T>(values[c]);
    }
  }
}

}  // namespace ait::cuda
