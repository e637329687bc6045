// ait::bottleneck_attend and its backward on CPU: checks, allocation and distribution over threads.
#include <common/checks.h>
#include <common/huge_pages.h>
#include <common/parallel.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bottleneck_attend_kernel.h"

namespace ait::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr const char* kName = "bottleneck_attend";

// Bytes of tokens, and of query and grad_pooled, that should stay in a second-level cache.
constexpr int64_t kWindowBytes = 1 << 20;
constexpr int64_t kSlabBytes = 1 << 19;

const BottleneckAttendKernels& kernels() { AIT_RETURN_KERNELS(bottleneck_attend_kernels); }

// Calls run(kernels, C{}) with the kernels and the compute type for the dtype of the tokens.
template <typename Run>
auto dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Double:
      return run(kernels().float64, double{});
    case ScalarType::BFloat16:
      return run(kernels().bfloat16, float{});
    case ScalarType::Half:
      return run(kernels().float16, float{});
    default:
      return run(kernels().float32, float{});
  }
}

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// How many of `n` pieces of `work` multiply-adds each a thread should take at least.
int64_t grain(double work) {
  return std::max(int64_t(double(kMinWorkPerThread) / std::max(work, 1.0)), int64_t{1});
}

// Number of real entries of a list, or -1 if it is not ascending, unique, in [0, num_tokens) and
// followed by nothing but -1.
int64_t count_entries(const int64_t* list, int64_t num_entries, int64_t num_tokens) {
  int64_t count = 0, previous = -1;
  for (; count < num_entries && list[count] != -1; ++count) {
    if (list[count] <= previous || list[count] >= num_tokens) return -1;
    previous = list[count];
  }
  for (int64_t j = count; j < num_entries; ++j) {
    if (list[j] != -1) return -1;
  }
  return count;
}

// Few rows are cut into parts: some hundred parts are enough for any machine, and they let threads
// share the tokens among them instead of reading all of them; some hundred entries are worth a
// part. They depend on the shape alone, since the order of a sum must not depend on the number of
// threads.
int64_t part_length_of(int64_t num_rows, int64_t num_entries) {
  const int64_t wanted = divide_up(512, std::max(num_rows, int64_t{1}));
  const int64_t most = std::max(num_entries / 256, int64_t{1});
  return std::max(divide_up(num_entries, std::min(wanted, most)), int64_t{1});
}

// The lists as the kernels want them, checked, with the memory that they need.
struct Lists {
  Lists(const Tensor& tokens, const Tensor& indices)
      : num_rows(indices.size(0)),
        num_entries(indices.size(1)),
        num_tokens(tokens.size(0)),
        width(tokens.size(1)),
        part_length(part_length_of(num_rows, num_entries)),
        parts(std::max(divide_up(num_entries, part_length), int64_t{1})),
        counts(num_rows),
        cursors(checked_product(num_rows, parts)),
        tokens_(tokens),
        indices_(indices) {
    const int64_t* list = indices_.const_data_ptr<int64_t>();
    parallel_for(0, num_rows, grain(double(num_entries)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        counts[row] = count_entries(list + row * num_entries, num_entries, num_tokens);
      }
    });
    for (int64_t row = 0; row < num_rows; ++row) {
      STD_TORCH_CHECK(counts[row] >= 0, kName, ": expected indices ascending and unique in [0, ",
                      num_tokens, "), -1 last, got something else in row ", row);
    }
  }

  AttendLists get() const {
    const int64_t row_bytes = std::max(width * int64_t(tokens_.element_size()), int64_t{1});
    // A window should also hold a block of entries of each row.
    const int64_t window =
        std::max(kWindowBytes / row_bytes,
                 divide_up(kAttendBlock * num_tokens, std::max(num_entries, int64_t{1})));
    return {tokens_.const_data_ptr(),
            indices_.const_data_ptr<int64_t>(),
            counts.get(),
            num_rows,
            num_entries,
            width,
            parts,
            part_length,
            window,
            cursors.get()};
  }

  double work_per_part() const { return double(part_length) * double(width + 8) * 2; }

  const int64_t num_rows, num_entries, num_tokens, width, part_length, parts;
  const Scratch<int64_t> counts, cursors;

 private:
  const Tensor tokens_, indices_;
};

std::tuple<Tensor, Tensor, Tensor> bottleneck_attend(const Tensor& query_in,
                                                     const Tensor& tokens_in,
                                                     const Tensor& indices_in) {
  check_attention(check_dense_cpu, kName, query_in, tokens_in, indices_in);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const Tensor query = contiguous_as(query_in, dtype);
  const Tensor tokens = as_contiguous(tokens_in);
  const Tensor indices = as_contiguous(indices_in);
  const Lists lists(tokens, indices);
  Tensor pooled = new_empty(query, {lists.num_rows, lists.width}, dtype);
  Tensor gates = new_empty(query, {lists.num_rows, lists.num_entries}, dtype);
  Tensor lse = new_empty(query, {lists.num_rows}, dtype);

  dispatch(tokens.scalar_type(), [&](const auto& kernel, auto zero) {
    using C = decltype(zero);
    const int64_t num_parts = lists.num_rows * lists.parts;
    const Scratch<C> part_max(num_parts), part_sum(num_parts);
    const Scratch<C> part_pooled(lists.parts > 1 ? checked_product(num_parts, lists.width) : 0);
    C* pooled_data = pooled.mutable_data_ptr<C>();
    const AttendForward<C> args{lists.get(),
                                query.const_data_ptr<C>(),
                                part_max.get(),
                                part_sum.get(),
                                lists.parts > 1 ? part_pooled.get() : pooled_data,
                                pooled_data,
                                gates.mutable_data_ptr<C>(),
                                lse.mutable_data_ptr<C>()};
    parallel_for(0, num_parts, grain(lists.work_per_part()), [&](int64_t begin, int64_t end) {
      kernel.forward_parts(args, begin, end);
      if (lists.parts == 1) kernel.forward_rows(args, begin, end);
    });
    if (lists.parts > 1) {
      const double work = double(lists.num_entries) + double(lists.parts * lists.width);
      parallel_for(0, lists.num_rows, grain(work),
                   [&](int64_t begin, int64_t end) { kernel.forward_rows(args, begin, end); });
    }
  });
  return {pooled, gates, lse};
}

// Whether a result is written past the caches: it is too large to stay there, and its rows are
// whole lines.
bool streams(const Tensor& result) {
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  const int64_t element = int64_t(result.element_size());
  return result.numel() * element >= kFromSystem && address % 64 == 0 &&
         result.size(1) * element % 64 == 0;
}

// Lets the system clear fresh pages, on all threads, before any is written past the caches: what it
// clears stays in the caches for a while, and writing past them would have to wait for it.
void touch_all_pages(Tensor& result) {
  constexpr int64_t kChunk = int64_t{2} << 20;
  char* data = static_cast<char*>(result.mutable_data_ptr());
  const int64_t bytes = result.numel() * int64_t(result.element_size());
  parallel_for(0, divide_up(bytes, kChunk), 1, [&](int64_t begin, int64_t end) {
    touch_pages(data + begin * kChunk, data + std::min(end * kChunk, bytes));
  });
}

// Tokens are handed out in ranges; the ranges do not change the result.
template <typename C>
void run_backward_tokens(const AttendKernels<C>& kernel, const AttendBackward<C>& args,
                         const Lists& lists) {
  const double work = double(lists.num_rows) * double(lists.num_entries) * double(lists.width) * 2 +
                      double(lists.num_tokens) * double(lists.width);
  const int64_t slots =
      num_slots(lists.num_tokens, work / double(std::max(lists.num_tokens, int64_t{1})));
  // Each range searches all lists, so there should be few; some for each thread, to share the work.
  const int64_t fair = divide_up(lists.num_tokens, slots > 1 ? 8 * slots : 1);
  const int64_t range = std::clamp(fair, int64_t{128}, int64_t{1024});
  const int64_t capacity =
      std::min(std::max(lists.num_rows, int64_t{1} << 16),
               checked_product(lists.num_rows, std::min(lists.num_entries, range)));
  const Scratch<int64_t> cursors(checked_product(slots, lists.num_rows));
  const Scratch<int64_t> ends(checked_product(slots, range));
  const Scratch<AttendEntry<C>> entries(checked_product(slots, capacity));
  for_each_task(divide_up(lists.num_tokens, range), slots, [&](int64_t slot, int64_t index) {
    const AttendTokenScratch<C> scratch{cursors.get() + slot * lists.num_rows,
                                        ends.get() + slot * range, entries.get() + slot * capacity,
                                        capacity};
    kernel.backward_tokens(args, scratch, index * range,
                           std::min((index + 1) * range, lists.num_tokens));
  });
}

std::tuple<Tensor, Tensor> bottleneck_attend_backward(
    const std::optional<Tensor>& grad_pooled_in, const std::optional<Tensor>& grad_gates_in,
    const std::optional<Tensor>& grad_lse_in, const Tensor& query_in, const Tensor& tokens_in,
    const Tensor& indices_in, const Tensor& pooled_in, const Tensor& gates_in) {
  check_attention(check_dense_cpu, kName, query_in, tokens_in, indices_in);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const Tensor query = contiguous_as(query_in, dtype);
  const Tensor tokens = as_contiguous(tokens_in);
  const Tensor indices = as_contiguous(indices_in);
  const Lists lists(tokens, indices);
  const AttendResults results =
      check_attend_results(check_dense_cpu, kName, query, tokens, indices,
                           {pooled_in, gates_in, grad_pooled_in, grad_gates_in, grad_lse_in});
  Tensor grad_query = new_empty(query, {lists.num_rows, lists.width}, dtype);
  Tensor grad_tokens = new_empty(tokens, {lists.num_tokens, lists.width});
  prefer_huge_pages(grad_tokens.mutable_data_ptr(),
                    grad_tokens.numel() * int64_t(grad_tokens.element_size()));

  dispatch(tokens.scalar_type(), [&](const auto& kernel, auto zero) {
    using C = decltype(zero);
    const auto data = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->template const_data_ptr<C>() : nullptr;
    };
    const int64_t num_parts = lists.num_rows * lists.parts;
    const Scratch<C> offsets(lists.num_rows);
    const Scratch<bool> takes_part(lists.num_rows);
    const Scratch<C> grad_logits(checked_product(lists.num_rows, lists.num_entries));
    const Scratch<C> part_grads(lists.parts > 1 ? checked_product(num_parts, lists.width) : 0);
    C* grad_query_data = grad_query.mutable_data_ptr<C>();
    const int64_t column_bytes = std::max(lists.num_rows, int64_t{1}) * 2 * int64_t(sizeof(C));
    const int64_t slab = std::max(kSlabBytes / column_bytes / 64 * 64, int64_t{64});
    const AttendBackward<C> args{lists.get(),
                                 query.const_data_ptr<C>(),
                                 results.pooled.const_data_ptr<C>(),
                                 results.gates.const_data_ptr<C>(),
                                 data(results.grad_pooled),
                                 data(results.grad_gates),
                                 data(results.grad_lse),
                                 offsets.get(),
                                 takes_part.get(),
                                 grad_logits.get(),
                                 lists.parts > 1 ? part_grads.get() : grad_query_data,
                                 grad_query_data,
                                 grad_tokens.mutable_data_ptr(),
                                 slab,
                                 streams(grad_tokens)};
    const double work_per_row = double(lists.width) + double(lists.num_entries);
    parallel_for(0, lists.num_rows, grain(work_per_row),
                 [&](int64_t begin, int64_t end) { kernel.backward_offsets(args, begin, end); });
    parallel_for(0, num_parts, grain(lists.work_per_part()),
                 [&](int64_t begin, int64_t end) { kernel.backward_parts(args, begin, end); });
    if (lists.parts > 1) {
      const double work = double(lists.parts * lists.width + 1);
      parallel_for(0, lists.num_rows, grain(work),
                   [&](int64_t begin, int64_t end) { kernel.backward_rows(args, begin, end); });
    }
    if (args.streams) touch_all_pages(grad_tokens);
    run_backward_tokens(kernel, args, lists);
  });
  return {contiguous_as(grad_query, query_in.scalar_type()), grad_tokens};
}

}  // namespace
}  // namespace ait::cpu

STABLE_TORCH_LIBRARY_IMPL(ait, CPU, m) {
  m.impl("bottleneck_attend", TORCH_BOX(&ait::cpu::bottleneck_attend));
  m.impl("bottleneck_attend_backward", TORCH_BOX(&ait::cpu::bottleneck_attend_backward));
}
