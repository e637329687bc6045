// Building blocks of bottleneck_attend's loops over rows: the order in which rows visit their
// tokens, and products with the tokens of one visit. Compiled once for each instruction set, like
// common/simd.h.
#pragma once

#include <common/simd.h>

#include "bottleneck_attend_kernel.h"

namespace ait::cpu {
namespace {

// Enough tokens for independent sums that hide the latency of fmadd, few enough that they are still
// in the first-level cache when their weights are known.
constexpr int kBlock = kAttendBlock;
constexpr int64_t kStateBytes = 1 << 20;

// Narrow tokens are taken by more than a block, a segment: as many as stay in the first-level cache
// share the steps of a softmax, which for a few short rows are all latency.
constexpr int64_t kSegment = 64;
constexpr int64_t kSegmentBytes = 1 << 15;

// Most tokens that are taken together; like the order of every sum, it depends on the width alone.
template <typename S>
AIT_INLINE int64_t most_together(int64_t width) {
  const int64_t fitting = kSegmentBytes / (int64_t(sizeof(S)) * (width + 1));
  return fitting < 2 * kBlock ? kBlock : fitting < kSegment ? fitting : kSegment;
}

// Vectors that hold the values of a block and one more.
template <typename C>
constexpr int kBlockVectors = kBlock / Vec<C>::size + 1;

// Calls run(Count<n>{}) for n in [1, N].
template <int N>
struct Count {
  static constexpr int value = N;
};

template <int N, typename Run>
AIT_INLINE void with_count(int n, Run run) {
  if constexpr (N > 1) {
    if (n < N) return with_count<N - 1>(n, run);
  }
  run(Count<N>{});
}

template <typename C>
AIT_INLINE C exp_scalar(C x) {
  C lanes[Vec<C>::size];
  exp(Vec<C>::broadcast(x)).store(lanes);
  return lanes[0];
}

// Covers the columns [begin, end): whole(e) for each whole vector, then rest(e, columns left).
template <typename C, typename Whole, typename Rest>
AIT_INLINE void for_each_vector(int64_t begin, int64_t end, Whole whole, Rest rest) {
  int64_t e = begin;
  for (; e + Vec<C>::size <= end; e += Vec<C>::size) whole(e);
  if (e < end) rest(e, end - e);
}

// take(n, query . x[n]). The order of each sum depends on the width alone.
template <int N, typename C, typename S, typename Take>
AIT_INLINE void dots(const C* query, const S* const* x, int64_t width, Take take) {
  using V = Vec<C>;
  V sums[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) sums[n] = V::zero();
  for_each_vector<C>(
      0, width,
      [&](int64_t e) __attribute__((always_inline)) {
        const V q = V::load(query + e);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[n] = fmadd(q, V::load(x[n] + e), sums[n]);
      },
      [&](int64_t e, int64_t rest) __attribute__((always_inline)) {
        const V q = V::load(query + e, rest);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[n] = fmadd(q, V::load(x[n] + e, rest), sums[n]);
      });
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) take(n, reduce_add(sums[n]));
}

// sum = scale * sum + weights[0] x[0] + weights[1] x[1] + ...
template <int N, typename C, typename S>
AIT_INLINE void accumulate(C scale, const C* weights, const S* const* x, int64_t width, C* sum) {
  using V = Vec<C>;
  V w[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) w[n] = V::broadcast(weights[n]);
  const V scales = V::broadcast(scale);
  for_each_vector<C>(
      0, width,
      [&](int64_t e) __attribute__((always_inline)) {
        V total = V::load(sum + e) * scales;
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) total = fmadd(w[n], V::load(x[n] + e), total);
        total.store(sum + e);
      },
      [&](int64_t e, int64_t rest) __attribute__((always_inline)) {
        V total = V::load(sum + e, rest) * scales;
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) total = fmadd(w[n], V::load(x[n] + e, rest), total);
        total.store(sum + e, rest);
      });
}

// Where the tokens of some entries of the lists are, at most kMost.
template <int kMost, typename S>
struct Listed {
  const S* x[kMost];
  int n;

  AIT_INLINE Listed(const AttendLists& lists, int64_t first, int count) : n(count) {
    for (int i = 0; i < count; ++i) {
      x[i] = static_cast<const S*>(lists.tokens) + lists.indices[first + i] * lists.width;
    }
  }
};

// The listed tokens of one block.
template <typename S>
struct Block : Listed<kBlock, S> {
  using Listed<kBlock, S>::Listed, Listed<kBlock, S>::x, Listed<kBlock, S>::n;

  template <typename C, typename Take>
  AIT_INLINE void dots_with(const C* query, int64_t width, Take take) const {
    with_count<kBlock>(n, [&](auto count) __attribute__((always_inline)) {
      dots<decltype(count)::value>(query, x, width, take);
    });
  }

  template <typename C>
  AIT_INLINE void accumulate_into(C* sum, C scale, const C* weights, int64_t width) const {
    with_count<kBlock>(n, [&](auto count) __attribute__((always_inline)) {
      accumulate<decltype(count)::value>(scale, weights, x, width, sum);
    });
  }
};

// sum = scale * sum + weights[0] x[0] + ... for the N vectors of columns from e on, of which one
// has `rest` columns left if that is less than a vector: sums stay in registers, those of even and
// of odd tokens apart.
template <int N, typename C, typename S>
AIT_INLINE void accumulate_columns(C scale, const C* weights, const S* const* x, int n, int64_t e,
                                   int64_t rest, C* sum) {
  using V = Vec<C>;
  const auto load = [&](const auto* p, int v) __attribute__((always_inline)) {
    const auto* at = p + e + v * V::size;
    return rest < V::size ? V::load(at, rest) : V::load(at);
  };
  V even[N], odd[N];
  for (int v = 0; v < N; ++v) even[v] = load(sum, v) * V::broadcast(scale);
  for (int v = 0; v < N; ++v) odd[v] = V::zero();
  int i = 0;
  for (; i + 2 <= n; i += 2) {
    const V first = V::broadcast(weights[i]), second = V::broadcast(weights[i + 1]);
    for (int v = 0; v < N; ++v) even[v] = fmadd(first, load(x[i], v), even[v]);
    for (int v = 0; v < N; ++v) odd[v] = fmadd(second, load(x[i + 1], v), odd[v]);
  }
  if (i < n) {
    const V last = V::broadcast(weights[i]);
    for (int v = 0; v < N; ++v) even[v] = fmadd(last, load(x[i], v), even[v]);
  }
  for (int v = 0; v < N; ++v) {
    C* target = sum + e + v * V::size;
    const V total = even[v] + odd[v];
    rest < V::size ? total.store(target, rest) : total.store(target);
  }
}

// The listed tokens of one segment.
template <typename S>
struct Segment : Listed<kSegment, S> {
  using Listed<kSegment, S>::Listed, Listed<kSegment, S>::x, Listed<kSegment, S>::n;

  // out[i] = query . x[i]
  template <typename C>
  AIT_INLINE void dots_with(const C* query, int64_t width, C* out) const {
    constexpr int kTogether = 8;
    int i = 0;
    for (; i + kTogether <= n; i += kTogether) {
      dots<kTogether>(query, x + i, width,
                      [&](int j, C dot) __attribute__((always_inline)) { out[i + j] = dot; });
    }
    for (; i < n; ++i) {
      dots<1>(query, x + i, width,
              [&](int, C dot) __attribute__((always_inline)) { out[i] = dot; });
    }
  }

  template <typename C>
  void accumulate_into(C* sum, C scale, const C* weights, int64_t width) const {
    constexpr int kVectors = 4;
    constexpr int64_t kColumns = kVectors * Vec<C>::size;
    int64_t e = 0;
    for (; e + kColumns <= width; e += kColumns) {
      accumulate_columns<kVectors>(scale, weights, x, n, e, Vec<C>::size, sum);
    }
    for (; e < width; e += Vec<C>::size) {
      accumulate_columns<1>(scale, weights, x, n, e, width - e, sum);
    }
  }
};

// Calls process(row, part, first entry, n) for the blocks, of up to `most` entries, of the parts
// [begin, end), each part's own in order. Parts advance together, one window of tokens after the
// other, so that a token which several rows list is still in cache when the next row wants it.
// Windows begin at multiples of their length and cut the lists into blocks: a row's blocks depend
// on its list and the shape alone.
template <typename Process>
AIT_INLINE void sweep(const AttendLists& lists, int64_t most, int64_t begin, int64_t end,
                      Process process) {
  for (int64_t part = begin; part < end; ++part) {
    lists.cursors[part] = part / lists.num_rows * lists.part_length;
  }
  const int64_t first_row = begin % lists.num_rows;
  int64_t window_end = 0, next_token;
  do {
    next_token = INT64_MAX;
    int64_t row = first_row, part_end = (begin / lists.num_rows + 1) * lists.part_length;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = part_end < lists.counts[row] ? part_end : lists.counts[row];
      const int64_t* indices = lists.indices + row * lists.num_entries;
      int64_t j = lists.cursors[part];
      if (j < last) {
        int64_t stop = j;
        if (indices[last - 1] < window_end) {
          stop = last;
        } else {
          while (indices[stop] < window_end) ++stop;
          if (indices[stop] < next_token) next_token = indices[stop];
        }
        // As few blocks as possible, all of about the same length.
        for (int64_t blocks = (stop - j + most - 1) / most; blocks > 0; --blocks) {
          const int n = blocks == 1 ? int(stop - j) : int((stop - j + blocks - 1) / blocks);
          process(row, part, j, n);
          j += n;
        }
        lists.cursors[part] = stop;
      }
      if (++row == lists.num_rows) {
        row = 0;
        part_end += lists.part_length;
      }
    }
    const int64_t begin_of_window = next_token / lists.window * lists.window;
    window_end =
        begin_of_window < INT64_MAX - lists.window ? begin_of_window + lists.window : INT64_MAX;
  } while (next_token != INT64_MAX);
}

// Splits [begin, end) into groups of about the same size whose sums stay in the second-level cache.
template <typename C, typename Run>
AIT_INLINE void for_each_group(int64_t begin, int64_t end, int64_t width, Run run) {
  const int64_t fitting = kStateBytes / (int64_t(sizeof(C)) * (width + 1));
  const int64_t most = fitting > 1 ? fitting : 1;
  for (int64_t groups = (end - begin + most - 1) / most; groups > 0; --groups) {
    const int64_t last = begin + (end - begin + groups - 1) / groups;
    run(begin, last);
    begin = last;
  }
}

}  // namespace
}  // namespace ait::cpu
