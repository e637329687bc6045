// The host's counterpart of csrc/cuda/launch.h: CPU tensors, and launches that run on fibers.
#pragma once

#include <common/checks.h>
#include <cuda/device.h>
#include <cuda/device_limits.h>
#include <torch/csrc/stable/library.h>

#define AIT_KERNEL_DEVICE CPU

namespace ait::cuda {

inline void check_dense(const char* name, const char* argument, const Tensor& tensor,
                        const Tensor* beside = nullptr) {
  check_dense_cpu(name, argument, tensor, beside);
}

template <typename T>
Array<const T> input(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.numel()};
}

// What a kernel does not write stays a number that no test takes for a result.
template <typename T>
Array<T> output(Tensor& tensor) {
  T* data = static_cast<T*>(tensor.mutable_data_ptr());
  if (data != nullptr && !cuda_on_host::settings().dry)
    std::memset(static_cast<void*>(data), 0xff, size_t(tensor.numel()) * sizeof(T));
  return {data, tensor.numel()};
}

template <typename T>
Array<T> no_array() {
  return {};
}

inline Tensor batched_product(const Tensor& a, const Tensor& b, ScalarType dtype) {
  cuda_on_host::launches().push_back({a.size(1), 0, b.size(2)});
  if (cuda_on_host::settings().dry) {
    return torch::stable::new_empty(a, {a.size(0), a.size(1), b.size(2)}, dtype);
  }
  return torch::stable::matmul(contiguous_as(a, dtype), contiguous_as(b, dtype));
}

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  DeviceLimits limits() const {
    return {cuda_on_host::settings().shared_bytes, cuda_on_host::settings().multiprocessors};
  }

  bool dense(bool by_cost) const {
    const int asked = cuda_on_host::settings().dense;
    return asked < 0 ? by_cost : asked == 1;
  }
  // Wherever they fit, unless a path was asked for; without running, as the cost model says.
  bool slabs(bool by_cost) const {
    const cuda_on_host::Settings& settings = cuda_on_host::settings();
    return settings.dry ? by_cost : settings.dense < 0;
  }
  int64_t chunk_bytes(int64_t usual) const {
    return cuda_on_host::settings().dense == 1 ? 1 : usual;
  }

  template <typename... Args>
  void operator()(void (*kernel)(Args...), int64_t blocks, int threads, int64_t shared_bytes,
                  std::type_identity_t<Args>... args) const {
    if (blocks == 0) return;
    cuda_on_host::run_grid(blocks, threads, shared_bytes, [&] { kernel(args...); });
  }
};

}  // namespace ait::cuda
