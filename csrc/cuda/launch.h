// Between the operators and the kernels: device, stream, launches, and tensors as arrays.
// `tests/cuda_on_host/include/cuda/launch.h` gives the same names to the C++ compiler.
#pragma once

#include <common/checks.h>
#include <cuda/device.h>
#include <cuda/device_limits.h>
#include <cuda/messages.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <stdexcept>
#include <string>

// The dispatch key for which the operators are registered.
#define AIT_KERNEL_DEVICE CUDA

namespace ait::cuda {

// A dense tensor in the memory of a CUDA device, of that of `beside` where it is given.
inline void check_dense(const char* name, const char* argument, const Tensor& tensor,
                        const Tensor* beside = nullptr) {
  STD_TORCH_CHECK(tensor.defined() && tensor.layout() == torch::headeronly::Layout::Strided, name,
                  ": expected ", argument, " to be a dense tensor");
  const auto device_of = [](const Tensor& x) {
    return x.is_cuda() ? int(x.get_device_index()) : -1;
  };
  const int device = device_of(tensor);
  const int expected = beside == nullptr ? -1 : device_of(*beside);
  STD_TORCH_CHECK(device >= 0 && (expected < 0 || device == expected),
                  wrong_device(name, argument, expected, device));
}

template <typename T>
Array<const T> input(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.numel()};
}

template <typename T>
Array<T> output(Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.numel()};
}

template <typename T>
Array<T> no_array() {
  return {nullptr, 0};
}

// a (G, n, d) times b (G, d, m) by the library, summed and returned in float32 (float64 for float64
// operands). Half-precision operands run on tensor cores; float32 ones as torch's settings say. The
// variant with `out` is called since autocast does not know it: it would make a result of another
// dtype.
inline Tensor batched_product(const Tensor& a, const Tensor& b, ScalarType dtype) {
  if (a.scalar_type() == dtype) {
    Tensor product = torch::stable::new_empty(a, {a.size(0), a.size(1), b.size(2)});
    StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                            torch::stable::detail::from(product)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", "out", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(dtype)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "dtype", stack, TORCH_ABI_VERSION));
  Tensor product = torch::stable::detail::to<Tensor>(stack[0]);
  STD_TORCH_CHECK(product.scalar_type() == dtype, "ait: expected aten::bmm.dtype to give float32");
  return product;
}

// Makes a tensor's device the current one for as long as it lives, and launches on torch's current
// stream of that device.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
      : device_(tensor.get_device_index()),
        guard_(torch::stable::accelerator::DeviceIndex(device_)) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  DeviceLimits limits() const {
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            attribute(cudaDevAttrMultiProcessorCount)};
  }

  // Whether to take a dense path: as the cost model says. (The harness can ask for either.)
  bool dense(bool by_cost) const { return by_cost; }
  // Whether to take slabs, where they fit: the same.
  bool slabs(bool by_cost) const { return by_cost; }
  // Bytes of a matrix that is made chunk by chunk. (The harness takes fewer, so as to see chunks.)
  int64_t chunk_bytes(int64_t usual) const { return usual; }

  // Runs `blocks` blocks of `threads` threads; none where there are no blocks.
  template <typename... Args>
  void operator()(void (*kernel)(Args...), int64_t blocks, int threads, int64_t shared_bytes,
                  std::type_identity_t<Args>... args) const {
    if (blocks == 0) return;
    if (shared_bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes)));
    }
    kernel<<<unsigned(blocks), threads, size_t(shared_bytes), stream_>>>(args...);
    check(cudaGetLastError());
  }

 private:
  int64_t attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

  void check(cudaError_t error) const {
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      const int major = int(attribute(cudaDevAttrComputeCapabilityMajor));
      const int minor = int(attribute(cudaDevAttrComputeCapabilityMinor));
      if (!is_built_for(AIT_CUDA_ARCHITECTURES, major, minor)) {
        throw std::runtime_error(unsupported_device(AIT_CUDA_ARCHITECTURES, device_, major, minor));
      }
    }
    STD_CUDA_CHECK(error);
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace ait::cuda
