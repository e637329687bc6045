// The dense path of bottleneck_attend: the library multiplies with all tokens, chunk by chunk, and
// small kernels go between the lists and its matrices.
//
// Where a token or a row that a list leaves out is infinite or NaN, a product with a weight of 0 is
// NaN. What is not finite in the end is therefore computed again by the gathering kernels: whether
// the NaN belongs there is then theirs to say.
#pragma once

#include <cuda/launch.h>

#include <algorithm>

#include "bottleneck_attend_dense_kernel.h"

namespace ait::cuda {

inline AttendDtype attend_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return AttendDtype::float64;
    case ScalarType::BFloat16:
      return AttendDtype::bfloat16;
    case ScalarType::Half:
      return AttendDtype::float16;
    default:
      return AttendDtype::float32;
  }
}

// One part a row: what is computed again is little.
inline AttendPlan whole_rows(AttendPlan plan) {
  plan.part_entries = round_up(std::max(plan.num_entries, int64_t{1}), kAttendTile);
  plan.parts = 1;
  return plan;
}

template <typename S>
class AttendDense {
  using C = ComputeOf<S>;
  // The operands of products.
  using W = std::conditional_t<std::is_same_v<S, BFloat16>, BFloat16, C>;

 public:
  AttendDense(const Launcher& launch, const AttendPlan& plan, const Tensor& tokens,
              Array<const int64_t> indices)
      : launch_(launch),
        plan_(plan),
        dense_(plan_attend_dense(plan, attend_dtype(tokens.scalar_type()),
                                 launch.chunk_bytes(kAttendDenseBytes))),
        tokens_(torch::stable::view(tokens, {1, plan.num_tokens, plan.width})),
        indices_(indices) {}

  // picked (R, k) = vectors (R, E) . tokens, for the listed ones.
  void dots(const Tensor& vectors, Array<C> picked) const {
    const Tensor operand = in_terms(vectors);
    for_each_chunk([&](int64_t begin, int64_t length, const Tensor& chunk) {
      const Tensor products = multiply(operand, torch::stable::transpose(chunk, 1, 2), vectors);
      launch_(&attend_dense_pick<C>, plan_.num_rows, kAttendThreads, 0, plan_, indices_,
              input<C>(products), dense_.terms, begin, length, picked);
    });
  }

  // sum (R, E) = sum of values (R, k) * token over the listed ones.
  void weighted_sums(Array<const C> values, const Tensor& like, Array<C> sum) const {
    const int64_t rows = plan_.num_rows;
    const AttendPlaces places{dense_.terms, {0, 1, 2}, {0, rows, 2 * rows}};
    for_each_chunk([&](int64_t begin, int64_t length, const Tensor& chunk) {
      Tensor weights = torch::stable::new_empty(chunk, {1, dense_.terms * rows, length});
      launch_(&attend_dense_scatter<W, C>, rows, kAttendThreads, 0, plan_, indices_, values, places,
              begin, length, output<W>(weights));
      const Tensor products = multiply(weights, chunk, like);
      const int64_t count = rows * plan_.width;
      launch_(&attend_dense_add<C>, blocks_for(count), kAttendThreads, 0, input<C>(products), count,
              dense_.terms, begin == 0, sum);
    });
  }

  // grad_tokens (T, E) = gates^T grad_pooled + grad_logits^T query. Of the products of terms those
  // are left out that bfloat16's rounding of the result leaves nothing of.
  void token_gradients(Array<const C> gates, Array<const C> grad_logits, const Tensor& query,
                       const Tensor& grad_pooled, Array<S> grad_tokens) const {
    const int64_t rows = plan_.num_rows, width = plan_.width, copies = dense_.terms;
    const AttendPlaces upper{int(copies), {0, 0, 1}, {0, 2 * rows, 4 * rows}};
    const AttendPlaces lower{int(copies), {0, 0, 1}, {rows, 3 * rows, 5 * rows}};
    const AttendPlaces upper_factor{int(copies), {0, 1, 0}, {0, 2 * rows, 4 * rows}};
    const AttendPlaces lower_factor{int(copies), {0, 1, 0}, {rows, 3 * rows, 5 * rows}};
    Tensor stacked = torch::stable::new_empty(tokens_, {1, 2 * copies * rows, width});
    const Array<W> factors = output<W>(stacked);
    const int64_t values = rows * width;
    launch_(&attend_dense_stack<W, C>, blocks_for(values), kAttendThreads, 0, input<C>(grad_pooled),
            values, width, upper_factor, factors);
    launch_(&attend_dense_stack<W, C>, blocks_for(values), kAttendThreads, 0, input<C>(query),
            values, width, lower_factor, factors);
    for_each_chunk([&](int64_t begin, int64_t length, const Tensor& chunk) {
      Tensor weights = torch::stable::new_empty(chunk, {1, 2 * copies * rows, length});
      const Array<W> target = output<W>(weights);
      launch_(&attend_dense_scatter<W, C>, rows, kAttendThreads, 0, plan_, indices_, gates, upper,
              begin, length, target);
      launch_(&attend_dense_scatter<W, C>, rows, kAttendThreads, 0, plan_, indices_, grad_logits,
              lower, begin, length, target);
      const Tensor products = multiply(torch::stable::transpose(weights, 1, 2), stacked, query);
      const int64_t count = length * width;
      launch_(&attend_dense_store<S, C>, blocks_for(count), kAttendThreads, 0, input<C>(products),
              count, begin * width, grad_tokens);
    });
  }

 private:
  static int64_t blocks_for(int64_t values) {
    return std::min(divide_up(values, kAttendThreads), int64_t{4096});
  }

  // Calls run(first token, number of tokens, tokens (1, chunk, E)) for all chunks in order.
  template <typename Run>
  void for_each_chunk(const Run& run) const {
    for (int64_t begin = 0; begin < plan_.num_tokens; begin += dense_.chunk_tokens) {
      const int64_t length = std::min(dense_.chunk_tokens, plan_.num_tokens - begin);
      Tensor tokens = tokens_;
      run(begin, length, torch::stable::narrow(tokens, 1, begin, length));
    }
  }

  Tensor in_terms(const Tensor& vectors) const {
    if constexpr (std::is_same_v<W, BFloat16>) {
      Tensor terms = torch::stable::new_empty(tokens_, {1, 3 * plan_.num_rows, plan_.width});
      launch_(&split_in_terms<float>, std::min(divide_up(vectors.numel(), 256), int64_t{1024}), 256,
              0, input<float>(vectors), int64_t{1}, plan_.num_rows, plan_.width,
              output<BFloat16>(terms));
      return terms;
    } else {
      return torch::stable::view(vectors, {1, plan_.num_rows, plan_.width});
    }
  }

  static Tensor multiply(const Tensor& a, const Tensor& b, const Tensor& like) {
    return batched_product(a, b, like.scalar_type());
  }

  const Launcher& launch_;
  const AttendPlan plan_;
  const AttendDensePlan dense_;
  const Tensor tokens_;
  const Array<const int64_t> indices_;
};

}  // namespace ait::cuda
