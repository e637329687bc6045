// The gradient of the tokens by slabs: the entries are sorted token by token once, and then every
// block keeps a slab of columns of `query` and `grad_pooled` in shared memory, all rows of it, and
// adds them up for a range of the tokens.
#pragma once

#include "bottleneck_attend_backward_kernel.h"

namespace ait::cuda {

// begins, ends and the entries of each token, its rows ascending. The entries of a tile of tokens
// begin where the lists name smaller tokens that often, so that no block waits for another.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads) attend_backward_sort(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  SharedMemory shared;
  const Array<unsigned> masks = shared.take<unsigned>(p.num_rows);
  const Array<int64_t> starts = shared.take<int64_t>(p.num_rows);
  const Array<int64_t> counts = shared.take<int64_t>(kAttendTokens);
  const Array<int64_t> smaller = shared.take<int64_t>(kAttendWarps);
  for (int64_t tile = blockIdx.x; tile < p.token_tiles; tile += gridDim.x) {
    const int64_t first = tile * kAttendTokens, rest = p.num_tokens - first;
    const int count = rest < kAttendTokens ? int(rest) : kAttendTokens;
    find_listed(a, first, count, masks, starts);
    int64_t own = 0;
    for (int64_t row = threadIdx.x; row < p.num_rows; row += kAttendThreads) own += starts[row];
    own = warp_sum(own);
    if (lane == 0) smaller[warp] = own;
    __syncthreads();
    for (int t = warp; t < count; t += kAttendWarps) {
      int listing = 0;
      for (int64_t row = lane; row - lane < p.num_rows; row += kWarpSize) {
        unsigned mask = 0;
        if (row < p.num_rows) mask = masks[row];
        listing += __popc(__ballot_sync(kAllLanes, mask >> t & 1u));
      }
      if (lane == 0) counts[t] = listing;
    }
    __syncthreads();
    for (int t = warp; t < count; t += kAttendWarps) {
      int64_t at = 0;
      for (int w = 0; w < kAttendWarps; ++w) at += smaller[w];
      for (int u = 0; u < t; ++u) at += counts[u];
      if (lane == 0) {
        const int64_t listing = counts[t];
        a.begins[first + t] = at;
        a.ends[first + t] = at + listing;
      }
      for (int64_t row = lane; row - lane < p.num_rows; row += kWarpSize) {
        unsigned mask = 0;
        if (row < p.num_rows) mask = masks[row];
        const unsigned lists = mask >> t & 1u;
        const unsigned listing = __ballot_sync(kAllLanes, lists);
        if (lists != 0) {
          const int64_t entry = row * p.num_entries + starts[row] + __popc(mask & ((1u << t) - 1));
          const int64_t place = at + __popc(listing & ((1u << lane) - 1));
          const C gate = a.gates[entry], grad_logit = a.grad_logits[entry];
          a.entry_rows[place] = int(row);
          a.entry_gates[place] = gate;
          a.entry_grads[place] = grad_logit;
        }
        at += __popc(listing);
      }
    }
    __syncthreads();
  }
}

// grad_tokens of a slab of columns and a range of tokens. As many lanes as a slab has packs of four
// columns share a token.
template <typename S>
__global__ void __launch_bounds__(kAttendSlabThreads, 1)
    attend_backward_slabs(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int lanes = int(p.slab_columns) / 4;
  const int own = int(threadIdx.x) / lanes, others = kAttendSlabThreads / lanes;
  const int64_t slab = blockIdx.x / unsigned(p.slab_ranges);
  const int64_t range = blockIdx.x % unsigned(p.slab_ranges);
  const int64_t column = int(threadIdx.x) % lanes * 4, e = slab * p.slab_columns + column;
  SharedMemory shared;
  const Array<C> queries = shared.take<C>(p.num_rows * p.slab_columns);
  const Array<C> grads = shared.take<C>(p.num_rows * p.slab_columns);
  for (int64_t row = own; row < p.num_rows && e < p.width; row += others) {
    const int64_t at = row * p.width + e, place = row * p.slab_columns + column;
    queries.store4(place, load4(a.query, at, p.width - e, a.query_aligned));
    Pack<C> grad = {};
    if (a.has_grad_pooled) grad = load4(a.grad_pooled, at, p.width - e, a.query_aligned);
    grads.store4(place, grad);
  }
  __syncthreads();
  const int64_t most = (range + 1) * p.slab_tokens;
  const int64_t end = most < p.num_tokens ? most : p.num_tokens;
  for (int64_t t = range * p.slab_tokens + own; t < end && e < p.width; t += others) {
    const int64_t first = a.begins[t], last = a.ends[t];
    Pack<C> sum = {};
#pragma unroll(sizeof(C) == 8 ? 2 : 4)
    for (int64_t i = first; i < last; ++i) {
      const int row = a.entry_rows[i];
      const C gate = a.entry_gates[i], grad_logit = a.entry_grads[i];
      const Pack<C> query = queries.load4(row * p.slab_columns + column);
      const Pack<C> grad = grads.load4(row * p.slab_columns + column);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[c] += gate * grad[c];
        sum[c] += grad_logit * query[c];
      }
    }
    store4(a.grad_tokens, t * p.width + e, p.width - e, a.aligned, sum);
  }
}

}  // namespace ait::cuda
