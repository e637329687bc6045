// ait::bottleneck_select on CUDA: checks, products by the library, selection chunk by chunk.
#include <cuda/dispatch.h>
#include <cuda/launch.h>

#include <optional>
#include <tuple>

#include "bottleneck_select_kernel.h"

namespace ait::cuda {
namespace {

using torch::stable::narrow;
using torch::stable::new_empty;
using torch::stable::transpose;

constexpr const char* kName = "bottleneck_select";

// Both operands of the products, and how many terms the query was split into.
struct Operands {
  Tensor query;         // (G, terms * R, d)
  Tensor tokens;        // (T, G, d)
  ScalarType rounding;  // to which tokens are rounded first
  ScalarType dtype;     // in which they are multiplied
  int terms;

  // Tokens (G, d, chunk), converted chunk by chunk: all of them at once would take too much memory.
  Tensor chunk(int64_t begin, int64_t length) const {
    Tensor part = tokens;
    part = contiguous_as(contiguous_as(narrow(part, 0, begin, length), rounding), dtype);
    part = transpose(part, 0, 1);
    return transpose(part, 1, 2);
  }

  // Bytes of the copies that chunk() makes of a token.
  int64_t converted_bytes() const {
    const auto copied = [&](ScalarType from, ScalarType to) {
      const int64_t size = to == ScalarType::Double ? 8 : to == ScalarType::Float ? 4 : 2;
      return from == to ? 0 : size * tokens.size(1) * tokens.size(2);
    };
    return copied(tokens.scalar_type(), rounding) + copied(rounding, dtype);
  }
};

Operands operands_of(const Launcher& launch, const Tensor& query, const Tensor& tokens,
                     ScalarType rounding) {
  const ScalarType dtype = compute_dtype(tokens.scalar_type());
  if (rounding != dtype && rounding != ScalarType::Double) {
    // Rounded to what was asked for. Float64 sums of rounded operands stay float64 sums.
    const ScalarType multiplied = dtype == ScalarType::Double ? dtype : rounding;
    return {contiguous_as(contiguous_as(query, rounding), multiplied), tokens, rounding, multiplied,
            1};
  }
  // float16 is multiplied as float32: its exponents are too short for terms of a float32 query.
  if (tokens.scalar_type() != ScalarType::BFloat16) {
    return {contiguous_as(query, dtype), tokens, dtype, dtype, 1};
  }
  constexpr ScalarType kHalf = ScalarType::BFloat16;
  if (query.scalar_type() == kHalf) return {as_contiguous(query), tokens, kHalf, kHalf, 1};
  const Tensor whole = contiguous_as(query, ScalarType::Float);
  Tensor terms =
      new_empty(whole, {whole.size(0), 3 * whole.size(1), whole.size(2)}, ScalarType::BFloat16);
  launch(&split_in_terms<float>, std::min(divide_up(whole.numel(), 256), int64_t{1024}), 256, 0,
         input<float>(whole), whole.size(0), whole.size(1), whole.size(2), output<BFloat16>(terms));
  return {terms, tokens, kHalf, kHalf, 3};
}

// Values, indices and numbers of candidates, as one chunk hands them to the next.
struct Kept {
  Kept(const Tensor& like, int64_t groups, int64_t rows, int64_t kept, ScalarType dtype)
      : values(new_empty(like, {groups, rows, kept}, dtype)),
        indices(new_empty(like, {groups, rows, kept}, ScalarType::Long)),
        counts(new_empty(like, {groups, rows}, ScalarType::Int)) {}
  Tensor values, indices, counts;
};

std::tuple<Tensor, Tensor> bottleneck_select(const Tensor& query_in, const Tensor& tokens_in,
                                             int64_t k, const std::optional<Tensor>& mask_in,
                                             std::optional<ScalarType> selection_dtype) {
  const ScalarType rounding =
      check_selection(check_dense, kName, query_in, tokens_in, k, mask_in, selection_dtype);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const Launcher launch(tokens_in);
  const int64_t groups = query_in.size(0), rows = query_in.size(1), width = query_in.size(2);
  const int64_t num_tokens = tokens_in.size(0), kept = std::min(k, num_tokens);
  Kept result(query_in, groups, rows, kept, dtype);
  if (result.values.numel() == 0) return {result.values, result.indices};

  const Tensor tokens_TGd =
      torch::stable::view(as_contiguous(tokens_in), {num_tokens, groups, width});
  const Operands operands = operands_of(launch, query_in, tokens_TGd, rounding);
  std::optional<Tensor> mask;
  if (mask_in.has_value()) mask = as_contiguous(*mask_in);
  const int64_t value_size = dtype == ScalarType::Double ? 8 : 4;
  const SelectPlan plan = plan_select(groups * rows * operands.terms, num_tokens, value_size,
                                      operands.converted_bytes());
  // Two lists take turns as long as a chunk follows.
  Kept first(query_in, groups, plan.chunks > 1 ? rows : 0, kept, dtype);
  Kept second(query_in, groups, plan.chunks > 2 ? rows : 0, kept, dtype);

  const auto run = [&]<typename C>() {
    struct Lists {
      Array<C> values;
      Array<int64_t> indices;
      Array<int> counts;
    };
    const auto lists_of = [](Kept& kept_lists) {
      return Lists{output<C>(kept_lists.values), output<int64_t>(kept_lists.indices),
                   output<int>(kept_lists.counts)};
    };
    const Lists turns[2] = {lists_of(first), lists_of(second)}, final = lists_of(result);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t begin = chunk * plan.chunk_tokens;
      const int64_t length = std::min(plan.chunk_tokens, num_tokens - begin);
      const bool is_last = chunk + 1 == plan.chunks;
      const Tensor logits = batched_product(operands.query, operands.chunk(begin, length), dtype);
      const Lists& carried = turns[(chunk + 1) % 2];
      const Lists& target = is_last ? final : turns[chunk % 2];
      const SelectChunk<C> args{input<C>(logits),
                                mask ? input<bool>(*mask) : no_array<const bool>(),
                                mask.has_value(),
                                operands.terms,
                                rows,
                                begin,
                                length,
                                kept,
                                chunk == 0,
                                is_last,
                                carried.values,
                                carried.indices,
                                carried.counts,
                                target.values,
                                target.indices,
                                target.counts};
      launch(&select_chunk<C>, groups * rows, kSelectThreads, plan.shared_bytes, args);
    }
  };
  if (dtype == ScalarType::Double) {
    run.template operator()<double>();
  } else {
    run.template operator()<float>();
  }
  return {result.values, result.indices};
}

}  // namespace
}  // namespace ait::cuda

STABLE_TORCH_LIBRARY_IMPL(ait, AIT_KERNEL_DEVICE, m) {
  m.impl("bottleneck_select", TORCH_BOX(&ait::cuda::bottleneck_select));
}
