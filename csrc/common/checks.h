// Checks of what reaches an operator: Python's front end checks first, with better messages, but
// torch.ops.ait, exported programs and C++ callers bypass it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
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

// A device's check that a tensor is dense and lies in its memory, where `beside` does, so that its
// data pointer can be used.
using CheckDense = void (*)(const char* name, const char* argument, const Tensor& tensor,
                            const Tensor* beside);

inline void check_dense_cpu(const char* name, const char* argument, const Tensor& tensor,
                            const Tensor* = nullptr) {
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

// ---- What the operators ask of their arguments on every device ----

inline void check_retrieval(CheckDense check_dense, const char* name, const Tensor& state,
                            const Tensor& patterns, double beta, int64_t steps) {
  constexpr int64_t kMaxSteps = 10'000;
  check_dense(name, "state", state, nullptr);
  check_dense(name, "patterns", patterns, &state);
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

inline void check_tolerance(const char* name, double tol) {
  STD_TORCH_CHECK(std::isfinite(tol) && tol >= 0, name, ": expected a finite tol >= 0, got ", tol);
}

// What the backward of hopfield_retrieve is given beside the inputs of the forward.
inline void check_retrieval_results(CheckDense check_dense, const char* name, const Tensor& state,
                                    const Tensor& grad_out, const Tensor& steps_taken) {
  check_dense(name, "grad_out", grad_out, &state);
  check_shape(name, "grad_out", grad_out, {state.size(0), state.size(1)});
  check_dtype(name, "grad_out", grad_out, state.scalar_type());
  check_dense(name, "steps_taken", steps_taken, &state);
  check_shape(name, "steps_taken", steps_taken, {state.size(0)});
  check_dtype(name, "steps_taken", steps_taken, ScalarType::Long);
}

// Returns the dtype to which tokens are rounded before they are multiplied.
inline ScalarType check_selection(CheckDense check_dense, const char* name, const Tensor& query,
                                  const Tensor& tokens, int64_t k,
                                  const std::optional<Tensor>& mask,
                                  const std::optional<ScalarType>& selection_dtype) {
  check_dense(name, "query", query, nullptr);
  check_dense(name, "tokens", tokens, &query);
  check_shape(name, "query", query, {-1, -1, -1});
  if (tokens.dim() == 2 && query.size(0) == 1) {
    check_shape(name, "tokens", tokens, {-1, query.size(2)});
  } else {
    check_shape(name, "tokens", tokens, {-1, query.size(0), query.size(2)});
  }
  check_token_dtypes(name, "query", query, "tokens", tokens);
  const int64_t num_tokens = tokens.size(0);
  STD_TORCH_CHECK(k >= 1, name, ": expected k of at least 1, got ", k);
  STD_TORCH_CHECK(num_tokens <= INT32_MAX, name, ": expected fewer than 2^31 tokens, got ",
                  num_tokens);
  if (mask.has_value()) {
    check_dense(name, "mask", *mask, &query);
    check_shape(name, "mask", *mask, {num_tokens});
    check_dtype(name, "mask", *mask, ScalarType::Bool);
  }
  const ScalarType dtype = compute_dtype(tokens.scalar_type());
  const ScalarType rounding = selection_dtype.value_or(dtype);
  STD_TORCH_CHECK(rounding == dtype || rounding == ScalarType::Float ||
                      rounding == ScalarType::BFloat16 || rounding == ScalarType::Half,
                  name, ": expected selection_dtype None, float32, bfloat16 or float16, got ",
                  dtype_name(rounding));
  return rounding;
}

inline void check_attention(CheckDense check_dense, const char* name, const Tensor& query,
                            const Tensor& tokens, const Tensor& indices) {
  check_dense(name, "query", query, nullptr);
  check_dense(name, "tokens", tokens, &query);
  check_dense(name, "indices", indices, &query);
  check_shape(name, "query", query, {-1, -1});
  check_shape(name, "tokens", tokens, {-1, query.size(1)});
  check_shape(name, "indices", indices, {query.size(0), -1});
  check_dtype(name, "indices", indices, ScalarType::Long);
  check_token_dtypes(name, "query", query, "tokens", tokens);
}

// What the backward of bottleneck_attend is given beside the inputs of the forward: its outputs and
// their gradients, of which an absent one stands for zero.
struct AttendResults {
  Tensor pooled, gates;
  std::optional<Tensor> grad_pooled, grad_gates, grad_lse;
};

// Checks the results of an attention with these inputs, and returns them contiguous.
inline AttendResults check_attend_results(CheckDense check_dense, const char* name,
                                          const Tensor& query, const Tensor& tokens,
                                          const Tensor& indices, const AttendResults& given) {
  const ScalarType dtype = compute_dtype(tokens.scalar_type());
  const int64_t rows = indices.size(0);
  const auto checked = [&](const char* argument, const Tensor& tensor,
                           std::initializer_list<int64_t> shape) {
    check_dense(name, argument, tensor, &query);
    check_shape(name, argument, tensor, shape);
    check_dtype(name, argument, tensor, dtype);
    return as_contiguous(tensor);
  };
  const auto checked_gradient = [&](const char* argument, const std::optional<Tensor>& gradient,
                                    std::initializer_list<int64_t> shape) -> std::optional<Tensor> {
    if (!gradient.has_value() || !gradient->defined()) return std::nullopt;
    return checked(argument, *gradient, shape);
  };
  const auto rows_by_width = {rows, query.size(1)}, rows_by_entries = {rows, indices.size(1)};
  return {checked("pooled", given.pooled, rows_by_width),
          checked("gates", given.gates, rows_by_entries),
          checked_gradient("grad_pooled", given.grad_pooled, rows_by_width),
          checked_gradient("grad_gates", given.grad_gates, rows_by_entries),
          checked_gradient("grad_lse", given.grad_lse, {rows})};
}

}  // namespace ait
