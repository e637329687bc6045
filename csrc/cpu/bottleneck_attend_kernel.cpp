#include "bottleneck_attend_kernel.h"

#include <common/simd.h>
#include <common/simd_stream.h>

#include "bottleneck_attend_gather.h"

namespace ait::cpu {
namespace {

// Vectors of a token's gradient that are summed together.
constexpr int kTile = 8;

// Online softmax: whatever is summed so far is relative to the largest logit so far.
template <typename C, typename S>
void forward_block(const AttendForward<C>& a, int64_t row, int64_t part, int64_t first, int n) {
  using V = Vec<C>;
  const int64_t width = a.lists.width;
  const Block<S> block(a.lists, row * a.lists.num_entries + first, n);
  constexpr int kVectors = kBlockVectors<C>;
  V logits[kVectors];
  block.dots_with(a.query + row * width, width, [&](int i, C x) __attribute__((always_inline)) {
    // Unused lanes repeat a logit: exp(-inf) would be slow, as all that it rounds below the normal
    // range is on x86.
    for (int v = 0; i == 0 && v < kVectors; ++v) logits[v] = V::broadcast(x);
    set_lane(logits[i / V::size], i % V::size, x);
  });
  C* gates = a.gates + row * a.lists.num_entries + first;
  for (int v = 0; v * V::size < n; ++v) {
    const int rest = n - v * V::size;
    rest < V::size ? logits[v].store(gates + v * V::size, rest)
                   : logits[v].store(gates + v * V::size);
  }

  // Behind the block, the largest logit so far: its weight is what the sums so far are scaled with.
  const C old_max = a.part_max[part];
  set_lane(logits[kBlock / V::size], kBlock % V::size, old_max);
  V maxima = V::broadcast(old_max);  // no NaN: max returns its second argument where the first is
  for (int v = 0; v < kVectors; ++v) maxima = max(logits[v], maxima);
  const C new_max = reduce_max(maxima);
  // While all logits are -inf, exp(-inf - 0) = 0 is wanted, not exp(-inf + inf).
  const C shift = new_max == -INFINITY ? C(0) : new_max;
  C weights[kVectors * V::size];
  for (int v = 0; v < kVectors; ++v) {
    exp(logits[v] - V::broadcast(shift)).store(weights + v * V::size);
  }
  const C scale = weights[kBlock];
  C sum = a.part_sum[part] * scale;
  for (int i = 0; i < n; ++i) sum += weights[i];
  a.part_max[part] = new_max;
  a.part_sum[part] = sum;
  block.accumulate_into(a.part_pooled + part * width, scale, weights, width);
}

// The same for more than a block of narrow tokens; gates hold the logits meanwhile.
template <typename C, typename S>
void forward_segment(const AttendForward<C>& a, int64_t row, int64_t part, int64_t first, int n) {
  using V = Vec<C>;
  const int64_t width = a.lists.width;
  const Segment<S> segment(a.lists, row * a.lists.num_entries + first, n);
  C* logits = a.gates + row * a.lists.num_entries + first;
  segment.dots_with(a.query + row * width, width, logits);

  const C old_max = a.part_max[part];
  V maxima = V::broadcast(old_max);
  for_each_vector<C>(
      0, n,
      [&](int64_t i) __attribute__((always_inline)) { maxima = max(V::load(logits + i), maxima); },
      [&](int64_t i, int64_t rest) __attribute__((always_inline)) {
        for (; rest > 0; --rest) maxima = max(V::broadcast(logits[i + rest - 1]), maxima);
      });
  const C new_max = reduce_max(maxima);
  const C shift = new_max == -INFINITY ? C(0) : new_max;
  const C scale = new_max == old_max ? C(1) : exp_scalar(old_max - shift);
  const V shifts = V::broadcast(shift);
  C weights[kSegment];
  V sums = V::zero();
  for_each_vector<C>(
      0, n,
      [&](int64_t i) __attribute__((always_inline)) {
        const V e = exp(V::load(logits + i) - shifts);
        e.store(weights + i);
        sums = sums + e;
      },
      [&](int64_t i, int64_t rest) __attribute__((always_inline)) {
        exp(V::load(logits + i, rest) - shifts).store(weights + i, rest);
        sums = sums + V::load(weights + i, rest);
      });
  a.part_max[part] = new_max;
  a.part_sum[part] = a.part_sum[part] * scale + reduce_add(sums);
  segment.accumulate_into(a.part_pooled + part * width, scale, weights, width);
}

template <typename C, typename S>
void forward_parts(const AttendForward<C>& a, int64_t begin, int64_t end) {
  const int64_t width = a.lists.width;
  for (int64_t part = begin; part < end; ++part) {
    a.part_max[part] = -INFINITY;
    a.part_sum[part] = 0;
  }
  std::memset(a.part_pooled + begin * width, 0, size_t((end - begin) * width) * sizeof(C));
  for_each_group<C>(begin, end, width, [&](int64_t first, int64_t last) {
    sweep(a.lists, most_together<S>(width), first, last,
          [&](int64_t row, int64_t part, int64_t entry, int n) {
            n > kBlock ? forward_segment<C, S>(a, row, part, entry, n)
                       : forward_block<C, S>(a, row, part, entry, n);
          });
  });
}

// target = factor * target
template <typename C>
AIT_INLINE void scale_in_place(C factor, int64_t width, C* target) {
  using V = Vec<C>;
  const V factors = V::broadcast(factor);
  for_each_vector<C>(
      0, width, [&](int64_t e) { (V::load(target + e) * factors).store(target + e); },
      [&](int64_t e, int64_t rest) {
        (V::load(target + e, rest) * factors).store(target + e, rest);
      });
}

template <typename C>
AIT_INLINE bool has_nan(const C* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] != x[i]) return true;
  }
  return false;
}

template <typename C>
void forward_row(const AttendForward<C>& a, int64_t row) {
  using V = Vec<C>;
  const int64_t parts = a.lists.parts, width = a.lists.width, num_rows = a.lists.num_rows;
  const int64_t end = parts * num_rows;
  const int64_t num_entries = a.lists.num_entries, count = a.lists.counts[row];
  C* gates = a.gates + row * num_entries;
  C* pooled = a.pooled + row * width;
  std::memset(gates + count, 0, size_t(num_entries - count) * sizeof(C));

  C maximum = -INFINITY;
  for (int64_t p = row; p < end; p += num_rows) {
    maximum = a.part_max[p] > maximum ? a.part_max[p] : maximum;
  }
  const C shift = maximum == -INFINITY ? C(0) : maximum;
  C sum = 0;
  if (parts == 1) {
    sum = a.part_sum[row];
  } else {
    std::memset(pooled, 0, size_t(width) * sizeof(C));
    for (int64_t p = row; p < end; p += num_rows) {
      const C scale = exp_scalar(a.part_max[p] - shift);
      const C* part_pooled = a.part_pooled + p * width;
      sum += a.part_sum[p] * scale;
      accumulate<1>(C(1), &scale, &part_pooled, width, pooled);
    }
  }

  if (maximum == -INFINITY && sum == 0) {  // nothing listed, or all of it at -inf
    std::memset(gates, 0, size_t(count) * sizeof(C));
    std::memset(pooled, 0, size_t(width) * sizeof(C));
    a.lse[row] = -INFINITY;
    return;
  }
  // With an infinite logit, gates and pooled become NaN, as softmax has it; logsumexp is infinite.
  const bool infinite = maximum == INFINITY && !has_nan(gates, count);
  a.lse[row] = infinite ? maximum : shift + C(std::log(sum));
  const C inverse = C(1) / sum;
  const V shifts = V::broadcast(shift), inverses = V::broadcast(inverse);
  for_each_vector<C>(
      0, count, [&](int64_t j) { (exp(V::load(gates + j) - shifts) * inverses).store(gates + j); },
      [&](int64_t j, int64_t rest) {
        (exp(V::load(gates + j, rest) - shifts) * inverses).store(gates + j, rest);
      });
  scale_in_place(inverse, width, pooled);
}

template <typename C>
void forward_rows(const AttendForward<C>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) forward_row(a, row);
}

// sum_i gates_i u_i = dpooled . pooled + gates . dgates: known before any token is read.
template <typename C>
void backward_offsets(const AttendBackward<C>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t width = a.lists.width, count = a.lists.counts[row];
    const C* gates = a.gates + row * a.lists.num_entries;
    bool takes_part = false;
    for (int64_t j = 0; j < count; ++j) takes_part |= gates[j] != 0;
    C from_pooled = 0, from_gates = 0;
    if (a.grad_pooled != nullptr) {
      const C* pooled = a.pooled + row * width;
      dots<1>(a.grad_pooled + row * width, &pooled, width, [&](int, C x) { from_pooled = x; });
    }
    if (a.grad_gates != nullptr) {
      const C* grad_gates = a.grad_gates + row * a.lists.num_entries;
      dots<1>(gates, &grad_gates, count, [&](int, C x) { from_gates = x; });
    }
    a.takes_part[row] = takes_part;
    a.offsets[row] = (a.grad_lse != nullptr ? a.grad_lse[row] : C(0)) - (from_pooled + from_gates);
  }
}

// grad_logits[i] = gate * (u + dgate + offset), where grad_logits holds u.
template <typename C>
AIT_INLINE void finish_grad_logits(const AttendBackward<C>& a, int64_t row, int64_t entry, int n,
                                   C* grad_logits) {
  for (int i = 0; i < n; ++i) {
    const C grad_gate = a.grad_gates != nullptr ? a.grad_gates[entry + i] : C(0);
    grad_logits[i] = a.gates[entry + i] * ((grad_logits[i] + grad_gate) + a.offsets[row]);
  }
}

template <typename C, typename S>
void backward_block(const AttendBackward<C>& a, int64_t row, int64_t part, int64_t first, int n) {
  const int64_t width = a.lists.width, entry = row * a.lists.num_entries + first;
  const Block<S> block(a.lists, entry, n);
  C grad_logits[kBlock] = {};
  if (a.grad_pooled != nullptr) {
    block.dots_with(a.grad_pooled + row * width, width,
                    [&](int i, C x) __attribute__((always_inline)) { grad_logits[i] = x; });
  }
  finish_grad_logits(a, row, entry, n, grad_logits);
  for (int i = 0; i < n; ++i) a.grad_logits[entry + i] = grad_logits[i];
  block.accumulate_into(a.part_grad_query + part * width, C(1), grad_logits, width);
}

template <typename C, typename S>
void backward_segment(const AttendBackward<C>& a, int64_t row, int64_t part, int64_t first, int n) {
  const int64_t width = a.lists.width, entry = row * a.lists.num_entries + first;
  const Segment<S> segment(a.lists, entry, n);
  C* grad_logits = a.grad_logits + entry;
  if (a.grad_pooled != nullptr) {
    segment.dots_with(a.grad_pooled + row * width, width, grad_logits);
  } else {
    std::memset(grad_logits, 0, size_t(n) * sizeof(C));
  }
  finish_grad_logits(a, row, entry, n, grad_logits);
  segment.accumulate_into(a.part_grad_query + part * width, C(1), grad_logits, width);
}

template <typename C, typename S>
void backward_parts(const AttendBackward<C>& a, int64_t begin, int64_t end) {
  const int64_t width = a.lists.width;
  std::memset(a.part_grad_query + begin * width, 0, size_t((end - begin) * width) * sizeof(C));
  for_each_group<C>(begin, end, width, [&](int64_t first, int64_t last) {
    sweep(a.lists, most_together<S>(width), first, last,
          [&](int64_t row, int64_t part, int64_t entry, int n) {
            if (!a.takes_part[row]) return;
            n > kBlock ? backward_segment<C, S>(a, row, part, entry, n)
                       : backward_block<C, S>(a, row, part, entry, n);
          });
  });
}

template <typename C>
void backward_rows(const AttendBackward<C>& a, int64_t begin, int64_t end) {
  const int64_t parts = a.lists.parts, width = a.lists.width, num_rows = a.lists.num_rows;
  if (parts == 1) return;
  for (int64_t row = begin; row < end; ++row) {
    C* grad_query = a.grad_query + row * width;
    std::memset(grad_query, 0, size_t(width) * sizeof(C));
    for (int64_t p = row; p < parts * num_rows; p += num_rows) {
      const C one = 1;
      const C* part_grad_query = a.part_grad_query + p * width;
      accumulate<1>(C(1), &one, &part_grad_query, width, grad_query);
    }
  }
}

// target[e] = sum over entries of gate * dpooled_row[e] + dlogit * query_row[e], for N whole
// vectors or, with N = 1, for the last rest columns.
template <int N, bool has_grad_pooled, bool streams, typename C, typename S>
AIT_INLINE void sum_entries(const AttendBackward<C>& a, const AttendEntry<C>* first,
                            const AttendEntry<C>* last, int64_t e, int64_t rest, S* target) {
  using V = Vec<C>;
  V sums[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) sums[n] = V::zero();
  const bool whole = rest >= V::size;
  for (const AttendEntry<C>* entry = first; entry < last; ++entry) {
    const V gate = V::broadcast(entry->gate), grad_logit = V::broadcast(entry->grad_logit);
    const int64_t at = entry->row * a.lists.width + e;
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const C* query = a.query + at + n * V::size;
      sums[n] = fmadd(grad_logit, whole ? V::load(query) : V::load(query, rest), sums[n]);
      if constexpr (has_grad_pooled) {
        const C* grad_pooled = a.grad_pooled + at + n * V::size;
        sums[n] = fmadd(gate, whole ? V::load(grad_pooled) : V::load(grad_pooled, rest), sums[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    S* p = target + e + n * V::size;
    if constexpr (streams) {
      stream(sums[n], p);
    } else {
      whole ? sums[n].store(p) : sums[n].store(p, rest);
    }
  }
}

// Covers the columns from e on with tiles of N vectors; returns the first column not covered.
template <int N, bool has_grad_pooled, bool streams, typename C, typename S>
AIT_INLINE int64_t sum_tiles(const AttendBackward<C>& a, const AttendEntry<C>* first,
                             const AttendEntry<C>* last, int64_t e, int64_t end, S* target) {
  constexpr int64_t kColumns = N * Vec<C>::size;
  for (; e + kColumns <= end; e += kColumns) {
    sum_entries<N, has_grad_pooled, streams>(a, first, last, e, kColumns, target);
  }
  return e;
}

template <bool has_grad_pooled, bool streams, typename C, typename S>
void write_tokens(const AttendBackward<C>& a, const AttendTokenScratch<C>& scratch, int64_t first,
                  int64_t last) {
  const int64_t width = a.lists.width;
  for (int64_t slab = 0; slab < width; slab += a.slab) {
    const int64_t slab_end = width - slab < a.slab ? width : slab + a.slab;
    const AttendEntry<C>* entries = scratch.entries;
    for (int64_t token = first; token < last; ++token) {
      const AttendEntry<C>* entries_end = scratch.entries + scratch.ends[token - first];
      S* target = static_cast<S*>(a.grad_tokens) + token * width;
      int64_t e = slab;
      e = sum_tiles<kTile, has_grad_pooled, streams>(a, entries, entries_end, e, slab_end, target);
      e = sum_tiles<4, has_grad_pooled, streams>(a, entries, entries_end, e, slab_end, target);
      for (; e < slab_end; e += Vec<C>::size) {
        sum_entries<1, has_grad_pooled, streams>(a, entries, entries_end, e, slab_end - e, target);
      }
      entries = entries_end;
    }
  }
}

// First position in the ascending list whose index is at least `token`.
AIT_INLINE int64_t lower_bound(const int64_t* list, int64_t count, int64_t token) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (list[middle] < token) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

template <typename C, typename S>
void backward_tokens(const AttendBackward<C>& a, const AttendTokenScratch<C>& scratch,
                     int64_t begin, int64_t end) {
  const int64_t num_entries = a.lists.num_entries;
  const auto list_of = [&](int64_t row) { return a.lists.indices + row * num_entries; };
  const auto count_of = [&](int64_t row) { return a.takes_part[row] ? a.lists.counts[row] : 0; };

  // How many rows list each token of the range.
  int64_t* ends = scratch.ends;
  std::memset(ends, 0, size_t(end - begin) * sizeof(int64_t));
  for (int64_t row = 0; row < a.lists.num_rows; ++row) {
    const int64_t* list = list_of(row);
    const int64_t count = count_of(row);
    int64_t j = scratch.cursors[row] = lower_bound(list, count, begin);
    for (; j < count && list[j] < end; ++j) ++ends[list[j] - begin];
  }

  // As many tokens at a time as have room for their entries; one always has.
  for (int64_t first = begin, last; first < end; first = last) {
    int64_t* run_ends = ends + (first - begin);
    int64_t total = 0;
    for (last = first; last < end; ++last) {
      const int64_t entries = run_ends[last - first];
      if (last > first && total + entries > scratch.capacity) break;
      run_ends[last - first] = total;
      total += entries;
    }
    // Row after row: so each token's entries are ordered by row, whatever the range.
    for (int64_t row = 0; row < a.lists.num_rows; ++row) {
      const int64_t* list = list_of(row);
      const int64_t count = count_of(row), at = row * num_entries;
      int64_t j = scratch.cursors[row];
      for (; j < count && list[j] < last; ++j) {
        scratch.entries[run_ends[list[j] - first]++] = {row, a.gates[at + j],
                                                        a.grad_logits[at + j]};
      }
      scratch.cursors[row] = j;
    }
    AttendTokenScratch<C> run = scratch;
    run.ends = run_ends;
    if (a.streams) {
      a.grad_pooled != nullptr ? write_tokens<true, true, C, S>(a, run, first, last)
                               : write_tokens<false, true, C, S>(a, run, first, last);
    } else {
      a.grad_pooled != nullptr ? write_tokens<true, false, C, S>(a, run, first, last)
                               : write_tokens<false, false, C, S>(a, run, first, last);
    }
  }
  if (a.streams) stream_fence();
}

template <typename C, typename S>
constexpr AttendKernels<C> kernels_for() {
  return {forward_parts<C, S>,  forward_rows<C>,  backward_offsets<C>,
          backward_parts<C, S>, backward_rows<C>, backward_tokens<C, S>};
}

}  // namespace

namespace AIT_CAPABILITY {
const BottleneckAttendKernels bottleneck_attend_kernels = {
    kernels_for<float, float>(), kernels_for<double, double>(), kernels_for<float, BFloat16>(),
    kernels_for<float, Float16>()};
}  // namespace AIT_CAPABILITY

}  // namespace ait::cpu
