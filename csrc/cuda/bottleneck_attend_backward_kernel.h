// Kernels of the backward of bottleneck_attend; shapes as in bottleneck_attend_kernel.h.
#pragma once

#include "bottleneck_attend_kernel.h"

namespace ait::cuda {

template <typename S>
struct AttendBackward {
  using C = ComputeOf<S>;
  AttendPlan plan;
  Array<const C> query, pooled;                        // (R, E)
  Array<const S> tokens;                               // (T, E)
  Array<const int64_t> indices;                        // (R, k)
  Array<const C> gates;                                // (R, k)
  Array<const C> grad_pooled;                          // (R, E)
  Array<const C> grad_gates;                           // (R, k)
  Array<const C> grad_lse;                             // (R)
  bool has_grad_pooled, has_grad_gates, has_grad_lse;  // what is absent counts as zero
  bool query_aligned, aligned;
  bool only_non_finite;   // gradients that are finite stay as they are
  Array<C> offsets;       // (R): grad_lse - sum of gates * u
  Array<int> takes_part;  // (R): whether a gate is not 0
  Array<C> grad_logits;   // (R, k)
  Array<C> part_query;    // (R, parts, E); `grad_query` itself where a row is one part
  Array<C> grad_query;    // (R, E)
  Array<S> grad_tokens;   // (T, E)
  Array<unsigned> masks;  // (token_blocks, R), where they do not lie in shared memory
  Array<int64_t> starts;  // the same
  // Where slabs are taken: the entries token by token, those of a token from begins to ends.
  Array<int64_t> begins, ends;        // (T)
  Array<int> entry_rows;              // (R k)
  Array<C> entry_gates, entry_grads;  // (R k)
};

// offsets and takes_part of a row. By one warp: sum of gates * u is pooled . grad_pooled plus the
// sum of gates * grad_gates, so that no token is needed.
template <typename S>
__global__ void __launch_bounds__(kWarpSize) attend_offsets(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int lane = int(threadIdx.x);
  const int64_t row = blockIdx.x;
  C sum = 0;
  bool takes_part = false;
  for (int64_t j = lane; j < p.num_entries; j += kWarpSize) {
    const int64_t entry = row * p.num_entries + j;
    const C gate = a.gates[entry];
    takes_part = takes_part || gate != 0;
    if (a.has_grad_gates && listed_token(a.indices, entry, p.num_tokens) >= 0) {
      const C grad = a.grad_gates[entry];
      sum += gate * grad;
    }
  }
  if (a.has_grad_pooled) {
    for (int64_t e = lane; e < p.width; e += kWarpSize) {
      const C pooled = a.pooled[row * p.width + e], grad = a.grad_pooled[row * p.width + e];
      sum += pooled * grad;
    }
  }
  sum = warp_sum(sum);
  const int any = __any_sync(kAllLanes, takes_part);
  if (lane == 0) {
    C grad_lse = 0;
    if (a.has_grad_lse) grad_lse = a.grad_lse[row];
    a.offsets[row] = grad_lse - sum;
    a.takes_part[row] = any;
  }
}

// grad_logits of a part, and its share of grad_query.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads, kAttendBlocks<S>)
    attend_backward_parts(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t row = blockIdx.x / unsigned(p.parts), part = blockIdx.x % unsigned(p.parts);
  SharedMemory shared;
  const Array<int64_t> listed = shared.take<int64_t>(kAttendTile);
  const Array<C> products = shared.take<C>(kAttendTile);
  const Array<C> weights = shared.take<C>(kAttendTile);
  const Array<int> scratch = shared.take<int>(kAttendWarps);
  if (a.only_non_finite && !has_non_finite(a.grad_query + row * p.width, p.width, scratch)) return;
  const Array<C> target = a.part_query + int64_t(blockIdx.x) * p.width;
  const Array<C> sums = begin_sums(shared, p, target, a.query_aligned);
  // A row that took part nowhere has gradients of zero, whatever its tokens hold.
  const int takes_part = a.takes_part[row];
  const int64_t begin = part * p.part_entries, end = part_end(p, begin);
  for (int64_t first = begin; first < end; first += kAttendTile) {
    load_tile(p, a.indices, row, first, listed);
    __syncthreads();
    if (a.has_grad_pooled && takes_part) {
      tile_dots<S, C>(p, a.tokens, a.aligned, listed, a.grad_pooled + row * p.width,
                      a.query_aligned, products);
    } else if (int(threadIdx.x) < kAttendTile) {
      products[int(threadIdx.x)] = 0;
    }
    __syncthreads();
    if (int(threadIdx.x) < kAttendTile) {
      const int64_t token = listed[lane], j = first + lane;
      C grad = 0;
      if (token >= 0 && takes_part) {
        const int64_t entry = row * p.num_entries + j;
        C u = products[lane];
        if (a.has_grad_gates) {
          const C grad_gate = a.grad_gates[entry];
          u += grad_gate;
        }
        const C gate = a.gates[entry], offset = a.offsets[row];
        grad = gate * (u + offset);
      } else {
        // The sum leaves it out.
        listed[lane] = -1;
      }
      weights[lane] = grad;
      if (j < p.num_entries) a.grad_logits[row * p.num_entries + j] = grad;
    }
    __syncthreads();
    add_tile<S, C>(p, a.tokens, a.aligned, listed, weights, C(1), sums, a.query_aligned);
    __syncthreads();
  }
  end_sums(p, sums, target, a.query_aligned);
}

// grad_query of a row, from its parts.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads) attend_backward_combine(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int64_t row = blockIdx.x;
  for (int64_t e = threadIdx.x; e < p.width; e += kAttendThreads) {
    C total = 0;
    for (int64_t i = 0; i < p.parts; ++i) {
      const C part = a.part_query[(row * p.parts + i) * p.width + e];
      total += part;
    }
    a.grad_query[row * p.width + e] = total;
  }
}

// The first entry of an ascending list that is not below `token`; -1 lies behind everything.
__device__ inline int64_t lower_bound(const Array<const int64_t>& indices, int64_t begin,
                                      int64_t count, int64_t token) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2, value = indices[begin + middle];
    if (value >= 0 && value < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Of every row: which tokens of a tile it lists, a bit each, and where its list begins to name
// them. By the whole block, a thread a row; whoever reads other rows has to wait at a barrier.
template <typename S>
__device__ inline void find_listed(const AttendBackward<S>& a, int64_t first, int count,
                                   const Array<unsigned>& masks, const Array<int64_t>& starts) {
  const AttendPlan& p = a.plan;
  for (int64_t row = threadIdx.x; row < p.num_rows; row += kAttendThreads) {
    const int64_t begin = row * p.num_entries;
    const int64_t start = lower_bound(a.indices, begin, p.num_entries, first);
    unsigned mask = 0;
    if (a.takes_part[row] != 0) {
      for (int64_t j = start; j < p.num_entries; ++j) {
        const int64_t offset = a.indices[begin + j] - first;
        if (offset < 0 || offset >= count) break;
        mask |= 1u << offset;
      }
    }
    masks[row] = mask;
    starts[row] = start;
  }
}

// grad_tokens, token by token: a token's rows are found in the sorted lists, and added in order. A
// block has 32 tokens at a time, a bit each in the mask of a row; each warp sums one token.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads) attend_backward_tokens(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  constexpr int kPacks = sizeof(C) == 8 ? 4 : 8;  // of four columns, that a lane sums at a time
  const AttendPlan& p = a.plan;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  SharedMemory shared;
  Array<unsigned> masks = a.masks + int64_t(blockIdx.x) * p.num_rows;
  Array<int64_t> starts = a.starts + int64_t(blockIdx.x) * p.num_rows;
  if (p.rows_in_shared) {
    masks = shared.take<unsigned>(p.num_rows);
    starts = shared.take<int64_t>(p.num_rows);
  }
  for (int64_t tile = blockIdx.x; tile < p.token_tiles; tile += gridDim.x) {
    const int64_t first = tile * kAttendTokens, rest = p.num_tokens - first;
    const int count = rest < kAttendTokens ? int(rest) : kAttendTokens;
    find_listed(a, first, count, masks, starts);
    __syncthreads();
    for (int t = warp; t < count; t += kAttendWarps) {
      if (a.only_non_finite) {
        bool found = false;
        for (int64_t e = lane; e < p.width; e += kWarpSize) {
          const S raw = a.grad_tokens[(first + t) * p.width + e];
          const C value = to_compute(raw);
          found = found || isinf(value) || value != value;
        }
        if (!__any_sync(kAllLanes, found)) continue;
        // Other lanes have read what a lane is about to write.
        __syncwarp();
      }
      for (int64_t column = 0; column < p.width; column += kPacks * kWarpSize * 4) {
        Pack<C> sum[kPacks] = {};
        for (int64_t row0 = 0; row0 < p.num_rows; row0 += kWarpSize) {
          unsigned own_mask = 0;
          if (row0 + lane < p.num_rows) own_mask = masks[row0 + lane];
          unsigned listing = __ballot_sync(kAllLanes, own_mask >> t & 1u);
          while (listing != 0) {
            const int64_t row = row0 + __ffs(int(listing)) - 1;
            listing &= listing - 1;
            const unsigned mask = masks[row];
            const int64_t entry =
                row * p.num_entries + starts[row] + __popc(mask & ((1u << t) - 1));
            const C gate = a.gates[entry], grad_logit = a.grad_logits[entry];
#pragma unroll
            for (int k = 0; k < kPacks; ++k) {
              const int64_t e = column + (k * kWarpSize + lane) * 4;
              if (e >= p.width) break;
              const int64_t at = row * p.width + e;
              const Pack<C> query = load4(a.query, at, p.width - e, a.query_aligned);
              Pack<C> grad = {};
              if (a.has_grad_pooled) {
                grad = load4(a.grad_pooled, at, p.width - e, a.query_aligned);
              }
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                sum[k][c] += gate * grad[c];
                sum[k][c] += grad_logit * query[c];
              }
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          const int64_t e = column + (k * kWarpSize + lane) * 4;
          if (e >= p.width) break;
          store4(a.grad_tokens, (first + t) * p.width + e, p.width - e, a.aligned, sum[k]);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace ait::cuda
