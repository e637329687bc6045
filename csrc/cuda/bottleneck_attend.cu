// ait::bottleneck_attend and its backward on CUDA: checks, allocation, launches.
#include <cuda/dispatch.h>
#include <cuda/launch.h>

#include <optional>
#include <tuple>

#include "bottleneck_attend_kernel.h"

namespace ait::cuda {
namespace {

using torch::stable::new_empty;

constexpr const char* kName = "bottleneck_attend";

void check_inputs(const Tensor& query, const Tensor& tokens, const Tensor& indices) {
  check_dense(kName, "query", query);
  check_dense(kName, "tokens", tokens, &query);
  check_dense(kName, "indices", indices, &query);
  check_shape(kName, "query", query, {-1, -1});
  check_shape(kName, "tokens", tokens, {-1, query.size(1)});
  check_shape(kName, "indices", indices, {query.size(0), -1});
  check_dtype(kName, "indices", indices, ScalarType::Long);
  check_token_dtypes(kName, "query", query, "tokens", tokens);
}

// Lists have to be ascending and unique, -1 last. Where that cannot be looked at, an index out of
// range takes no part, and one out of order makes the gradient of the tokens wrong.
void check_lists(const Tensor& indices, int64_t num_tokens) {
  if (!can_read_values(indices)) return;
  const int64_t* data = indices.const_data_ptr<int64_t>();
  const int64_t entries = indices.size(1);
  for (int64_t row = 0; row < indices.size(0); ++row) {
    int64_t previous = -1;
    bool has_ended = false, is_right = true;
    for (int64_t j = 0; j < entries; ++j) {
      const int64_t index = data[row * entries + j];
      is_right =
          is_right && (index == -1 || (!has_ended && index > previous && index < num_tokens));
      has_ended = has_ended || index == -1;
      previous = index;
    }
    STD_TORCH_CHECK(is_right, kName, ": expected indices ascending and unique in [0, ", num_tokens,
                    "), -1 last, got something else in row ", row);
  }
}

AttendPlan plan_of(const Launcher& launch, const Tensor& tokens, const Tensor& indices) {
  return plan_attend(indices.size(0), indices.size(1), tokens.size(0), tokens.size(1),
                     launch.limits());
}

// Shared memory of the kernels that take a part: tokens, and two numbers each.
template <typename C>
constexpr int64_t kPartBytes = kAttendPart * int64_t(8 + 2 * sizeof(C));

std::tuple<Tensor, Tensor, Tensor> bottleneck_attend(const Tensor& query_in,
                                                     const Tensor& tokens_in,
                                                     const Tensor& indices_in) {
  check_inputs(query_in, tokens_in, indices_in);
  const Launcher launch(tokens_in);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const Tensor query = contiguous_as(query_in, dtype);
  const Tensor tokens = as_contiguous(tokens_in);
  const Tensor indices = as_contiguous(indices_in);
  check_lists(indices, tokens.size(0));
  const AttendPlan plan = plan_of(launch, tokens, indices);
  Tensor pooled = new_empty(query, {plan.num_rows, plan.width});
  Tensor gates = new_empty(query, {plan.num_rows, plan.num_entries});
  Tensor lse = new_empty(query, {plan.num_rows});
  Tensor part_max = new_empty(query, {plan.num_rows, plan.parts});
  Tensor part_sum = new_empty(query, {plan.num_rows, plan.parts});
  Tensor part_pooled = new_empty(query, {plan.num_rows, plan.parts, plan.width});

  dispatch(tokens.scalar_type(), [&]<typename S>() {
    using C = ComputeOf<S>;
    const AttendForward<S> args{
        plan,
        input<C>(query),
        input<S>(tokens),
        input<int64_t>(indices),
        has_aligned_rows(query, plan.width) && has_aligned_rows(part_pooled, plan.width),
        has_aligned_rows(tokens, plan.width),
        output<C>(part_max),
        output<C>(part_sum),
        output<C>(part_pooled),
        output<C>(pooled),
        output<C>(gates),
        output<C>(lse)};
    launch(&attend_parts<S>, plan.num_rows * plan.parts, kAttendThreads, kPartBytes<C>, args);
    launch(&attend_combine<S>, plan.num_rows, kAttendThreads, 0, args);
  });
  return {pooled, gates, lse};
}

Tensor checked(const char* argument, const Tensor& tensor, const Tensor& beside,
               std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_dense(kName, argument, tensor, &beside);
  check_shape(kName, argument, tensor, shape);
  check_dtype(kName, argument, tensor, dtype);
  return as_contiguous(tensor);
}

// An absent gradient stands for zero.
std::optional<Tensor> checked(const char* argument, const std::optional<Tensor>& gradient,
                              const Tensor& beside, std::initializer_list<int64_t> shape,
                              ScalarType dtype) {
  if (!gradient.has_value() || !gradient->defined()) return std::nullopt;
  return checked(argument, *gradient, beside, shape, dtype);
}

template <typename T>
Array<const T> input_or_none(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? input<T>(*tensor) : Array<const T>(no_array<const T>());
}

std::tuple<Tensor, Tensor> bottleneck_attend_backward(
    const std::optional<Tensor>& grad_pooled_in, const std::optional<Tensor>& grad_gates_in,
    const std::optional<Tensor>& grad_lse_in, const Tensor& query_in, const Tensor& tokens_in,
    const Tensor& indices_in, const Tensor& pooled_in, const Tensor& gates_in) {
  check_inputs(query_in, tokens_in, indices_in);
  const Launcher launch(tokens_in);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const Tensor query = contiguous_as(query_in, dtype);
  const Tensor tokens = as_contiguous(tokens_in);
  const Tensor indices = as_contiguous(indices_in);
  check_lists(indices, tokens.size(0));
  const AttendPlan plan = plan_of(launch, tokens, indices);
  const int64_t rows = plan.num_rows, entries = plan.num_entries, width = plan.width;
  const Tensor pooled = checked("pooled", pooled_in, query, {rows, width}, dtype);
  const Tensor gates = checked("gates", gates_in, query, {rows, entries}, dtype);
  const auto grad_pooled = checked("grad_pooled", grad_pooled_in, query, {rows, width}, dtype);
  const auto grad_gates = checked("grad_gates", grad_gates_in, query, {rows, entries}, dtype);
  const auto grad_lse = checked("grad_lse", grad_lse_in, query, {rows}, dtype);
  Tensor grad_query = new_empty(query, {rows, width});
  Tensor grad_tokens = new_empty(tokens, {plan.num_tokens, width});
  Tensor offsets = new_empty(query, {rows});
  Tensor takes_part = new_empty(query, {rows}, ScalarType::Int);
  Tensor grad_logits = new_empty(query, {rows, entries});
  Tensor part_query = new_empty(query, {rows, plan.parts, width});
  const int64_t listed_rows = plan.rows_in_shared ? 0 : plan.token_blocks * rows;
  Tensor masks = new_empty(query, {listed_rows}, ScalarType::Int);
  Tensor starts = new_empty(query, {listed_rows}, ScalarType::Long);
  const bool query_aligned = has_aligned_rows(query, width) &&
                             has_aligned_rows(part_query, width) &&
                             (!grad_pooled || has_aligned_rows(*grad_pooled, width));

  dispatch(tokens.scalar_type(), [&]<typename S>() {
    using C = ComputeOf<S>;
    const AttendBackward<S> args{
        plan,
        input<C>(query),
        input<C>(pooled),
        input<S>(tokens),
        input<int64_t>(indices),
        input<C>(gates),
        input_or_none<C>(grad_pooled),
        input_or_none<C>(grad_gates),
        input_or_none<C>(grad_lse),
        grad_pooled.has_value(),
        grad_gates.has_value(),
        grad_lse.has_value(),
        query_aligned,
        has_aligned_rows(tokens, width) && has_aligned_rows(grad_tokens, width),
        output<C>(offsets),
        output<int>(takes_part),
        output<C>(grad_logits),
        output<C>(part_query),
        output<C>(grad_query),
        output<S>(grad_tokens),
        output<unsigned>(masks),
        output<int64_t>(starts)};
    launch(&attend_offsets<S>, rows, kWarpSize, 0, args);
    launch(&attend_backward_parts<S>, rows * plan.parts, kAttendThreads, kPartBytes<C>, args);
    launch(&attend_backward_combine<S>, rows, kAttendThreads, 0, args);
    launch(&attend_backward_tokens<S>, plan.token_blocks, kAttendThreads, plan.shared_bytes, args);
  });
  return {contiguous_as(grad_query, query_in.scalar_type()), grad_tokens};
}

}  // namespace
}  // namespace ait::cuda

STABLE_TORCH_LIBRARY_IMPL(ait, AIT_KERNEL_DEVICE, m) {
  m.impl("bottleneck_attend", TORCH_BOX(&ait::cuda::bottleneck_attend));
  m.impl("bottleneck_attend_backward", TORCH_BOX(&ait::cuda::bottleneck_attend_backward));
}
