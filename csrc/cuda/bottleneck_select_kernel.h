// Kernels of bottleneck_select: one block a row finds the k largest of a chunk of logits and of
// what it kept of the chunks before, by radix selection on order-preserving keys.
#pragma once

#include <cuda/device.h>
#include <cuda/three_terms.h>
#include <cuda/warp.h>

#include "bottleneck_select_shape.h"

namespace ait::cuda {

// ---- Keys: unsigned integers in the order of the values; NaN above all, -0 as +0, 0 for no value
// ----

template <typename C>
using KeyOf = std::conditional_t<std::is_same_v<C, double>, unsigned long long, unsigned>;

__device__ inline unsigned key_of(float value) {
  if (value != value) return ~0u;
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline unsigned long long key_of(double value) {
  if (value != value) return ~0ull;
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value + 0.0));
  return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}

__device__ inline float value_of(unsigned key) {
  if (key == ~0u) return NAN;
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ inline double value_of(unsigned long long key) {
  if (key == ~0ull) return NAN;
  return __longlong_as_double(
      static_cast<long long>(key >> 63 ? key & 0x7fffffffffffffffull : ~key));
}

// ---- Selection ----

template <typename C>
struct SelectChunk {
  Array<const C> logits;   // (G, terms * R, chunk)
  Array<const bool> mask;  // (T), true = ignore
  bool has_mask;
  int terms;                   // 1, or 3 whose sum is the logit
  int64_t num_rows;            // R
  int64_t first_token, chunk;  // the tokens of the chunk
  int64_t kept;                // min(k, T)
  bool is_first, is_last;
  Array<const C> carried_values;         // (G, R, kept): what the chunks before gave
  Array<const int64_t> carried_indices;  // the same
  Array<const int> carried_counts;       // (G, R)
  Array<C> values;                       // (G, R, kept)
  Array<int64_t> indices;                // (G, R, kept)
  Array<int> counts;                     // (G, R)
};

// What a block of threads looks at: what was carried along, and behind it the chunk, so that token
// indices ascend.
template <typename C>
struct Candidates {
  using Key = KeyOf<C>;
  Array<const C> carried_values;
  Array<Key> keys;
  int64_t carried, chunk;

  __device__ int64_t size() const { return carried + chunk; }
  __device__ Key key(int64_t i) const {
    if (i >= carried) return keys[i - carried];
    const C value = carried_values[i];
    return key_of(value);
  }
};

// The logit of token i of the chunk.
template <typename C>
__device__ inline C logit_of(const SelectChunk<C>& a, int64_t group, int64_t row, int64_t i) {
  return sum_of_terms(a.logits, (group * a.terms * a.num_rows + row) * a.chunk + i, a.terms,
                      a.num_rows * a.chunk);
}

// The sum over the block; `scratch` holds a number for each warp.
__device__ inline int block_sum(int value, const Array<int>& scratch) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < kSelectWarps; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

// The least key of those carried along. By the whole block; `scratch` holds a key for each warp.
template <typename C>
__device__ inline KeyOf<C> least_carried(const Candidates<C>& candidates,
                                         const Array<KeyOf<C>>& scratch) {
  using Key = KeyOf<C>;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  Key least = ~Key(0);
  for (int64_t i = threadIdx.x; i < candidates.carried; i += kSelectThreads) {
    const Key key = candidates.key(i);
    least = key < least ? key : least;
  }
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const Key other = __shfl_xor_sync(kAllLanes, least, step);
    least = other < least ? other : least;
  }
  if (lane == 0) scratch[warp] = least;
  __syncthreads();
  for (int w = 0; w < kSelectWarps; ++w) {
    const Key other = scratch[w];
    least = other < least ? other : least;
  }
  return least;
}

// Finds the largest key of which at least `need` candidates are not smaller, digit by digit.
// Returns it, and in `need` how many that equal it are to be kept.
template <typename C>
__device__ inline KeyOf<C> find_threshold(const Candidates<C>& candidates,
                                          const Array<int>& histogram, const Array<int>& found,
                                          int& need) {
  using Key = KeyOf<C>;
  constexpr int kDigits = int(sizeof(Key));
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  Key prefix = 0;
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    const int shift = 8 * digit;
    for (int bin = int(threadIdx.x); bin < kSelectBins; bin += kSelectThreads) histogram[bin] = 0;
    __syncthreads();
    const auto count = [&](Key key) {
      const bool has_prefix = digit == kDigits - 1 || (key ^ prefix) >> shift >> 8 == 0;
      if (key != 0 && has_prefix) histogram.atomic_add(int(key >> shift & 0xff), 1);
    };
    for (int64_t i = threadIdx.x; i < candidates.carried; i += kSelectThreads) {
      count(candidates.key(i));
    }
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < candidates.chunk; i += kSelectThreads) {
      const Key key = candidates.keys[i];
      count(key);
    }
    __syncthreads();
    if (warp == 0) {
      // Lane 0 has the eight largest bins, lane 31 the smallest.
      constexpr int kBins = kSelectBins / kWarpSize;
      int counts[kBins], own = 0;
#pragma unroll
      for (int j = 0; j < kBins; ++j) {
        counts[j] = histogram[kSelectBins - 1 - lane * kBins - j];
        own += counts[j];
      }
      int larger = own;
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, larger, step);
        if (lane >= step) larger += other;
      }
      larger -= own;
      if (larger < need && need <= larger + own) {
        int j = 0;
        while (larger + counts[j] < need) larger += counts[j++];
        found[0] = kSelectBins - 1 - lane * kBins - j;
        found[1] = need - larger;
      }
    }
    __syncthreads();
    const int bin = found[0];
    need = found[1];
    prefix |= Key(bin) << shift;
  }
  return prefix;
}

// Writes, in their order, the candidates above the threshold and the first `need` that equal it.
template <typename C>
__device__ inline void gather(const SelectChunk<C>& a, const Candidates<C>& candidates,
                              KeyOf<C> threshold, int need, int64_t row,
                              const Array<int>& warp_above, const Array<int>& warp_equal) {
  using Key = KeyOf<C>;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int64_t size = candidates.size();
  const int64_t steps = (size + kSelectThreads - 1) / kSelectThreads;
  const int64_t begin = warp * steps * kWarpSize;
  int above = 0, equal = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t i = begin + step * kWarpSize + lane;
    const Key key = i < size ? candidates.key(i) : Key(0);
    above += __popc(__ballot_sync(kAllLanes, key > threshold));
    equal += __popc(__ballot_sync(kAllLanes, key == threshold));
  }
  if (lane == 0) {
    warp_above[warp] = above;
    warp_equal[warp] = equal;
  }
  __syncthreads();
  above = equal = 0;
  for (int w = 0; w < warp; ++w) {
    above += warp_above[w];
    equal += warp_equal[w];
  }
  const unsigned lanes_before = (1u << lane) - 1;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t i = begin + step * kWarpSize + lane;
    const Key key = i < size ? candidates.key(i) : Key(0);
    const unsigned above_lanes = __ballot_sync(kAllLanes, key > threshold);
    const unsigned equal_lanes = __ballot_sync(kAllLanes, key == threshold);
    const int above_before = above + __popc(above_lanes & lanes_before);
    const int equal_before = equal + __popc(equal_lanes & lanes_before);
    if (key > threshold || (key == threshold && equal_before < need)) {
      const int64_t at = row * a.kept + above_before + (equal_before < need ? equal_before : need);
      int64_t token = a.first_token + i - candidates.carried;
      if (i < candidates.carried) token = a.carried_indices[row * a.kept + i];
      a.values[at] = value_of(key);
      a.indices[at] = token;
    }
    above += __popc(above_lanes);
    equal += __popc(equal_lanes);
  }
}

template <typename C>
__global__ void __launch_bounds__(kSelectThreads, 2) select_chunk(SelectChunk<C> a) {
  using Key = KeyOf<C>;
  const int64_t row = blockIdx.x;
  SharedMemory shared;
  const Array<Key> keys = shared.take<Key>(a.chunk);
  const Array<int> histogram = shared.take<int>(kSelectBins);
  const Array<int> warp_above = shared.take<int>(kSelectWarps);
  const Array<int> warp_equal = shared.take<int>(kSelectWarps);
  const Array<int> found = shared.take<int>(2);
  const Array<Key> least_of_warp = shared.take<Key>(kSelectWarps);
  int carried = 0;
  if (!a.is_first) carried = a.carried_counts[row];

  const Candidates<C> candidates{a.carried_values + row * a.kept, keys, carried, a.chunk};
  // What is no larger than the least of a full list comes behind all of it, equal ones as well:
  // their tokens come later.
  Key least = 0;
  if (carried == a.kept) least = least_carried(candidates, least_of_warp);

  const auto num_rows = unsigned(a.num_rows);
  const int64_t group = blockIdx.x / num_rows, row_of_group = blockIdx.x % num_rows;
  int own = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < a.chunk; i += kSelectThreads) {
    const Key key = key_of(logit_of(a, group, row_of_group, i));
    bool is_candidate = key > least;
    if (a.has_mask) is_candidate = is_candidate && !a.mask[a.first_token + i];
    keys[i] = is_candidate ? key : Key(0);
    own += is_candidate;
  }
  const int total = carried + block_sum(own, warp_above);
  const int kept = total < a.kept ? total : int(a.kept);
  // With no more candidates than places, all that have a key are above the threshold.
  Key threshold = 0;
  int need = 0;
  if (total > a.kept) {
    need = kept;
    threshold = find_threshold(candidates, histogram, found, need);
  }
  gather(a, candidates, threshold, need, row, warp_above, warp_equal);
  if (threadIdx.x == 0) a.counts[row] = kept;
  if (!a.is_last) return;
  for (int64_t j = kept + int64_t(threadIdx.x); j < a.kept; j += kSelectThreads) {
    a.values[row * a.kept + j] = -INFINITY;
    a.indices[row * a.kept + j] = -1;
  }
}

}  // namespace ait::cuda
