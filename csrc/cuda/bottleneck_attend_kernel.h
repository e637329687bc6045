// Kernels of bottleneck_attend and its backward.
//
// Shapes: R rows, k entries a row, T tokens, E width. S is the storage type of the tokens, C the
// compute type. Rows are cut into parts of kAttendPart entries, which are combined in order.
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

// dots[i] = vector (E) . token of entry `begin + i`, for the entries of a part; 0 where there is no
// token. By the whole block: each warp has four entries.
template <typename S, typename C>
__device__ inline void part_dots(const AttendPlan& p, const Array<const S>& tokens, bool aligned,
                                 const Array<const int64_t>& listed, const Array<const C>& vector,
                                 bool vector_aligned, const Array<C>& dots) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  constexpr int kEntries = kAttendPart / kAttendWarps;
  int64_t at[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const int64_t token = listed[warp * kEntries + i];
    at[i] = token < 0 ? -1 : token * p.width;
  }
  C sum[kEntries] = {};
  for (int64_t e = lane * 4; e < p.width; e += kWarpSize * 4) {
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

// target (E) = sum over the entries of a part of weights * token. By the whole block.
template <typename S, typename C>
__device__ inline void part_sums(const AttendPlan& p, const Array<const S>& tokens, bool aligned,
                                 const Array<const int64_t>& listed, const Array<const C>& weights,
                                 const Array<C>& target, bool target_aligned) {
  for (int64_t e = int64_t(threadIdx.x) * 4; e < p.width; e += kAttendThreads * 4) {
    Pack<C> sum = {};
#pragma unroll 4
    for (int i = 0; i < kAttendPart; ++i) {
      const int64_t token = listed[i];
      if (token < 0) continue;
      const C weight = weights[i];
      const Pack<C> x = load4(tokens, token * p.width + e, p.width - e, aligned);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] += weight * x[c];
    }
    store4(target, e, p.width - e, target_aligned, sum);
  }
}

// The tokens of a part, in shared memory. Whoever reads them has to wait at a barrier.
__device__ inline void load_listed(const AttendPlan& p, const Array<const int64_t>& indices,
                                   int64_t row, int64_t part, const Array<int64_t>& listed) {
  const int i = int(threadIdx.x);
  if (i >= kAttendPart) return;
  const int64_t j = part * kAttendPart + i;
  int64_t token = -1;
  if (j < p.num_entries) token = listed_token(indices, row * p.num_entries + j, p.num_tokens);
  listed[i] = token;
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
  Array<C> part_max, part_sum;   // (R, parts)
  Array<C> part_pooled;          // (R, parts, E)
  Array<C> pooled;               // (R, E)
  Array<C> gates;                // (R, k): logits until the parts are combined
  Array<C> lse;                  // (R)
};

// Logits of a part, their maximum, the sum of their exponentials and of the tokens weighted so.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads, 4) attend_parts(AttendForward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t row = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  SharedMemory shared;
  const Array<int64_t> listed = shared.take<int64_t>(kAttendPart);
  const Array<C> logits = shared.take<C>(kAttendPart);
  const Array<C> weights = shared.take<C>(kAttendPart);
  load_listed(p, a.indices, row, part, listed);
  __syncthreads();
  part_dots<S, C>(p, a.tokens, a.aligned, listed, a.query + row * p.width, a.query_aligned, logits);
  __syncthreads();
  if (int(threadIdx.x) < kAttendPart) {
    const int64_t token = listed[lane];
    const C dot = logits[lane];
    const C logit = token < 0 ? C(-INFINITY) : dot;
    const C top = warp_max(logit);
    const C shift = isinf(top) ? C(0) : top;
    const C weight = token < 0 ? C(0) : exp(logit - shift);
    const C sum = warp_sum(weight);
    weights[lane] = weight;
    const int64_t j = part * kAttendPart + lane;
    if (j < p.num_entries) a.gates[row * p.num_entries + j] = logit;
    if (lane == 0) {
      a.part_max[int64_t(blockIdx.x)] = top;
      a.part_sum[int64_t(blockIdx.x)] = sum;
    }
  }
  __syncthreads();
  part_sums<S, C>(p, a.tokens, a.aligned, listed, weights,
                  a.part_pooled + int64_t(blockIdx.x) * p.width, a.query_aligned);
}

// pooled, gates and lse of a row, from its parts.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads) attend_combine(AttendForward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int64_t row = blockIdx.x, first = row * p.parts;
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

// ---- Backward ----

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
  Array<C> offsets;       // (R): grad_lse - sum of gates * u
  Array<int> takes_part;  // (R): whether a gate is not 0
  Array<C> grad_logits;   // (R, k)
  Array<C> part_query;    // (R, parts, E)
  Array<C> grad_query;    // (R, E)
  Array<S> grad_tokens;   // (T, E)
  Array<unsigned> masks;  // (token_blocks, R), where they do not lie in shared memory
  Array<int64_t> starts;  // the same
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
__global__ void __launch_bounds__(kAttendThreads, 4) attend_backward_parts(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t row = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  SharedMemory shared;
  const Array<int64_t> listed = shared.take<int64_t>(kAttendPart);
  const Array<C> products = shared.take<C>(kAttendPart);
  const Array<C> weights = shared.take<C>(kAttendPart);
  load_listed(p, a.indices, row, part, listed);
  __syncthreads();
  // A row that took part nowhere has gradients of zero, whatever its tokens hold.
  const int takes_part = a.takes_part[row];
  if (a.has_grad_pooled && takes_part) {
    part_dots<S, C>(p, a.tokens, a.aligned, listed, a.grad_pooled + row * p.width, a.query_aligned,
                    products);
  } else if (int(threadIdx.x) < kAttendPart) {
    products[int(threadIdx.x)] = 0;
  }
  __syncthreads();
  if (int(threadIdx.x) < kAttendPart) {
    const int64_t token = listed[lane], j = part * kAttendPart + lane;
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
  part_sums<S, C>(p, a.tokens, a.aligned, listed, weights,
                  a.part_query + int64_t(blockIdx.x) * p.width, a.query_aligned);
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

// grad_tokens, token by token: a token's rows are found in the sorted lists, and added in order. A
// block has 32 tokens at a time, a bit each in the mask of a row; each warp sums one token.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads) attend_backward_tokens(AttendBackward<S> a) {
  using C = ComputeOf<S>;
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
    __syncthreads();
    for (int t = warp; t < count; t += kAttendWarps) {
      for (int64_t column = 0; column < p.width; column += kAttendPacks * kWarpSize * 4) {
        Pack<C> sum[kAttendPacks] = {};
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
            for (int k = 0; k < kAttendPacks; ++k) {
              const int64_t e = column + (k * kWarpSize + lane) * 4;
              if (e >= p.width) break;
              const int64_t at = row * p.width + e;
              const Pack<C> query = load4(a.query, at, p.width - e, a.query_aligned);
              Pack<C> grad = {};
              if (a.has_grad_pooled) {
                grad = load4(a.grad_pooled, at, p.width - e, a.query_aligned);
              }
#pragma unroll
              for (int c = 0; c < 4; ++c) sum[k][c] += gate * grad[c] + grad_logit * query[c];
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kAttendPacks; ++k) {
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
