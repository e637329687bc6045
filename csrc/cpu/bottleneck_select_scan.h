// One task of bottleneck_select: tile by tile, products and filter; then joining the lists.
// Included by the kernel sources alone.
#pragma once

#include <cpu/bottleneck_select_list.h>
#include <cpu/bottleneck_select_load.h>
#include <cpu/bottleneck_select_product.h>

namespace ait::cpu {
namespace {

// What a task keeps beside its candidates. Query and tokens are kept as E.
template <typename C, typename E>
struct ScanBuffers {
  ScanBuffers(const SelectProblem& problem, int64_t num_rows, Arena& arena)
      : padded_rows(round_up(num_rows, Vec<C>::size)),
        padded_width(round_up(problem.width, kWidthStep<E>)),
        copy_stride(stride_of_copies(
            round_up(larger(tile_width(problem, num_rows), padded_width), Vec<C>::size))),
        panels(arena.take<E>(padded_rows * padded_width)),
        copied_tokens(arena.take<E>(round_up(problem.tile_tokens, kStepTokens) * copy_stride)),
        tile_tokens(arena.take<int32_t>(round_up(problem.tile_tokens, kStepTokens))),
        unpacked(arena.take<E>(padded_width)) {}

  // No multiple of 1 KiB: rows would compete for the same cache sets.
  static int64_t stride_of_copies(int64_t width) {
    constexpr int64_t kElementsPerLine = 64 / sizeof(E);
    return width + (width % (16 * kElementsPerLine) == 0 ? kElementsPerLine : 0);
  }

  int64_t padded_rows, padded_width;
  int64_t copy_stride;
  E* panels;
  E* copied_tokens;
  int32_t* tile_tokens;
  E* unpacked;
};

// Panels of the block's rows: for each operand of d elements, that of all rows of a panel side by
// side. The rows that fill up the last vector are zero.
template <typename C, typename E>
void pack_query(const SelectProblem& problem, const SelectTask& task,
                const ScanBuffers<C, E>& buffers) {
  constexpr int kLanes = Vec<C>::size, kPanelRows = kPanelVectors * kLanes;
  constexpr int kSize = Operand<E>::size;
  const int64_t width = buffers.padded_width;
  for (int64_t row = 0; row < buffers.padded_rows; ++row) {
    const int64_t panel = row / kPanelRows * kPanelRows;
    const int64_t stride = task.num_rows - panel > kLanes ? kPanelRows : kLanes;
    E* packed = buffers.panels + panel * width + (row - panel) * kSize;
    std::memset(buffers.unpacked, 0, size_t(width) * sizeof(E));
    if (row < task.num_rows) {
      const int64_t source = task.group * problem.num_rows + task.first_row + row;
      load_row(problem.query, kStorageOf<C>, source * problem.width, problem.rounding,
               problem.width, buffers.unpacked);
    }
    for (int64_t i = 0; i < width; ++i) {
      packed[i / kSize * stride * kSize + i % kSize] = buffers.unpacked[i];
    }
  }
}

template <typename C, typename E>
class Scan {
 public:
  static constexpr bool kIsExact = __is_same(C, E);  // nothing is lost in tokens kept as E
  static constexpr int kLanes = Vec<C>::size;
  static constexpr int kPanelRows = kPanelVectors * kLanes;

  Scan(const SelectProblem& problem, const SelectTask& task, const SelectCandidates<C>& candidates,
       Arena arena)
      : problem_(problem),
        task_(task),
        buffers_(problem, task.num_rows, arena),
        lists_(problem, task, candidates, arena),
        prefetcher_(problem, task),
        can_read_in_place_(
            problem.token_storage == kStorageOf<E> && problem.rounding == kStorageOf<E> &&
            problem.width % kWidthStep<E> == 0 &&
            (problem.elementwise ? task.num_rows % kLanes == 0
                                 : problem.token_stride * int64_t(sizeof(E)) % 2048 != 0)),
        worth_prefetching_(!problem.elementwise &&
                           (task.num_rows > kPanelRows || problem.token_stride != problem.width)) {}

  SelectStatistics run() {
    take_tile_registers();
    pack_query(problem_, task_, buffers_);
    lists_.open();
    for (int64_t token = task_.first_token; token < task_.last_token && lists_.any_open();) {
      token = load_tile(token);
      if constexpr (kIsExact) {
        if (problem_.elementwise) {
          scan_ready_tile();
          continue;
        }
      }
      start_prefetch(token);
      for (int64_t row = 0; row < task_.num_rows; row += kPanelRows) {
        if (task_.num_rows - row > kLanes) {
          scan_tile<kPanelVectors>(row);
        } else {
          scan_tile<1>(row);
        }
      }
    }
    lists_.close();
    release_tile_registers();
    return lists_.statistics();
  }

 private:
  // Makes a tile of the unmasked tokens from `token` on; returns the token after the last of them.
  int64_t load_tile(int64_t token) {
    const int64_t most = smaller(problem_.tile_tokens, task_.last_token - token);
    const int64_t whole_steps = most / kStepTokens * kStepTokens;
    const bool in_place = can_read_in_place_ && whole_steps > 0 && !any_masked(token, whole_steps);
    return in_place ? point_to_tile(token, whole_steps) : copy_tile(token);
  }

  bool any_masked(int64_t token, int64_t num_tokens) const {
    if (problem_.mask == nullptr) return false;
    uint8_t any = 0;
    for (int64_t i = 0; i < num_tokens; ++i) any |= problem_.mask[token + i];
    return any != 0;
  }

  int64_t offset_of(int64_t token) const {
    return token * problem_.token_stride + first_element(problem_, task_);
  }

  int64_t point_to_tile(int64_t token, int64_t num_tokens) {
    tile_ = static_cast<const E*>(problem_.tokens) + offset_of(token);
    tile_stride_ = problem_.token_stride;
    tile_size_ = num_tokens;
    for (int64_t i = 0; i < num_tokens; ++i) buffers_.tile_tokens[i] = int32_t(token + i);
    ++lists_.statistics().tiles_in_place;
    return token + num_tokens;
  }

  // Skips masked tokens, converts and rounds, and fills up the last step with zeros.
  int64_t copy_tile(int64_t token) {
    const int64_t stride = buffers_.copy_stride;
    int64_t n = 0;
    for (; token < task_.last_token && n < problem_.tile_tokens; ++token) {
      if (problem_.mask != nullptr && problem_.mask[token]) continue;
      load_row(problem_.tokens, problem_.token_storage, offset_of(token), problem_.rounding,
               tile_width(problem_, task_.num_rows), buffers_.copied_tokens + n * stride);
      const int64_t filled_up = buffers_.padded_width - problem_.width;
      std::memset(buffers_.copied_tokens + n * stride + problem_.width, 0,
                  size_t(filled_up) * sizeof(E));
      buffers_.tile_tokens[n++] = int32_t(token);
    }
    const int64_t missing = round_up(n, kStepTokens) - n;
    std::memset(buffers_.tile_tokens + n, 0, size_t(missing) * sizeof *buffers_.tile_tokens);
    std::memset(buffers_.copied_tokens + n * stride, 0, size_t(missing * stride) * sizeof(E));
    tile_ = buffers_.copied_tokens;
    tile_stride_ = stride;
    tile_size_ = n;
    ++lists_.statistics().tiles_copied;
    return token;
  }

  // Where one panel reads tokens that lie side by side, the processor foresees that by itself.
  void start_prefetch(int64_t token) {
    if (!worth_prefetching_ || tile_size_ == 0) return;
    const int64_t panels = (task_.num_rows + kPanelRows - 1) / kPanelRows;
    const int64_t products = panels * (round_up(tile_size_, kStepTokens) / kStepTokens);
    const int64_t steps = (buffers_.padded_width + kFetchWidth<E> - 1) / kFetchWidth<E>;
    prefetcher_.start(token, smaller(problem_.tile_tokens, task_.last_token - token),
                      products * larger(steps, 1));
  }

  template <int kVectors>
  void scan_tile(int64_t row) {
    alignas(64) C logits[kStepTokens * kVectors * kLanes];
    const E* panel = buffers_.panels + row * buffers_.padded_width;
    for (int64_t t = 0; t < tile_size_; t += kStepTokens) {
      const E* tile = tile_ + t * tile_stride_;
      const int32_t* tokens = buffers_.tile_tokens + t;
      const int64_t num_tokens = smaller(kStepTokens, tile_size_ - t);
      const bool fits = lists_.fit_uncut(row);
      multiply<C, E, kVectors>(panel, tile, tile_stride_, buffers_.padded_width, prefetcher_,
                               logits);
      if (fits) {
        lists_.template fill<kVectors>(logits, kVectors * kLanes, tokens, num_tokens, row);
      } else {
        lists_.template filter<kVectors>(logits, tokens, num_tokens, row);
      }
    }
  }

  // A tile of logits that are there, where waiting for memory is most of the time. A product with 1
  // would change nothing, and take long where logits are denormal.
  void scan_ready_tile() {
    if (!has_unit_query()) multiply_each();
    const int64_t t = lists_[0].count < problem_.k ? fill_ready() : 0;
    const int64_t rows = buffers_.padded_rows;
    int64_t row = 0;
    for (; row + 4 * kLanes <= rows; row += 4 * kLanes) filter_ready<4, 1>(t, row);
    for (; row + 2 * kLanes <= rows; row += 2 * kLanes) filter_ready<2, 2>(t, row);
    for (; row < rows; row += kLanes) filter_ready<1, 4>(t, row);
  }

  bool has_unit_query() const {
    bool all_ones = true;
    for (int64_t row = 0; row < task_.num_rows; ++row) all_ones &= buffers_.panels[row] == 1;
    return all_ones;
  }

  // The same bits as multiply() with width 1.
  void multiply_each() {
    const int64_t stride = buffers_.copy_stride;
    for (int64_t t = 0; t < tile_size_; ++t) {
      for (int64_t row = 0; row < buffers_.padded_rows; row += kLanes) {
        const Vec<C> query = Vec<C>::load(buffers_.panels + row);
        const Vec<C> token = Vec<C>::load(tile_ + t * tile_stride_ + row);
        fmadd(query, token, Vec<C>::zero()).store(buffers_.copied_tokens + t * stride + row);
      }
    }
    tile_ = buffers_.copied_tokens;
    tile_stride_ = stride;
  }

  // Until they hold k each, all lists take all tokens; the smallest of those is the first
  // threshold. Returns how many tokens of the tile they took.
  int64_t fill_ready() {
    const int64_t n = smaller(tile_size_, problem_.k - lists_[0].count);
    int64_t t = 0;
    for (; t + kStepTokens <= n; t += kStepTokens) {
      for (int64_t row = 0; row < task_.num_rows; row += kLanes) {
        lists_.template fill<1>(tile_ + t * tile_stride_ + row, tile_stride_,
                                buffers_.tile_tokens + t, kStepTokens, row);
      }
    }
    for (; t < n; ++t) {
      for (int64_t row = 0; row < task_.num_rows; ++row) {
        lists_.append(row, tile_[t * tile_stride_ + row], buffers_.tile_tokens[t]);
      }
    }
    if (lists_[0].count < problem_.k) return n;
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      lists_.raise_threshold(row, smallest_of(lists_[row].keys, problem_.k));
    }
    return n;
  }

  // Appends what passes the thresholds, from token `t` of the tile on, a few tokens at a time.
  template <int kVectors, int kTokens>
  void filter_ready(int64_t t, int64_t first_row) {
    using V = Vec<C>;
    constexpr int kVectorsPerLine = 64 / sizeof(V);
    constexpr int64_t kAhead = kBytesAhead / int64_t(sizeof(C));
    V thresholds[kVectors];
    const auto load_thresholds = [&] {
      const C* source = lists_.thresholds() + first_row;
      for (int v = 0; v < kVectors; ++v) thresholds[v] = V::load(source + v * kLanes);
    };
    load_thresholds();
    const C* logits = tile_ + t * tile_stride_ + first_row;
    for (; t + kTokens <= tile_size_; t += kTokens, logits += kTokens * tile_stride_) {
      uint32_t masks[kTokens * kVectors], any = 0;
#pragma GCC unroll 4
      for (int i = 0; i < kTokens * kVectors; ++i) {
        const int v = i % kVectors;
        const C* lanes = logits + i / kVectors * tile_stride_ + v * kLanes;
        if (v % kVectorsPerLine == 0) __builtin_prefetch(lanes + kAhead);
        masks[i] = not_less_equal_mask(V::load(lanes), thresholds[v]);
        any |= masks[i];
      }
      if (any == 0) continue;
      uint64_t passing = 0;
      for (int i = 0; i < kTokens * kVectors; ++i) passing |= uint64_t{masks[i]} << (i * kLanes);
      lists_.template append_all<kVectors>(passing, logits, tile_stride_, buffers_.tile_tokens + t,
                                           first_row);
      load_thresholds();
    }
    if constexpr (kTokens > 1) filter_ready<kVectors, 1>(t, first_row);
  }

  const SelectProblem& problem_;
  const SelectTask& task_;
  const ScanBuffers<C, E> buffers_;
  RowLists<C> lists_;
  Prefetcher prefetcher_;
  // In whole vectors; tokens 2 KiB apart would compete for the same cache sets.
  const bool can_read_in_place_;
  const bool worth_prefetching_;
  const E* tile_ = nullptr;
  int64_t tile_stride_ = 0, tile_size_ = 0;
};

template <typename C, typename E>
int64_t scratch_bytes(const SelectProblem& problem, int64_t num_rows) {
  Arena arena{nullptr};
  const SelectTask task{0, 0, num_rows, 0, 0, 0};
  const SelectCandidates<C> candidates{};
  ScanBuffers<C, E>(problem, num_rows, arena);
  RowLists<C>(problem, task, candidates, arena);
  return arena.used;
}

template <typename C, typename E>
SelectStatistics scan(const SelectProblem& problem, const SelectTask& task,
                      const SelectCandidates<C>& candidates, void* scratch) {
  return Scan<C, E>(problem, task, candidates, Arena{static_cast<char*>(scratch)}).run();
}

template <typename C>
void collect(const SelectProblem& problem, const SelectCandidates<C>& candidates, int64_t num_rows,
             C* values, int64_t* indices) {
  const int64_t k = problem.k;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t first_list = row * candidates.ranges;
    SelectKey<C>* keys = candidates.keys + first_list * candidates.capacity;
    int32_t* tokens = candidates.tokens + first_list * candidates.capacity;
    int64_t n = candidates.counts[first_list];
    for (int64_t range = 1; range < candidates.ranges; ++range) {
      const int64_t count = candidates.counts[first_list + range];
      const int64_t from = range * candidates.capacity;
      std::memmove(keys + n, keys + from, size_t(count) * sizeof *keys);
      std::memmove(tokens + n, tokens + from, size_t(count) * sizeof *tokens);
      n += count;
    }
    if (n > k) {
      keep_largest<C>(keys, tokens, n, k, k);
      n = k;
    }
    for (int64_t j = 0; j < n; ++j) {
      values[row * k + j] = to_logit<C>(keys[j]);
      indices[row * k + j] = tokens[j];
    }
    for (int64_t j = n; j < k; ++j) {
      values[row * k + j] = -C(__builtin_inff());
      indices[row * k + j] = -1;
    }
  }
}

// Of selection with sums in C of tokens kept as E.
template <typename C, typename E>
constexpr SelectKernels<C> kKernels = {
    .rows_per_panel = Scan<C, E>::kPanelRows,
    .tokens_per_step = kStepTokens,
    .element_size = sizeof(E),
    .load_cost = 8,
    .entry_cost = 1,
    .spare_share = 1,
    .scratch_bytes = scratch_bytes<C, E>,
    .scan = scan<C, E>,
    .collect = collect<C>,
};

}  // namespace
}  // namespace ait::cpu
