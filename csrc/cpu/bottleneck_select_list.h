// The lists of candidates that a task of bottleneck_select fills, one for each row. Included by
// bottleneck_select_scan.h alone.
#pragma once

#include <cpu/bottleneck_select_keys.h>
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

template <typename C>
class RowLists {
 public:
  static constexpr int kLanes = Vec<C>::size;

  RowLists(const SelectProblem& problem, const SelectTask& task,
           const SelectCandidates<C>& candidates, Arena& arena)
      : problem_(problem),
        task_(task),
        candidates_(candidates),
        padded_rows_(round_up(task.num_rows, kLanes)),
        thresholds_(arena.take<C>(padded_rows_)),
        open_rows_(arena.take<uint64_t>((padded_rows_ + 63) / 64)),
        lists_(arena.take<List<C>>(task.num_rows)) {}

  // Until a list has been cut, all may enter.
  void open() {
    num_open_ = 0;
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      const int64_t first = (row * candidates_.ranges + task_.range) * candidates_.capacity;
      List<C>& list = lists_[row];
      list = {candidates_.keys + first, candidates_.tokens + first, 0, candidates_.capacity,
              kBelowAllKeys<C>};
      if (problem_.elementwise) fetch(list);
    }
    for (int64_t row = 0; row < padded_rows_; ++row) {
      // Nothing compares as less than or equal to NaN.
      const bool real = row < task_.num_rows;
      thresholds_[row] = C(real ? __builtin_nanf("") : __builtin_inff());
      uint64_t& word = open_rows_[row / 64];
      if (row % 64 == 0) word = 0;
      num_open_ += real;
      word |= uint64_t{real} << row % 64;
    }
  }

  bool any_open() const { return num_open_ > 0; }
  const List<C>& operator[](int64_t row) const { return lists_[row]; }
  // Of the padded rows, as logits; those of rows that only fill up a vector let nothing pass.
  const C* thresholds() const { return thresholds_; }

  // Until their lists are full for the first time all rows of a panel take all tokens.
  bool fit_uncut(int64_t first_row) const {
    const List<C>& list = lists_[first_row];
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
      List<C>& list = lists_[first_row + r];
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
        const C* thresholds = thresholds_ + first_row + i % kVectors * kLanes;
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

  // Appends the logits whose bit is set. A list that is cut on the way raises its own threshold,
  // which append() reads again.
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

  // One bit for each of kRows rows; kRows divides first_row. A row is open unless it only fills up
  // its vector, or has k NaNs, since of a comparison with NaN no threshold could say that nothing
  // passes.
  template <int64_t kRows>
  uint64_t open_rows(int64_t first_row) const {
    return open_rows_[first_row / 64] >> first_row % 64 & ~uint64_t{0} >> (64 - kRows);
  }

  AIT_INLINE void append(int64_t row, C logit, int32_t token) {
    List<C>& list = lists_[row];
    const SelectKey<C> key = to_key(logit);
    if (key <= list.threshold) return;
    list.keys[list.count] = key;
    list.tokens[list.count] = token;
    // A list that holds no more than k even when full holds all tokens of the range.
    if (++list.count == list.full && list.count > problem_.k) {
      cut(row, problem_.k + (candidates_.capacity - problem_.k) / 4);
    }
  }

  // As many as k have this key or a larger one.
  AIT_INLINE void raise_threshold(int64_t row, SelectKey<C> smallest) {
    lists_[row].threshold = smallest;
    thresholds_[row] = to_logit<C>(smallest);
    if (smallest == kLargestKey<C>) {
      ++statistics_.closed_rows;
      --num_open_;
      thresholds_[row] = C(__builtin_inff());
      open_rows_[row / 64] &= ~(uint64_t{1} << row % 64);
    }
  }

  // Leaves at most k entries in each.
  void close() {
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      List<C>& list = lists_[row];
      if (list.count > problem_.k) cut(row, problem_.k);
      candidates_.counts[row * candidates_.ranges + task_.range] = list.count;
    }
  }

  // Leaves k entries, or up to `most`; returns the smallest.
  __attribute__((noinline)) SelectKey<C> cut(int64_t row, int64_t most) {
    List<C>& list = lists_[row];
    const Kept<C> kept = keep_largest<C>(list.keys, list.tokens, list.count, problem_.k, most);
    list.count = kept.count;
    raise_threshold(row, kept.smallest);
    statistics_.cuts_in_ties += kept.in_ties;
    ++statistics_.list_cuts;
    return kept.smallest;
  }

  SelectStatistics& statistics() { return statistics_; }

 private:
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

  const SelectProblem& problem_;
  const SelectTask& task_;
  const SelectCandidates<C>& candidates_;
  const int64_t padded_rows_;
  C* const thresholds_;
  uint64_t* const open_rows_;  // one bit a row: see open_rows()
  List<C>* const lists_;
  int64_t num_open_ = 0;
  SelectStatistics statistics_{};
};

}  // namespace
}  // namespace ait::cpu
