// Checks of what reaches an operator: Python's front end checks first, with better messages, but
// torch.ops.ait, exported programs and C++ callers bypass it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace ait {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + ")";
}

// A dense tensor in CPU memory, whose data pointer can be used.
inline void check_dense_cpu(const char* name, const char* argument, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.defined() && tensor.is_cpu() && tensor.layout() == torch::headeronly::Layout::Strided,
      name, ": expected ", argument, " to be a dense CPU tensor");
}

// The shape; -1 stands for any size.
inline void check_shape(const char* name, const char* argument, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool matches = tensor.dim() == int64_t(shape.size());
  std::string expected = "(";
  int64_t i = 0;
  for (const int64_t size : shape) {
    matches = matches && (size == -1 || tensor.size(i) == size);
    expected += (i > 0 ? ", " : "") + (size == -1 ? std::string("*") : std::to_string(size));
    ++i;
  }
  STD_TORCH_CHECK(matches, name, ": expected ", argument, " of shape ", expected, "), got ",
                  shape_text(tensor));
}

inline void check_dtype(const char* name, const char* argument, const Tensor& tensor,
                        ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ", argument, " of dtype ",
                  dtype_name(dtype), ", got ", dtype_name(tensor.scalar_type()));
}

// The dtype of what asks (query, patterns) and of what is asked (tokens, state).
inline void check_token_dtypes(const char* name, const char* asking_name, const Tensor& asking,
                               const char* tokens_name, const Tensor& tokens) {
  const ScalarType dtype = tokens.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  name, ": expected ", tokens_name,
                  " of dtype float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  STD_TORCH_CHECK(asking.scalar_type() == ScalarType::Float || asking.scalar_type() == dtype, name,
                  ": expected ", asking_name, " of dtype float32 or that of ", tokens_name,
                  ", got ", dtype_name(asking.scalar_type()));
}

// What hopfield_retrieve asks of its arguments on every device.
inline void check_retrieval(const char* name, const Tensor& state, const Tensor& patterns,
                            double beta, int64_t steps) {
  constexpr int64_t kMaxSteps = 10'000;
  check_shape(name, "state", state, {-1, -1});
  check_shape(name, "patterns", patterns, {-1, state.size(1)});
  STD_TORCH_CHECK(patterns.size(0) >= 1, name, ": expected at least one pattern, got shape ",
                  shape_text(patterns));
  check_token_dtypes(name, "patterns", patterns, "state", state);
  STD_TORCH_CHECK(std::isfinite(beta) && beta > 0, name, ": expected a finite beta > 0, got ",
                  beta);
  STD_TORCH_CHECK(steps >= 1 && steps <= kMaxSteps, name, ": expected steps from 1 to ", kMaxSteps,
                  ", got ", steps);
}

// The dtype in which the operators compute for tokens of `dtype`.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself where it is contiguous already, without a call to the dispatcher.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Contiguous, in the dtype `dtype`.
inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return as_contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

}  // namespace ait
