// ait::bottleneck_select on CPU: checks, allocation and distribution over threads.
#include "bottleneck_select.h"

#include <common/checks.h>
#include <common/parallel.h>
#include <common/path_counters.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bottleneck_select_kernel.h"

namespace ait::cpu {
namespace {

constexpr const char* kName = "bottleneck_select";

// A tile of tokens that stays in the second-level cache while the panels of a block pass by; in the
// first where each few rows read elements of their own, so that memory is read in its order.
constexpr int64_t kTileBytes = 1 << 17;
constexpr int64_t kElementwiseTileBytes = 1 << 14;
constexpr int64_t kMaxTileTokens = 1024;
constexpr int64_t kMaxBlockRows = 256;

const BottleneckSelectKernels& kernels() { AIT_RETURN_KERNELS(bottleneck_select_kernels); }

// Null where the processor does not multiply bfloat16.
const SelectKernels<float>* bfloat16_kernels() {
  switch (bfloat16_products()) {
#ifdef AIT_BUILD_AMX_BF16
    case Bfloat16Products::amx_bf16:
      return &amx_bf16::bottleneck_select_bf16_kernels;
#endif
#ifdef AIT_BUILD_AVX512_BF16
    case Bfloat16Products::avx512_bf16:
      return &avx512_bf16::bottleneck_select_bf16_kernels;
#endif
    default:
      return nullptr;
  }
}

// Null where no processor's tiles multiply bfloat16.
const SelectKernels<float>* screened_kernels() {
#ifdef AIT_BUILD_AMX_BF16
  if (bfloat16_products() == Bfloat16Products::amx_bf16) {
    return &amx_bf16::bottleneck_select_screened_kernels;
  }
#endif
  return nullptr;
}

// Where few logits can be among the k largest, and products are most of the work; the widest keep
// the roundings small beside what a bound on them allows. The order of sums, and so their last
// bits, follow from this: it must look at the shape alone.
bool worth_screening(const SelectProblem& problem) {
  return problem.rounding == Storage::float32 && !problem.elementwise && problem.num_rows >= 64 &&
         problem.width >= 64 && problem.width <= 1 << 16 && problem.num_tokens >= 2048 &&
         problem.num_tokens / problem.k >= 48;
}

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// How the rows of a group and the tokens are split into tasks.
struct Partition {
  int64_t block_rows, blocks;    // of a group
  int64_t range_tokens, ranges;  // of the tokens
};

Partition split(const SelectProblem& problem, int64_t block_rows, int64_t ranges) {
  block_rows = std::min(block_rows, problem.num_rows);
  const int64_t range_tokens = divide_up(problem.num_tokens, ranges);
  return {block_rows, divide_up(problem.num_rows, block_rows), range_tokens,
          divide_up(problem.num_tokens, range_tokens)};
}

// What a thread does for one task, in multiply-adds: products, loading of the tokens, and filling
// the lists with some 3 k entries each.
template <typename C>
double work_per_task(const SelectKernels<C>& kernel, const SelectProblem& problem,
                     const Partition& partition) {
  const double tokens = double(partition.range_tokens), rows = double(partition.block_rows);
  const double entries = rows * std::min(3 * double(problem.k), tokens);
  const double width = double(problem.width + 1);
  return tokens * (rows + double(kernel.load_cost)) * width +
         entries * (800 + double(kernel.entry_cost) * width);
}

// Blocks are as large as possible, since every block loads all tokens, unless threads would idle;
// ranges are few, since each fills lists of its own. The result does not depend on the choice.
template <typename C>
Partition choose_partition(const SelectKernels<C>& kernel, const SelectProblem& problem) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = divide_up(problem.num_rows, kernel.rows_per_panel);
  const int64_t fewest_blocks = divide_up(problem.num_rows, kMaxBlockRows);
  Partition best{};
  double least_time = 0;
  for (int64_t blocks = fewest_blocks; blocks <= panels; ++blocks) {
    const int64_t block_rows = divide_up(panels, blocks) * kernel.rows_per_panel;
    for (int64_t ranges = 1; ranges == 1 || ranges <= problem.num_tokens / 1024; ++ranges) {
      const Partition partition = split(problem, block_rows, ranges);
      const int64_t tasks = problem.num_groups * partition.blocks * partition.ranges;
      const double work = work_per_task(kernel, problem, partition);
      const double time = double(divide_up(tasks, num_slots(tasks, work))) * work;
      if (best.blocks == 0 || time < least_time) {
        best = partition;
        least_time = time;
      }
      if (tasks >= threads) break;
    }
    if (problem.num_groups * blocks >= 2 * threads) break;
  }
  return best;
}

template <typename C>
void run(const SelectKernels<C>& kernel, const SelectProblem& problem, const Partition& partition,
         C* values, int64_t* indices) {
  const int64_t blocks = problem.num_groups * partition.blocks, ranges = partition.ranges;
  const int64_t tasks = blocks * ranges;
  const int64_t slots = num_slots(tasks, work_per_task(kernel, problem, partition));

  // Where that is not much more, a list holds all tokens of its range, and is cut once. Lists a
  // multiple of 1 KiB apart would compete for the same cache sets.
  int64_t capacity = problem.k + std::max(problem.k / kernel.spare_share, int64_t{64});
  if (partition.range_tokens <= 2 * capacity) capacity = partition.range_tokens;
  capacity = divide_up(std::min(capacity, partition.range_tokens), 16) * 16;
  capacity += capacity % 256 == 0 ? 16 : 0;

  // With one range a block is done when its task is, and the next block may have its lists.
  const int64_t lists = checked_product(ranges == 1 ? slots : blocks, partition.block_rows, ranges);
  const Scratch<SelectKey<C>> keys(checked_product(lists, capacity));
  const Scratch<int32_t> tokens(checked_product(lists, capacity));
  const Scratch<int64_t> counts(lists);
  const int64_t scratch_bytes = kernel.scratch_bytes(problem, partition.block_rows);
  const Scratch<char> scratch(checked_product(slots, scratch_bytes));

  const auto candidates_of = [&](int64_t holder) {
    const int64_t first = holder * partition.block_rows * ranges;
    return SelectCandidates<C>{keys.get() + first * capacity, tokens.get() + first * capacity,
                               counts.get() + first, ranges, capacity};
  };
  const auto task_of = [&](int64_t block, int64_t range) {
    const int64_t first_row = block % partition.blocks * partition.block_rows;
    const int64_t first_token = range * partition.range_tokens;
    return SelectTask{block / partition.blocks,
                      first_row,
                      std::min(partition.block_rows, problem.num_rows - first_row),
                      first_token,
                      std::min(first_token + partition.range_tokens, problem.num_tokens),
                      range};
  };
  const auto collect = [&](const SelectTask& task, const SelectCandidates<C>& candidates) {
    const int64_t row = task.group * problem.num_rows + task.first_row;
    kernel.collect(problem, candidates, task.num_rows, values + row * problem.k,
                   indices + row * problem.k);
  };

  for_each_task(tasks, slots, [&](int64_t slot, int64_t index) {
    const int64_t block = index % blocks;
    const SelectTask task = task_of(block, index / blocks);
    const SelectCandidates<C> candidates = candidates_of(ranges == 1 ? slot : block);
    const SelectStatistics statistics =
        kernel.scan(problem, task, candidates, scratch.get() + slot * scratch_bytes);
    count_path(Path::select_list_cuts, statistics.list_cuts);
    count_path(Path::select_cuts_in_ties, statistics.cuts_in_ties);
    count_path(Path::select_closed_rows, statistics.closed_rows);
    count_path(Path::select_tiles_in_place, statistics.tiles_in_place);
    count_path(Path::select_tiles_copied, statistics.tiles_copied);
    count_path(Path::select_logits_let_through, statistics.logits_let_through);
    count_path(Path::select_crowded_tiles, statistics.crowded_tiles);
    if (ranges == 1) collect(task, candidates);
  });
  if (ranges > 1) {
    for_each_task(blocks, std::min(slots, blocks), [&](int64_t, int64_t block) {
      collect(task_of(block, 0), candidates_of(block));
    });
    count_path(Path::select_split_rows, problem.num_groups * problem.num_rows);
  }
  count_path(Path::select_calls);
  count_path(Path::select_tasks, tasks);
  count_path(Path::select_masked_calls, problem.mask != nullptr);
  count_path(Path::select_elementwise_calls, problem.elementwise);
}

int64_t default_tile_tokens(const SelectProblem& problem, int64_t tokens_per_step,
                            int64_t element_size) {
  const int64_t width = problem.elementwise ? std::min(problem.num_rows, kMaxBlockRows)
                                            : std::max(problem.width, int64_t{1});
  const int64_t row_bytes = width * element_size;
  const int64_t most = std::min(problem.num_tokens, kMaxTileTokens);
  const int64_t tile_bytes = problem.elementwise ? kElementwiseTileBytes : kTileBytes;
  const int64_t steps = std::min(tile_bytes / row_bytes, most) / tokens_per_step;
  return std::max(steps, int64_t{1}) * tokens_per_step;
}

Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      return Storage::float32;
  }
}

std::tuple<Tensor, Tensor> bottleneck_select(const Tensor& query_in, const Tensor& tokens_in,
                                             int64_t k, const std::optional<Tensor>& mask_in,
                                             const std::optional<ScalarType>& selection_dtype) {
  const ScalarType rounding =
      check_selection(check_dense_cpu, kName, query_in, tokens_in, k, mask_in, selection_dtype);
  const ScalarType dtype = compute_dtype(tokens_in.scalar_type());
  const int64_t groups = query_in.size(0), rows = query_in.size(1), width = query_in.size(2);
  const int64_t num_tokens = tokens_in.size(0);
  const int64_t kept = std::min(k, num_tokens);
  Tensor values = torch::stable::new_empty(query_in, {groups, rows, kept}, dtype);
  Tensor indices = torch::stable::new_empty(query_in, {groups, rows, kept}, ScalarType::Long);
  if (values.numel() == 0) return {values, indices};

  const Tensor query = contiguous_as(query_in, dtype);
  const bool adjacent = width <= 1 || tokens_in.stride(tokens_in.dim() - 1) == 1;
  const Tensor tokens = adjacent ? tokens_in : torch::stable::contiguous(tokens_in);
  std::optional<Tensor> mask;
  if (mask_in.has_value()) mask = torch::stable::contiguous(*mask_in);
  SelectProblem problem{
      query.const_data_ptr(),
      tokens.const_data_ptr(),
      mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
      storage_of(tokens.scalar_type()),
      storage_of(rounding),
      tokens.stride(0),
      tokens.dim() == 3 ? tokens.stride(1) : 0,
      groups,
      rows,
      num_tokens,
      width,
      kept,
      0,
      false};
  if (rows == 1 && width == 1 && problem.group_stride == 1) {
    // Logits that are there already: side by side, they are multiplied and filtered together.
    problem.elementwise = true;
    problem.num_rows = groups;
    problem.num_groups = 1;
  }
  const auto run_with = [&]<typename C>(const SelectKernels<C>& kernel) {
    problem.tile_tokens = default_tile_tokens(problem, kernel.tokens_per_step, kernel.element_size);
    run(kernel, problem, choose_partition(kernel, problem), values.mutable_data_ptr<C>(),
        indices.mutable_data_ptr<int64_t>());
  };
  const SelectKernels<float>* bfloat16 = bfloat16_kernels();
  if (dtype == ScalarType::Double) {
    run_with(kernels().float64);
  } else if (rounding == ScalarType::BFloat16 && bfloat16 != nullptr && !problem.elementwise) {
    run_with(*bfloat16);
    count_path(Path::select_bfloat16_calls);
  } else if (screened_kernels() != nullptr && worth_screening(problem)) {
    run_with(*screened_kernels());
    count_path(Path::select_screened_calls);
  } else {
    run_with(kernels().float32);
  }
  return {values, indices};
}

}  // namespace

void bottleneck_select_tiled(const float* query, const float* tokens, const uint8_t* mask,
                             int64_t num_rows, int64_t num_tokens, int64_t width, int64_t k,
                             int64_t tile_tokens, int64_t ranges, bool screened, float* values,
                             int64_t* indices) {
  if (num_rows < 0 || num_tokens < 0 || num_tokens > INT32_MAX || width < 0 || k < 1 ||
      tile_tokens < 1 || ranges < 1) {
    throw std::invalid_argument("bottleneck_select_tiled: sizes out of range");
  }
  if (screened && (screened_kernels() == nullptr || width < 1 || width > 1 << 16)) {
    throw std::invalid_argument("bottleneck_select_tiled: cannot be screened here");
  }
  if (num_rows == 0 || num_tokens == 0) return;
  const SelectKernels<float>& kernel = screened ? *screened_kernels() : kernels().float32;
  const SelectProblem problem{query,
                              tokens,
                              mask,
                              Storage::float32,
                              Storage::float32,
                              width,
                              0,
                              1,
                              num_rows,
                              num_tokens,
                              width,
                              std::min(k, num_tokens),
                              std::min(tile_tokens, num_tokens),
                              false};
  const int64_t block_rows =
      divide_up(std::min(num_rows, kMaxBlockRows), kernel.rows_per_panel) * kernel.rows_per_panel;
  run(kernel, problem, split(problem, block_rows, std::min(ranges, num_tokens)), values, indices);
}

}  // namespace ait::cpu

STABLE_TORCH_LIBRARY_IMPL(ait, CPU, m) {
  m.impl("bottleneck_select", TORCH_BOX(&ait::cpu::bottleneck_select));
}
