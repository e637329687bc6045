// One task of bottleneck_select: tile by tile, products and filter; then joining the lists.
// Included by the kernel sources alone.
#pragma once

#include <cpu/bottleneck_select_list.h>
#include <cpu/bottleneck_select_load.h>
#include <cpu/bottleneck_select_product.h>

namespace ait::cpu {
namespace {

// A list of candidates while it is filled.
template <typename C>
struct List {
  SelectKey<C>* keys;
  int32_t* tokens;
  int64_t count;
  int64_t full;            // the count at which it is cut
  SelectKey<C> threshold;  // as many as k of those seen have this key or a larger one
};

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
        unpacked(arena.take<E>(padded_width)),
        thresholds(arena.take<C>(padded_rows)),
        open_rows(arena.take<uint64_t>((padded_rows + 63) / 64)),
        lists(arena.take<List<C>>(num_rows)) {}

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
  C* thresholds;        // the lists' thresholds, as logits
  uint64_t* open_rows;  // one bit a row: see append_all()
  List<C>* lists;
};

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
        candidates_(candidates),
        buffers_(problem, task.num_rows, arena),
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
    pack_query();
    open_lists();
    for (int64_t token = task_.first_token; token < task_.last_token && num_open_ > 0;) {
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
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      List<C>& list = buffers_.lists[row];
      if (list.count > problem_.k) cut(row, problem_.k);
      candidates_.counts[row * candidates_.ranges + task_.range] = list.count;
    }
    release_tile_registers();
    return statistics_;
  }

 private:
  // Panels of the block's rows: for each operand of d elements, that of all rows of a panel side by
  // side. The rows that fill up the last vector are zero.
  void pack_query() {
    constexpr int kSize = Operand<E>::size;
    const int64_t width = buffers_.padded_width;
    for (int64_t row = 0; row < buffers_.padded_rows; ++row) {
      const int64_t panel = row / kPanelRows * kPanelRows;
      const int64_t stride = task_.num_rows - panel > kLanes ? kPanelRows : kLanes;
      E* packed = buffers_.panels + panel * width + (row - panel) * kSize;
      std::memset(buffers_.unpacked, 0, size_t(width) * sizeof(E));
      if (row < task_.num_rows) {
        const int64_t source = task_.group * problem_.num_rows + task_.first_row + row;
        load_row(problem_.query, kStorageOf<C>, source * problem_.width, problem_.rounding,
                 problem_.width, buffers_.unpacked);
      }
      for (int64_t i = 0; i < width; ++i) {
        packed[i / kSize * stride * kSize + i % kSize] = buffers_.unpacked[i];
      }
    }
  }

  // Lists are filled side by side, a few entries each: more places than the processor foresees.
  // Beside a product that is little; for logits that are there it would be waited for.
  void fetch(const List<C>& list) const {
    constexpr int64_t kLine = 64;
    for (int64_t i = 0; i < problem_.k; i += kLine / int64_t(sizeof *list.keys)) {
      __builtin_prefetch(list.keys + i, 1, 2);
    }
    for (int64_t i = 0; i < problem_.k; i += kLine / int64_t(sizeof *list.tokens)) {
      __builtin_prefetch(list.tokens + i, 1, 2);
    }
  }

  void open_lists() {
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      const int64_t first = (row * candidates_.ranges + task_.range) * candidates_.capacity;
      List<C>& list = buffers_.lists[row];
      list = {candidates_.keys + first, candidates_.tokens + first, 0, candidates_.capacity,
              kBelowAllKeys<C>};
      if (problem_.elementwise) fetch(list);
    }
    for (int64_t row = 0; row < buffers_.padded_rows; ++row) {
      // Nothing compares as less than or equal to NaN: until a list has been cut, all may enter.
      const bool real = row < task_.num_rows;
      buffers_.thresholds[row] = C(real ? __builtin_nanf("") : __builtin_inff());
      uint64_t& word = buffers_.open_rows[row / 64];
      if (row % 64 == 0) word = 0;
      num_open_ += real;
      word |= uint64_t{real} << row % 64;
    }
  }

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
    ++statistics_.tiles_in_place;
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
    ++statistics_.tiles_copied;
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
      const bool fits = fits_uncut_lists(row);
      multiply<C, E, kVectors>(panel, tile, tile_stride_, buffers_.padded_width, prefetcher_,
                               logits);
      if (fits) {
        fill<kVectors>(logits, kVectors * kLanes, tokens, num_tokens, row);
      } else {
        filter<kVectors>(logits, tokens, num_tokens, row);
      }
    }
  }

  // Until their lists are full for the first time all rows of a panel take all tokens.
  bool fits_uncut_lists(int64_t first_row) const {
    const List<C>& list = buffers_.lists[first_row];
    return list.threshold == kBelowAllKeys<C> && list.count + kStepTokens < list.full;
  }

  template <int kVectors>
  void fill(const C* logits, int64_t stride, const int32_t* tokens, int64_t num_tokens,
            int64_t first_row) {
    constexpr int64_t kRows = kVectors * kLanes;
    alignas(64) SelectKey<C> keys[kStepTokens * kRows];
    for (int64_t t = 0; t < kStepTokens; ++t) {
      for (int64_t r = 0; r < kRows; ++r) keys[t * kRows + r] = to_key(logits[t * stride + r]);
    }
    for (int64_t r = 0; r < smaller(kRows, task_.num_rows - first_row); ++r) {
      List<C>& list = buffers_.lists[first_row + r];
      // Whole steps, in a few wide writes; what they put behind the last token is overwritten.
      SelectKey<C> own[kStepTokens];
#pragma GCC unroll 32
      for (int64_t t = 0; t < kStepTokens; ++t) own[t] = keys[t * kRows + r];
      std::memcpy(list.keys + list.count, own, sizeof own);
      std::memcpy(list.tokens + list.count, tokens, kStepTokens * sizeof *tokens);
      list.count += num_tokens;
    }
  }

  // Appends what passes the thresholds, token by token.
  template <int kVectors>
  void filter(const C* logits, const int32_t* tokens, int64_t num_tokens, int64_t first_row) {
    constexpr int64_t kVectorsPerWord = 64 / kLanes;
    const int64_t num_vectors = num_tokens * kVectors;
    for (int64_t first = 0; first < num_vectors; first += kVectorsPerWord) {
      uint64_t passing = 0;  // one bit for each of 64 logits
      for (int64_t i = first; i < smaller(first + kVectorsPerWord, num_vectors); ++i) {
        const C* thresholds = buffers_.thresholds + first_row + i % kVectors * kLanes;
        const uint64_t mask =
            not_less_equal_mask(Vec<C>::load(logits + i * kLanes), Vec<C>::load(thresholds));
        passing |= mask << ((i - first) * kLanes);
      }
      if (passing != 0) {
        append_all<kVectors>(passing, logits + first * kLanes, kVectors * kLanes,
                             tokens + first / kVectors, first_row);
      }
    }
  }

  // A tile of logits that are there, where waiting for memory is most of the time. A product with 1
  // would change nothing, and take long where logits are denormal.
  void scan_ready_tile() {
    if (!has_unit_query()) multiply_each();
    const int64_t t = buffers_.lists[0].count < problem_.k ? fill_ready() : 0;
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
    const int64_t n = smaller(tile_size_, problem_.k - buffers_.lists[0].count);
    int64_t t = 0;
    for (; t + kStepTokens <= n; t += kStepTokens) {
      for (int64_t row = 0; row < task_.num_rows; row += kLanes) {
        fill<1>(tile_ + t * tile_stride_ + row, tile_stride_, buffers_.tile_tokens + t, kStepTokens,
                row);
      }
    }
    for (; t < n; ++t) {
      for (int64_t row = 0; row < task_.num_rows; ++row) {
        append(row, tile_[t * tile_stride_ + row], buffers_.tile_tokens[t]);
      }
    }
    if (buffers_.lists[0].count < problem_.k) return n;
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      raise_threshold(row, smallest_of(buffers_.lists[row].keys, problem_.k));
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
      const C* source = buffers_.thresholds + first_row;
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
      append_all<kVectors>(passing, logits, tile_stride_, buffers_.tile_tokens + t, first_row);
      load_thresholds();
    }
    if constexpr (kTokens > 1) filter_ready<kVectors, 1>(t, first_row);
  }

  // Appends the logits whose bit is set. A list that is cut on the way raises its own threshold,
  // which append() reads again. A row is open unless it only fills up its vector, or has k NaNs,
  // since of a comparison with NaN no threshold could say that nothing passes.
  template <int kVectors>
  AIT_INLINE void append_all(uint64_t passing, const C* logits, int64_t stride,
                             const int32_t* tokens, int64_t first_row) {
    constexpr int64_t kRows = kVectors * kLanes;
    uint64_t open = open_rows<kRows>(first_row);
    for (int64_t rows = kRows; rows < 64; rows *= 2) open |= open << rows;
    for (passing &= open; passing != 0; passing &= passing - 1) {
      const int64_t position = __builtin_ctzll(passing);
      const int64_t t = position / kRows, row = position % kRows;
      append(first_row + row, logits[t * stride + row], tokens[t]);
    }
  }

  // One bit for each of kRows rows; kRows divides first_row.
  template <int64_t kRows>
  uint64_t open_rows(int64_t first_row) const {
    return buffers_.open_rows[first_row / 64] >> first_row % 64 & ~uint64_t{0} >> (64 - kRows);
  }

  AIT_INLINE void append(int64_t row, C logit, int32_t token) {
    List<C>& list = buffers_.lists[row];
    const SelectKey<C> key = to_key(logit);
    if (key <= list.threshold) return;
    list.keys[list.count] = key;
    list.tokens[list.count] = token;
    // A list that holds no more than k even when full holds all tokens of the range.
    if (++list.count == list.full && list.count > problem_.k) {
      cut(row, problem_.k + (candidates_.capacity - problem_.k) / 4);
    }
  }

  // Leaves k entries, or up to `most`.
  __attribute__((noinline)) void cut(int64_t row, int64_t most) {
    List<C>& list = buffers_.lists[row];
    const Kept<C> kept = keep_largest<C>(list.keys, list.tokens, list.count, problem_.k, most);
    list.count = kept.count;
    raise_threshold(row, kept.smallest);
    statistics_.cuts_in_ties += kept.in_ties;
    ++statistics_.list_cuts;
  }

  // As many as k have this key or a larger one.
  AIT_INLINE void raise_threshold(int64_t row, SelectKey<C> smallest) {
    buffers_.lists[row].threshold = smallest;
    buffers_.thresholds[row] = to_logit<C>(smallest);
    if (smallest == kLargestKey<C>) {
      ++statistics_.closed_rows;
      --num_open_;
      buffers_.thresholds[row] = C(__builtin_inff());
      buffers_.open_rows[row / 64] &= ~(uint64_t{1} << row % 64);
    }
  }

  const SelectProblem& problem_;
  const SelectTask& task_;
  const SelectCandidates<C>& candidates_;
  const ScanBuffers<C, E> buffers_;
  Prefetcher prefetcher_;
  // In whole vectors; tokens 2 KiB apart would compete for the same cache sets.
  const bool can_read_in_place_;
  const bool worth_prefetching_;
  const E* tile_ = nullptr;
  int64_t tile_stride_ = 0, tile_size_ = 0;
  int64_t num_open_ = 0;
  SelectStatistics statistics_{};
};

template <typename C, typename E>
int64_t scratch_bytes(const SelectProblem& problem, int64_t num_rows) {
  Arena arena{nullptr};
  ScanBuffers<C, E>(problem, num_rows, arena);
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
constexpr SelectKernels<C> kKernels = {Scan<C, E>::kPanelRows, kStepTokens, sizeof(E),
                                       scratch_bytes<C, E>,    scan<C, E>,  collect<C>};

}  // namespace
}  // namespace ait::cpu
