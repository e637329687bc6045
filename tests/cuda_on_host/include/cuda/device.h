// The host's counterpart of csrc/cuda/device.h: CUDA's names for the C++ compiler, and arrays that
// check every access.
#pragma once

#include <common/half_types.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <type_traits>

#include "../../runtime.h"

#define __device__
#define __global__
#define __launch_bounds__(...)

#define threadIdx ::cuda_on_host::thread_index
#define blockIdx ::cuda_on_host::block_index
#define blockDim ::cuda_on_host::block_size
#define gridDim ::cuda_on_host::grid_size

namespace ait::cuda {

using cuda_on_host::Site;
using std::exp;
using std::fmax;
using std::fmin;
using std::isinf;
using std::log;
using std::sqrt;

inline void __syncthreads(const Site& site = Site::current()) { cuda_on_host::sync_threads(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, const Site& site = Site::current()) {
  cuda_on_host::sync_warp(mask, site);
}

// The value of lane `source` of the mask.
template <typename T>
T value_of_lane(unsigned mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const cuda_on_host::WarpValues all = cuda_on_host::exchange(mask, bits, site);
  if ((mask >> source & 1) == 0) cuda_on_host::fail("a shuffle reads a lane outside its mask");
  std::memcpy(&value, &all.values[source], sizeof(T));
  return value;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, const Site& site = Site::current()) {
  return value_of_lane(mask, value, source & 31, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, const Site& site = Site::current()) {
  return value_of_lane(mask, value, cuda_on_host::lane() ^ bits, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by, int = 32, const Site& site = Site::current()) {
  const int own = cuda_on_host::lane();
  return value_of_lane(mask, value, own < by ? own : own - by, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by, int = 32, const Site& site = Site::current()) {
  const int own = cuda_on_host::lane();
  return value_of_lane(mask, value, own + by > 31 ? own : own + by, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const Site& site = Site::current()) {
  const cuda_on_host::WarpValues all = cuda_on_host::exchange(mask, predicate != 0, site);
  unsigned result = 0;
  for (int l = 0; l < 32; ++l) result |= unsigned(all.values[l] != 0) << l;
  return result & mask;
}
inline int __any_sync(unsigned mask, int predicate, const Site& site = Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const Site& site = Site::current()) {
  return __ballot_sync(mask, predicate == 0, site) == 0;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int64_t __double_as_longlong(double x) { return std::bit_cast<int64_t>(x); }
inline double __longlong_as_double(int64_t x) { return std::bit_cast<double>(x); }

template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Pack {
  T values[4];
  T& operator[](int i) { return values[i]; }
  const T& operator[](int i) const { return values[i]; }
};

template <typename T>
class Array {
  using Value = std::remove_const_t<T>;

 public:
  // An element that is read where it is converted, and written where it is assigned to.
  class Element {
   public:
    Element(const Array& array, int64_t index) : array_(array), index_(index) {}
    operator Value() const { return array_.read(index_); }
    const Element& operator=(Value value) const { return array_.write(index_, value), *this; }
    const Element& operator=(const Element& other) const { return *this = Value(other); }
    const Element& operator+=(Value value) const { return *this = Value(*this) + value; }

   private:
    const Array array_;
    const int64_t index_;
  };

  Array() = default;
  // Read-only arrays hold values; all others have to be written before they are read.
  Array(T* data, int64_t count)
      : data_(data),
        shadow_(data == nullptr ? nullptr
                                : cuda_on_host::new_global_shadow(count, std::is_const_v<T>)) {}
  Array(T* data, cuda_on_host::Shadow* shadow) : data_(data), shadow_(shadow) {}
  // Another kernel reads what one wrote.
  template <typename U>
    requires(std::is_same_v<const U, T> && !std::is_const_v<U>)
  Array(const Array<U>& other)
      : data_(other.data_), shadow_(other.shadow_), offset_(other.offset_) {}

  auto operator[](int64_t i) const {
    if constexpr (std::is_const_v<T>) {
      return read(i);
    } else {
      return Element(*this, i);
    }
  }
  Array operator+(int64_t offset) const {
    Array result = *this;
    result.offset_ += offset;
    return result;
  }
  Pack<Value> load4(int64_t i) const {
    check_pack(i);
    Pack<Value> pack;
    for (int c = 0; c < 4; ++c) pack[c] = read(i + c);
    return pack;
  }
  void store4(int64_t i, const Pack<T>& pack) const {
    check_pack(i);
    for (int c = 0; c < 4; ++c) write(i + c, pack[c]);
  }
  T atomic_add(int64_t i, T value) const {
    static_assert(std::is_integral_v<T>);
    touch(i, cuda_on_host::Access::atomic);
    const T before = data_[offset_ + i];
    data_[offset_ + i] = before + value;
    return before;
  }

  Value read(int64_t i) const {
    touch(i, cuda_on_host::Access::read);
    return data_[offset_ + i];
  }
  void write(int64_t i, Value value) const {
    touch(i, cuda_on_host::Access::write);
    data_[offset_ + i] = value;
  }

 private:
  template <typename U>
  friend class Array;

  void touch(int64_t i, cuda_on_host::Access access) const {
    if (shadow_ == nullptr || offset_ + i < 0 || offset_ + i >= shadow_->size()) {
      cuda_on_host::fail("out of bounds: thread " + std::to_string(threadIdx.x) +
                         " reaches element " + std::to_string(offset_ + i) + " of an array of " +
                         std::to_string(shadow_ == nullptr ? 0 : shadow_->size()));
    }
    shadow_->touch(offset_ + i, access);
  }
  void check_pack(int64_t i) const {
    if (reinterpret_cast<uintptr_t>(data_ + offset_ + i) % alignof(Pack<Value>) != 0) {
      cuda_on_host::fail("misaligned: four elements from " + std::to_string(offset_ + i) + " on");
    }
  }

  T* data_ = nullptr;
  cuda_on_host::Shadow* shadow_ = nullptr;
  int64_t offset_ = 0;
};

class SharedMemory {
 public:
  template <typename T>
  Array<T> take(int64_t count) {
    const cuda_on_host::SharedPiece piece =
        cuda_on_host::take_shared(used_, count, int64_t(sizeof(T)));
    used_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return {static_cast<T*>(piece.data), piece.shadow};
  }

 private:
  int64_t used_ = 0;
};

inline void fail(const char* format, long long first, long long second) {
  char message[256];
  std::snprintf(message, sizeof message, format, first, second);
  throw std::runtime_error(message);
}

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_compute(Float16 x) { return float(std::bit_cast<_Float16>(x.bits)); }

template <typename T, typename C>
T to_storage(C x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = std::bit_cast<uint32_t>(float(x));
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {std::bit_cast<uint16_t>(_Float16(x))};
  } else {
    return T(x);
  }
}

}  // namespace ait::cuda
