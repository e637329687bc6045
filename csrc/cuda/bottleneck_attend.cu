// ait::bottleneck_attend and its backward on CUDA: checks, allocation, launches.
#include <cuda/dispatch.h>
#include <cuda/launch.h>

#include <optional>
#include <tuple>

#include "bottleneck_attend_backward_kernel.h"
#include "bottleneck_attend_dense.h"
#include "bottleneck_attend_slab_kernel.h"

namespace ait::cuda {
namespace {

using torch::stable::new_empty;

constexpr const char* kName = "bottleneck_attend";

AttendPlan plan_of(const Launcher& launch, const Tensor& tokens, const Tensor& indices) {
  return plan_attend(indices.size(0), indices.size(1), tokens.size(0), tokens.size(1),
                     tokens.scalar_type() == ScalarType::Double ? 8 : 4, launch.limits());
}

// The shape decides; the harness may ask for either path.
bool takes_dense_path(const Launcher& launch, const AttendPlan& plan, const Tensor& tokens) {
  const AttendDtype dtype = attend_dtype(tokens.scalar_type());
  const bool is_possible = dtype != AttendDtype::float16 && plan.num_tokens > 0 && plan.width > 0;
  return is_possible && launch.dense(prefers_dense(plan, dtype));
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_attend(const Tensor& query_in,
                                                     const Tensor& tokens_in,
                                                     const Tensor& indices_in) {
  check_attention(check_dense, kName, query_in, tokens_in, indices_in);
  const Launcher launch(tokens_in);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const Tensor query = contiguous_as(query_in, dtype);
  const Tensor tokens = as_contiguous(tokens_in);
  const Tensor indices = as_contiguous(indices_in);
  AttendPlan plan = plan_of(launch, tokens, indices);
  const bool dense = takes_dense_path(launch, plan, tokens);
  if (dense) plan = whole_rows(plan);
  Tensor pooled = new_empty(query, {plan.num_rows, plan.width});
  Tensor gates = new_empty(query, {plan.num_rows, plan.num_entries});
  Tensor lse = new_empty(query, {plan.num_rows});
  Tensor part_max = new_empty(query, {plan.num_rows, plan.parts});
  Tensor part_sum = new_empty(query, {plan.num_rows, plan.parts});
  const bool one_part = plan.parts == 1;
  Tensor part_pooled = new_empty(query, {one_part ? 0 : plan.num_rows, plan.parts, plan.width});

  dispatch(tokens.scalar_type(), [&]<typename S>() {
    using C = ComputeOf<S>;
    const Array<C> pooled_array = output<C>(pooled);
    const AttendForward<S> args{
        plan,
        input<C>(query),
        input<S>(tokens),
        input<int64_t>(indices),
        has_aligned_rows(query, plan.width) && has_aligned_rows(pooled, plan.width),
        has_aligned_rows(tokens, plan.width),
        dense,
        output<C>(part_max),
        output<C>(part_sum),
        one_part ? pooled_array : output<C>(part_pooled),
        pooled_array,
        output<C>(gates),
        output<C>(lse)};
    if (dense) {
      const AttendDense<S> path(launch, plan, tokens, args.indices);
      path.dots(query, args.gates);
      launch(&attend_dense_softmax<C>, plan.num_rows, kAttendThreads,
             2 * round_up(kAttendWarps * int64_t(sizeof(C)), 16), plan, args.indices, args.gates,
             args.lse);
      path.weighted_sums(args.gates, query, args.pooled);
    }
    launch(&attend_parts<S>, plan.num_rows * plan.parts, kAttendThreads, plan.part_bytes, args);
    if (!one_part) launch(&attend_combine<S>, plan.num_rows, kAttendThreads, 0, args);
  });
  return {pooled, gates, lse};
}

template <typename T>
Array<const T> input_or_none(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? input<T>(*tensor) : Array<const T>(no_array<const T>());
}

std::tuple<Tensor, Tensor> bottleneck_attend_backward(
    const std::optional<Tensor>& grad_pooled_in, const std::optional<Tensor>& grad_gates_in,
    const std::optional<Tensor>& grad_lse_in, const Tensor& query_in, const Tensor& tokens_in,
    const Tensor& indices_in, const Tensor& pooled_in, const Tensor& gates_in) {
  check_attention(check_dense, kName, query_in, tokens_in, indices_in);
  const AttendResults results =
      check_attend_results(check_dense, kName, query_in, tokens_in, indices_in,
                           {pooled_in, gates_in, grad_pooled_in, grad_gates_in, grad_lse_in});
  const Launcher launch(tokens_in);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const Tensor query = contiguous_as(query_in, dtype);
  const Tensor tokens = as_contiguous(tokens_in);
  const Tensor indices = as_contiguous(indices_in);
  AttendPlan plan = plan_of(launch, tokens, indices);
  const bool dense = results.grad_pooled.has_value() && takes_dense_path(launch, plan, tokens);
  if (dense) plan = whole_rows(plan);
  const int64_t rows = plan.num_rows, entries = plan.num_entries, width = plan.width;
  const auto& [pooled, gates, grad_pooled, grad_gates, grad_lse] = results;
  Tensor grad_query = new_empty(query, {rows, width});
  Tensor grad_tokens = new_empty(tokens, {plan.num_tokens, width});
  Tensor offsets = new_empty(query, {rows});
  Tensor takes_part = new_empty(query, {rows}, ScalarType::Int);
  Tensor grad_logits = new_empty(query, {rows, entries});
  const bool one_part = plan.parts == 1;
  Tensor part_query = new_empty(query, {one_part ? 0 : rows, plan.parts, width});
  const bool slabs = !dense && plan.slab_columns > 0 &&
                     launch.slabs(prefers_slabs(plan, dtype == ScalarType::Double ? 8 : 4));
  const int64_t sorted = slabs ? rows * entries : 0, sorted_tokens = slabs ? plan.num_tokens : 0;
  Tensor begins = new_empty(query, {sorted_tokens}, ScalarType::Long);
  Tensor ends = new_empty(query, {sorted_tokens}, ScalarType::Long);
  Tensor entry_rows = new_empty(query, {sorted}, ScalarType::Int);
  Tensor entry_gates = new_empty(query, {sorted});
  Tensor entry_grads = new_empty(query, {sorted});
  const int64_t listed_rows = plan.rows_in_shared ? 0 : plan.token_blocks * rows;
  Tensor masks = new_empty(query, {listed_rows}, ScalarType::Int);
  Tensor starts = new_empty(query, {listed_rows}, ScalarType::Long);
  const bool query_aligned = has_aligned_rows(query, width) &&
                             has_aligned_rows(grad_query, width) &&
                             (!grad_pooled || has_aligned_rows(*grad_pooled, width));

  dispatch(tokens.scalar_type(), [&]<typename S>() {
    using C = ComputeOf<S>;
    const Array<C> grad_query_array = output<C>(grad_query);
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
        dense,
        output<C>(offsets),
        output<int>(takes_part),
        output<C>(grad_logits),
        one_part ? grad_query_array : output<C>(part_query),
        grad_query_array,
        output<S>(grad_tokens),
        output<unsigned>(masks),
        output<int64_t>(starts),
        output<int64_t>(begins),
        output<int64_t>(ends),
        output<int>(entry_rows),
        output<C>(entry_gates),
        output<C>(entry_grads)};
    launch(&attend_offsets<S>, rows, kWarpSize, 0, args);
    const AttendDense<S> path(launch, plan, tokens, args.indices);
    if (dense) {
      path.dots(*grad_pooled, args.grad_logits);
      launch(&attend_dense_grad_logits<S>, rows, kAttendThreads, 0, args);
      path.weighted_sums(args.grad_logits, query, args.grad_query);
    }
    launch(&attend_backward_parts<S>, rows * plan.parts, kAttendThreads, plan.part_bytes, args);
    if (!one_part) launch(&attend_backward_combine<S>, rows, kAttendThreads, 0, args);
    if (dense) {
      path.token_gradients(args.gates, args.grad_logits, query, *grad_pooled, args.grad_tokens);
    }
    if (slabs) {
      launch(&attend_backward_sort<S>, plan.token_blocks, kAttendThreads, plan.listing_bytes, args);
      launch(&attend_backward_slabs<S>, plan.slabs * plan.slab_ranges, kAttendSlabThreads,
             plan.slab_bytes, args);
    } else {
      launch(&attend_backward_tokens<S>, plan.token_blocks, kAttendThreads, plan.shared_bytes,
             args);
    }
  });
  return {contiguous_as(grad_query, query_in.scalar_type()), grad_tokens};
}

}  // namespace
}  // namespace ait::cuda

STABLE_TORCH_LIBRARY_IMPL(ait, AIT_KERNEL_DEVICE, m) {
  m.impl("bottleneck_attend", TORCH_BOX(&ait::cuda::bottleneck_attend));
  m.impl("bottleneck_attend_backward", TORCH_BOX(&ait::cuda::bottleneck_attend_backward));
}
