// Kernels of the dense path of bottleneck_attend, beside the library's products: between lists of
// entries (R, k) and matrices (terms * R, chunk of the tokens). C is the compute type, W that of
// the products' operands: bfloat16, of which three terms make a float32, or C itself.
#pragma once

#include <cuda/device.h>
#include <cuda/three_terms.h>
#include <cuda/warp.h>

#include "bottleneck_attend_backward_kernel.h"

namespace ait::cuda {

// The entries of a list that name tokens of a chunk.
struct AttendRange {
  int64_t begin, end;
};

__device__ inline AttendRange entries_of_chunk(const AttendPlan& p,
                                               const Array<const int64_t>& indices, int64_t row,
                                               int64_t first_token, int64_t chunk) {
  const int64_t begin = row * p.num_entries;
  return {lower_bound(indices, begin, p.num_entries, first_token),
          lower_bound(indices, begin, p.num_entries, first_token + chunk)};
}

// picked (R, k) = products (terms * R, chunk) at the entries that list a token of the chunk. With
// the first chunk the lists are checked. A block has a row.
template <typename C>
__global__ void __launch_bounds__(kAttendThreads)
    attend_dense_pick(AttendPlan p, Array<const int64_t> indices, Array<const C> products,
                      int terms, int64_t first_token, int64_t chunk, Array<C> picked) {
  const int64_t row = blockIdx.x;
  if (first_token == 0) {
    for (int64_t j = threadIdx.x; j < p.num_entries; j += kAttendThreads) {
      checked_token(p, indices, row, j);
    }
  }
  const AttendRange range = entries_of_chunk(p, indices, row, first_token, chunk);
  for (int64_t j = range.begin + threadIdx.x; j < range.end; j += kAttendThreads) {
    const int64_t entry = row * p.num_entries + j, column = indices[entry] - first_token;
    if (column < 0 || column >= chunk) continue;
    picked[entry] = sum_of_terms(products, row * chunk + column, terms, p.num_rows * chunk);
  }
}

// gates (R, k) <- softmax over the listed logits that they hold, and lse (R). A block has a row.
template <typename C>
__global__ void __launch_bounds__(kAttendThreads)
    attend_dense_softmax(AttendPlan p, Array<const int64_t> indices, Array<C> gates, Array<C> lse) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int64_t row = blockIdx.x;
  SharedMemory shared;
  const Array<C> tops = shared.take<C>(kAttendWarps);
  const Array<C> sums = shared.take<C>(kAttendWarps);
  C top = -INFINITY;
  for (int64_t j = threadIdx.x; j < p.num_entries; j += kAttendThreads) {
    const int64_t entry = row * p.num_entries + j;
    if (listed_token(indices, entry, p.num_tokens) < 0) continue;
    const C logit = gates[entry];
    top = fmax(top, logit);
  }
  top = warp_max(top);
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  for (int w = 0; w < kAttendWarps; ++w) {
    const C other = tops[w];
    top = fmax(top, other);
  }
  const C shift = isinf(top) ? C(0) : top;
  C sum = 0;
  for (int64_t j = threadIdx.x; j < p.num_entries; j += kAttendThreads) {
    const int64_t entry = row * p.num_entries + j;
    if (listed_token(indices, entry, p.num_tokens) < 0) continue;
    const C logit = gates[entry];
    sum += exp(logit - shift);
  }
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kAttendWarps; ++w) {
    const C other = sums[w];
    sum += other;
  }
  const C own_lse = shift + log(sum);
  const bool is_empty = own_lse == C(-INFINITY);
  // As in torch.softmax, an infinite logit leaves no number.
  const C inverse = isinf(top) ? C(NAN) : C(1) / sum;
  for (int64_t j = threadIdx.x; j < p.num_entries; j += kAttendThreads) {
    const int64_t entry = row * p.num_entries + j;
    C gate = 0;
    if (!is_empty && listed_token(indices, entry, p.num_tokens) >= 0) {
      const C logit = gates[entry];
      gate = exp(logit - shift) * inverse;
    }
    gates[entry] = gate;
  }
  if (threadIdx.x == 0) lse[row] = own_lse;
}

// grad_logits (R, k) from the products grad_pooled . token that it holds. A block has a row.
template <typename S>
__global__ void __launch_bounds__(kAttendThreads) attend_dense_grad_logits(AttendBackward<S> a) {
  using C = ComputeOf<S>;
  const AttendPlan& p = a.plan;
  const int64_t row = blockIdx.x;
  const int takes_part = a.takes_part[row];
  const C offset = a.offsets[row];
  for (int64_t j = threadIdx.x; j < p.num_entries; j += kAttendThreads) {
    const int64_t entry = row * p.num_entries + j;
    C grad = 0;
    if (takes_part && listed_token(a.indices, entry, p.num_tokens) >= 0) {
      C u = a.grad_logits[entry];
      if (a.has_grad_gates) {
        const C grad_gate = a.grad_gates[entry];
        u += grad_gate;
      }
      const C gate = a.gates[entry];
      grad = gate * (u + offset);
    }
    a.grad_logits[entry] = grad;
  }
}

// Where the terms of a list go: into up to three matrices (R, chunk) on top of each other, which
// begin at these rows of the target. Term i of `copies` is term `term[i]` of the values.
struct AttendPlaces {
  int copies;
  int term[3];
  int64_t first_row[3];
};

// target (rows, chunk) = values (R, k) at the tokens of the chunk that they list, 0 elsewhere. A
// block has a row of the lists.
template <typename W, typename C>
__global__ void __launch_bounds__(kAttendThreads)
    attend_dense_scatter(AttendPlan p, Array<const int64_t> indices, Array<const C> values,
                         AttendPlaces places, int64_t first_token, int64_t chunk, Array<W> target) {
  const int64_t row = blockIdx.x;
  for (int i = 0; i < places.copies; ++i) {
    const int64_t begin = (places.first_row[i] + row) * chunk;
    for (int64_t column = threadIdx.x; column < chunk; column += kAttendThreads) {
      target[begin + column] = to_storage<W>(C(0));
    }
  }
  __syncthreads();
  const AttendRange range = entries_of_chunk(p, indices, row, first_token, chunk);
  for (int64_t j = range.begin + threadIdx.x; j < range.end; j += kAttendThreads) {
    const int64_t entry = row * p.num_entries + j, column = indices[entry] - first_token;
    if (column < 0 || column >= chunk) continue;
    const C value = values[entry];
    if constexpr (std::is_same_v<W, BFloat16>) {
      float rest = value;
      BFloat16 terms[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) terms[i] = take_term(rest);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (i >= places.copies) break;
        const int term = places.term[i];
        target[(places.first_row[i] + row) * chunk + column] =
            term == 0 ? terms[0] : (term == 1 ? terms[1] : terms[2]);
      }
    } else {
      target[places.first_row[0] * chunk + row * chunk + column] = value;
    }
  }
}

// stacked (rows, E): the same for a matrix (R, E), or zeros where there is none.
template <typename W, typename C>
__global__ void __launch_bounds__(kAttendThreads)
    attend_dense_stack(Array<const C> matrix, int64_t count, int64_t width, AttendPlaces places,
                       Array<W> stacked) {
  for (int64_t i = int64_t(blockIdx.x) * kAttendThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kAttendThreads) {
    const C value = matrix[i];
    if constexpr (std::is_same_v<W, BFloat16>) {
      for (int copy = 0; copy < places.copies; ++copy) {
        float rest = value;
        BFloat16 taken = take_term(rest);
        for (int term = 0; term < places.term[copy]; ++term) taken = take_term(rest);
        stacked[places.first_row[copy] * width + i] = taken;
      }
    } else {
      stacked[places.first_row[0] * width + i] = value;
    }
  }
}

// sum (count) = what the terms of the products add up to, added to what earlier chunks gave.
template <typename C>
__global__ void __launch_bounds__(kAttendThreads)
    attend_dense_add(Array<const C> products, int64_t count, int terms, bool is_first,
                     Array<C> sum) {
  for (int64_t i = int64_t(blockIdx.x) * kAttendThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kAttendThreads) {
    C total = sum_of_terms(products, i, terms, count);
    if (!is_first) {
      const C before = sum[i];
      total += before;
    }
    sum[i] = total;
  }
}

// target[begin + i] = products[i], rounded.
template <typename S, typename C>
__global__ void __launch_bounds__(kAttendThreads)
    attend_dense_store(Array<const C> products, int64_t count, int64_t begin, Array<S> target) {
  for (int64_t i = int64_t(blockIdx.x) * kAttendThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kAttendThreads) {
    const C value = products[i];
    target[begin + i] = to_storage<S>(value);
  }
}

}  // namespace ait::cuda
