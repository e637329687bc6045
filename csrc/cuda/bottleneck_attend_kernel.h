// Kernels of bottleneck_attend.
//
// Shapes: R rows, k entries a row, T tokens, E width. S is the storage type of the tokens, C the
// compute type. A block takes a row, tile by tile of kAttendTile entries; rows are cut into parts,
// which are combined in order, where there are few of them.
#pragma once

#include <cuda/device.h>
#include <cuda/warp.h>

#include "bottleneck_attend_shape.h"

namespace ait::cuda {

// The token that an entry lists, or -1: what lies out of range takes no part.
__device__ inline int64_t listed_token(const Array<const int64_t>& indices, int64_t entry,
                                       int64_t num_tokens) {
  const int64_t token = indices[entry];
  return token < num_tokens ? token : -1;
}

// Whether every entry of a tile has a token, which allows loads without a branch around each: -1
// comes last.
__device__ inline bool is_full(const Array<int64_t>& listed) {
  const int64_t last = listed[kAttendTile - 1];
  return last >= 0;
}

// dots[i] = vector (E) . token i of a tile; 0 where there is no token. By the whole block: each
// warp has four entries.
template <typename S, typename C>
__device__ inline void tile_dots(const AttendPlan& p, const Array<const S>& tokens, bool aligned,
                                 const Array<int64_t>& listed, const Array<const C>& vector,
                                 bool vector_aligned, const Array<C>& dots) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  constexpr int kEntries = kAttendTile / kAttendWarps;
  int64_t at[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const int64_t token = listed[warp * kEntries + i];
    at[i] = token < 0 ? -1 : token * p.width;
  }
  C sum[kEntries] = {};
  const bool is_whole = aligned && vector_aligned && is_full(listed);
#pragma unroll(sizeof(S) == 2 ? 2 : 1)
  for (int64_t e = lane * 4; is_whole && e < p.width; e += kWarpSize * 4) {
    const Pack<C> v = load_pack(vector, e);
    Pack<C> x[kEntries];
#pragma unroll
    for (int i = 0; i < kEntries; ++i) x[i] = load_pack(tokens, at[i] + e);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[i] += v[c] * x[i][c];
    }
  }
  for (int64_t e = lane * 4; !is_whole && e < p.width; e += kWarpSize * 4) {
    const Pack<C> v = load4(vector, e, p.width - e, vector_aligned);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      if (at[i] < 0) continue;
      const Pack<C> x = load4(tokens, at[i] + e, p.width - e, aligned);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[i] += v[c] * x[c];
    }
  }
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const C total = warp_sum(sum[i]);
    if (lane == 0) dots[warp * kEntries + i] = total;
  }
}

// sums (E) <- sums * factor + sum over a tile of weights * token. By the whole block: a thread has
// the same columns at every call.
template <typename S, typename C>
__device__ inline void add_tile(const AttendPlan& p, const Array<const S>& tokens, bool aligned,
                                const Array<int64_t>& listed, const Array<C>& weights, C factor,
                                const Array<C>& sums, bool sums_aligned) {
  const Array<const C> before = sums;
  const bool is_whole = aligned && is_full(listed);
  for (int64_t e = int64_t(threadIdx.x) * 4; e < p.width; e += kAttendThreads * 4) {
    Pack<C> sum = load4(before, e, p.width - e, sums_aligned);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] *= factor;
#pragma unroll 8
    for (int i = 0; is_whole && i < kAttendTile; ++i) {
      const int64_t token = listed[i];
      const C weight = weights[i];
      const Pack<C> x = load_pack(tokens, token * p.width + e);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] += weight * x[c];
    }
    for (int i = 0; !is_whole && i < kAttendTile; ++i) {
      const int64_t token = listed[i];
      if (token < 0) continue;
      const C weight = weights[i];
      const Pack<C> x = load4(tokens, token * p.width + e, p.width - e, aligned);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] += weight * x[c];
    }
    store4(sums, e, p.width - e, sums_aligned, sum);
  }
}

// The sums of a part, zero: in shared memory, or where they are wanted in the end.
template <typename C>
__device__ inline Array<C> begin_sums(SharedMemory& shared, const AttendPlan& p,
                                      const Array<C>& target, bool aligned) {
  const Array<C> sums = p.sums_in_shared ? shared.take<C>(p.width) : target;
  for (int64_t e = int64_t(threadIdx.x) * 4; e < p.width; e += kAttendThreads * 4) {
    store4(sums, e, p.width - e, aligned, Pack<C>{});
  }
  return sums;
}

template <typename C>
__device__ inline void end_sums(const AttendPlan& p, const Array<C>& sums, const Array<C>& target,
                                bool aligned) {
  if (!p.sums_in_shared) return;
  const Array<const C> source = sums;
  for (int64_t e = int64_t(threadIdx.x) * 4; e < p.width; e += kAttendThreads * 4) {
    store4(target, e, p.width - e, aligned, load4(source, e, p.width - e, aligned));
  }
}

// The same for entry j of a row, which is compared with the entry before it: done for all entries,
// that shows a list to be ascending, unique and in range, -1 last.
__device__ inline int64_t checked_token(const AttendPlan& p, const Array<const int64_t>& indices,
                                        int64_t row, int64_t j) {
  const int64_t token = listed_token(indices, row * p.num_entries + j, INT64_MAX);
  int64_t before = -1;
  if (j > 0) before = indices[row * p.num_entries + j - 1];
  const bool is_right =
      token == -1 || (token > before && token < p.num_tokens && (j == 0 || before >= 0));
  if (!is_right) {
    fail(
        "bottleneck_attend: expected indices ascending and unique in [0, %lld), -1 last, got "
        "something else in row %lld\n",
        p.num_tokens, row);
  }
  return token;
}

// The tokens of the tile from entry j on, in shared memory. Whoever reads them has to wait at a
// barrier.
__device__ inline void load_tile(const AttendPlan& p, const Array<const int64_t>& indices,
                                 int64_t row, int64_t j, const Array<int64_t>& listed) {
  const int i = int(threadIdx.x);
  if (i >= kAttendTile) return;
  int64_t token = -1;
  if (j + i < p.num_entries) token = checked_token(p, indices, row, j + i);
  listed[i] = token;
}

// Whether one of `count` values is infinite or NaN. By the whole block; `scratch` holds a number
// for each warp.
template <typename T>
__device__ inline bool has_non_finite(const Array<T>& values, int64_t count,
                                      const Array<int>& scratch) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  bool found = false;
  for (int64_t i = threadIdx.x; i < count; i += kAttendThreads) {
    const T raw = values[i];
    const auto value = to_compute(raw);
    found = found || isinf(value) || value != value;
  }
  const int any = __any_sync(kAllLanes, found);
  if (lane == 0) scratch[warp] = any;
  __syncthreads();
  int result = 0;
  for (int w = 0; w < kAttendWarps; ++w) result |= scratch[w];
  __syncthreads();
  return result != 0;
}

// The entries of a part end here.
__device__ inline int64_t part_end(const AttendPlan& p, int64_t begin) {
  return begin + p.part_entries < p.num_entries ? begin + p.part_entries : p.num_entries;
}

// ---- Forward ----

template <typename S>
struct AttendForward {
  using C = ComputeOf<S>;
  AttendPlan plan;
  Array<const C> query;          // (R, E)
  Array<const S> tokens;         // (T, E)
  Array<const int64_t> indices;  // (R, k)
  bool query_aligned, aligned;   // rows can be loaded four elements at a time
  bool only_non_finite;          // rows whose `pooled` is finite stay as they are
  Array<C> part_max, part_sum;   // (R, parts)
  Array<C> part_pooled;          // (R, parts, E); `pooled` itself where a row is one part
  Array<C> pooled;               // (R, E)
  Array<C> gates;                // (R, k): logits until the parts are combined
  Array<C> lse;                  // (R)
};

// pooled, gates and lse of a row, from its parts. By the whole block.
template <typename S>
__device__ inline void combine_parts(const AttendForward<S>& a, int64_t row) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int64_t first = row * p.parts;
  C top = -INFINITY;
  for (int64_t i = 0; i < p.parts; ++i) {
    const C part_top = a.part_max[first + i];
    top = fmax(top, part_top);
  }
  const C shift = isinf(top) ? C(0) : top;
  // A part of which nothing is finite holds a sum of 0, or NaN.
  const auto scale = [&](int64_t i) {
    const C part_top = a.part_max[first + i];
    return isinf(part_top) ? C(1) : exp(part_top - shift);
  };
  C sum = 0;
  for (int64_t i = 0; i < p.parts; ++i) {
    const C part_sum = a.part_sum[first + i];
    sum += scale(i) * part_sum;
  }
  const C lse = shift + log(sum);
  const bool is_empty = lse == C(-INFINITY);
  // As in torch.softmax, an infinite logit leaves no number.
  const C inverse = isinf(top) ? C(NAN) : C(1) / sum;
  for (int64_t e = threadIdx.x; e < p.width; e += kAttendThreads) {
    C total = 0;
    for (int64_t i = 0; i < p.parts; ++i) {
      const C part = a.part_pooled[(first + i) * p.width + e];
      total += scale(i) * part;
    }
    a.pooled[row * p.width + e] = is_empty ? C(0) : total * inverse;
  }
  for (int64_t j = threadIdx.x; j < p.num_entries; j += kAttendThreads) {
    const int64_t entry = row * p.num_entries + j;
    const C logit = a.gates[entry];
    const bool is_listed = listed_token(a.indices, entry, p.num_tokens) >= 0;
    C gate = 0;
    if (is_listed && !is_empty) gate = exp(logit - shift) * inverse;
    a.gates[entry] = gate;
  }
  if (threadIdx.x == 0) a.lse[row] = lse;
}

// Blocks that share a multiprocessor, for which registers are left.
template <typename S>
constexpr int kAttendBlocks = sizeof(S) == 8 ? 2 : 3;

// Logits of a part, their maximum, the sum of their exponentials and of the tokens weighted so,
// which are scaled anew whenever a tile raises the maximum.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads, kAttendBlocks<S>)
    attend_parts(AttendForward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t row = blockIdx.x / unsigned(p.parts), part = blockIdx.x % unsigned(p.parts);
  SharedMemory shared;
  const Array<int64_t> listed = shared.take<int64_t>(kAttendTile);
  const Array<C> logits = shared.take<C>(kAttendTile);
  const Array<C> weights = shared.take<C>(kAttendTile);
  const Array<C> tile_factor = shared.take<C>(1);
  const Array<int> scratch = shared.take<int>(kAttendWarps);
  if (a.only_non_finite && !has_non_finite(a.pooled + row * p.width, p.width, scratch)) return;
  const Array<C> target = a.part_pooled + int64_t(blockIdx.x) * p.width;
  const Array<C> sums = begin_sums(shared, p, target, a.query_aligned);
  C top = -INFINITY, sum = 0;  // of the first warp
  const int64_t begin = part * p.part_entries, end = part_end(p, begin);
  for (int64_t first = begin; first < end; first += kAttendTile) {
    load_tile(p, a.indices, row, first, listed);
    __syncthreads();
    tile_dots<S, C>(p, a.tokens, a.aligned, listed, a.query + row * p.width, a.query_aligned,
                    logits);
    __syncthreads();
    if (int(threadIdx.x) < kAttendTile) {
      const int64_t token = listed[lane];
      const C dot = logits[lane];
      const C logit = token < 0 ? C(-INFINITY) : dot;
      const C before = top;
      top = fmax(top, warp_max(logit));
      const C shift = isinf(top) ? C(0) : top;
      const C factor = isinf(before) ? C(1) : exp(before - shift);
      const C weight = token < 0 ? C(0) : exp(logit - shift);
      sum = sum * factor + warp_sum(weight);
      weights[lane] = weight;
      if (first + lane < p.num_entries) a.gates[row * p.num_entries + first + lane] = logit;
      if (lane == 0) tile_factor[0] = factor;
    }
    __syncthreads();
    const C factor = tile_factor[0];
    add_tile<S, C>(p, a.tokens, a.aligned, listed, weights, factor, sums, a.query_aligned);
    __syncthreads();
  }
  end_sums(p, sums, target, a.query_aligned);
  if (threadIdx.x == 0) {
    a.part_max[int64_t(blockIdx.x)] = top;
    a.part_sum[int64_t(blockIdx.x)] = sum;
  }
  if (p.parts > 1) return;
  __syncthreads();
  combine_parts(a, row);
}

template <typename S>
__global__ void __launch_bounds__(kAttendThreads) attend_combine(AttendForward<S> a) {
  combine_parts(a, int64_t(blockIdx.x));
}

}  // namespace ait::cuda
