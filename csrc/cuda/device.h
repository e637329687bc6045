// What kernel bodies are written with, beyond CUDA's own names: arrays, shared memory, storage
// types. `tests/cuda_on_host/include/cuda/device.h` gives the same names to the C++ compiler, with
// every access checked; so a kernel body must reach memory through Array and nothing else.
#pragma once

#include <common/half_types.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace ait::cuda {

// Four values that are loaded and stored together.
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Pack {
  T values[4];
  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

// Elements in global or shared memory. The number of elements is known to the host's checks only.
template <typename T>
class Array {
 public:
  Array() = default;
  __host__ __device__ Array(T* data, int64_t) : data_(data) {}
  template <typename U>
    requires(std::is_same_v<const U, T> && !std::is_const_v<U>)
  __host__ __device__ Array(const Array<U>& other) : data_(other.data_) {}

  __device__ T& operator[](int64_t i) const { return data_[i]; }
  __device__ Array operator+(int64_t offset) const { return {data_ + offset, 0}; }
  // Four elements, the first of them at a multiple of the size of a Pack.
  __device__ auto load4(int64_t i) const {
    return *reinterpret_cast<const Pack<std::remove_const_t<T>>*>(data_ + i);
  }
  __device__ void store4(int64_t i, const Pack<T>& pack) const {
    *reinterpret_cast<Pack<T>*>(data_ + i) = pack;
  }
  // The element before the addition. Integers alone: sums of floats depend on the order.
  __device__ T atomic_add(int64_t i, T value) const {
    static_assert(std::is_integral_v<T>);
    return atomicAdd(data_ + i, value);
  }

 private:
  template <typename U>
  friend class Array;

  T* data_;
};

// Hands out the block's dynamic shared memory: every thread takes the same arrays in the same
// order.
class SharedMemory {
 public:
  template <typename T>
  __device__ Array<T> take(int64_t count) {
    extern __shared__ __align__(16) unsigned char ait_shared_memory[];
    T* data = reinterpret_cast<T*>(ait_shared_memory + used_);
    used_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return {data, count};
  }

 private:
  int64_t used_ = 0;
};

// Stops the kernel with a message, `format` with two integers. The call itself has returned by
// then: torch reports a device-side assertion at the next wait, as for its own operators' indices.
__device__ inline void fail(const char* format, long long first, long long second) {
  printf(format, first, second);
  __assert_fail("bad input, see the line above", "ait", 0, "kernel");
}

__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }
__device__ inline float to_compute(BFloat16 x) {
  return __bfloat162float(__ushort_as_bfloat16(x.bits));
}
__device__ inline float to_compute(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename T, typename C>
__device__ inline T to_storage(C x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return T(x);
  }
}

}  // namespace ait::cuda
