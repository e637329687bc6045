// Products and softmax of a tile of tokens with the patterns, as forward and backward need them.
//
// Shapes: T tokens, M patterns, E width. S is the storage type of the tokens, C the compute type.
// No order of summation depends on T, on the tile or on a token's place in it.
#pragma once

#include <cuda/device.h>
#include <cuda/warp.h>

#include "hopfield_retrieve_shape.h"

namespace ait::cuda {

template <typename C>
struct HopfieldTile {
  Array<C> patterns;  // (rows of the plan, pattern_stride)
  Array<C> gram;      // (rows of the plan, tile_stride)
  Array<C> partial;   // (warps, tokens, kHopfieldPartialStride), in shared memory
  int64_t num_patterns, pattern_rows, pattern_stride, tile_stride, width;
};

// Whole tiles of float64 would want more registers than a thread has.
template <typename C>
constexpr bool kGoesWhole = sizeof(C) == 4;

// sum[i][j] += 32 columns, or as many as there are, of token i . pattern j. Whole tiles have no
// branch around a load, so that loads are on their way together.
template <bool kWhole, typename S, typename C>
__device__ inline void add_products(const HopfieldTile<C>& tile, const Array<const S>& source,
                                    int64_t first, int count, bool aligned, int64_t m0,
                                    int64_t block, C (&sum)[4][8]) {
  const int lane = int(threadIdx.x) % kWarpSize;
  const int token_lane = lane / 4, pattern_lane = lane % 4;
  const int64_t rows = tile.pattern_rows - m0;
#pragma unroll(sizeof(C) == 8 ? 1 : 2)
  for (int column = 0; column < 32; column += 4) {
    const int64_t e = block + column;
    if (!kWhole && e >= tile.width) break;
    Pack<C> x[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = token_lane + 8 * i;
      if constexpr (kWhole) {
        x[i] = load_pack(source, (first + t) * tile.width + e);
      } else if (t < count) {
        x[i] = load4(source, (first + t) * tile.width + e, tile.width - e, aligned);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!kWhole && 4 * j >= rows) break;
      const Pack<C> p = tile.patterns.load4((m0 + pattern_lane + 4 * j) * tile.pattern_stride + e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[i][j] += x[i][c] * p[c];
      }
    }
  }
}

// target (tokens, M) = rows [first, first + count) of source (T, E) times patterns^T. The columns
// are divided among the warps, eight blocks of 32 at a time; each lane has four tokens and eight
// patterns. Whoever reads the target has to wait at a barrier.
template <typename S, typename C>
__device__ inline void multiply_transposed(const HopfieldTile<C>& tile,
                                           const Array<const S>& source, int64_t first, int count,
                                           bool aligned, const Array<C>& target) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int token_lane = lane / 4, pattern_lane = lane % 4;
  for (int64_t m0 = 0; m0 < tile.pattern_rows; m0 += kHopfieldPatterns) {
    const int64_t rows = tile.pattern_rows - m0;
    C sum[4][8] = {};
    for (int64_t block = warp * 32; block < tile.width; block += kHopfieldWarps * 32) {
      if (kGoesWhole<C> && aligned && count == kHopfieldTokens && rows >= kHopfieldPatterns &&
          block + 32 <= tile.width) {
        add_products<true>(tile, source, first, count, aligned, m0, block, sum);
      } else {
        add_products<false>(tile, source, first, count, aligned, m0, block, sum);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = warp * kHopfieldTokens + token_lane + 8 * i;
        tile.partial[row * kHopfieldPartialStride + pattern_lane + 4 * j] = sum[i][j];
      }
    }
    __syncthreads();
    for (int cell = int(threadIdx.x); cell < kHopfieldTokens * kHopfieldPatterns;
         cell += kHopfieldThreads) {
      const int t = cell / kHopfieldPatterns, m = cell % kHopfieldPatterns;
      if (t >= count || m >= rows) continue;
      C total = 0;
#pragma unroll
      for (int w = 0; w < kHopfieldWarps; ++w) {
        total += tile.partial[(w * kHopfieldTokens + t) * kHopfieldPartialStride + m];
      }
      target[t * tile.tile_stride + m0 + m] = total;
    }
    // The partial products are written again: by the next patterns or the next call.
    __syncthreads();
  }
}

// sum[i] = weights of token t0 + i times four columns of the patterns from e on; of all eight
// tokens without a branch.
template <bool kWhole, typename C>
__device__ inline void add_patterns(const HopfieldTile<C>& tile, const Array<C>& weights, int t0,
                                    int count, int64_t e, Pack<C> (&sum)[8]) {
#pragma unroll 1
  for (int64_t m = 0; m < tile.pattern_rows; m += 4) {
    Pack<C> p[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) p[k] = tile.patterns.load4((m + k) * tile.pattern_stride + e);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!kWhole && t0 + i >= count) break;
      const Pack<C> w = weights.load4((t0 + i) * tile.tile_stride + m);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[i][c] += w[k] * p[k][c];
      }
    }
  }
}

// Rows [first, first + count) of target (T, E) = weights (tokens, M) times patterns. Each
// warp has eight tokens and 128 columns at a time, each lane four of these.
template <typename S, typename C>
__device__ inline void multiply(const HopfieldTile<C>& tile, const Array<C>& weights, int64_t first,
                                int count, bool aligned, const Array<S>& target) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  constexpr int kGroups = kHopfieldTokens / 8;
  const int64_t items = (tile.width + kHopfieldColumns - 1) / kHopfieldColumns * kGroups;
  for (int64_t item = warp; item < items; item += kHopfieldWarps) {
    const int t0 = int(item % kGroups) * 8;
    const int64_t e = item / kGroups * kHopfieldColumns + lane * 4;
    if (e >= tile.width || t0 >= count) continue;
    Pack<C> sum[8] = {};
    if (kGoesWhole<C> && t0 + 8 <= count) {
      add_patterns<true>(tile, weights, t0, count, e, sum);
    } else {
      add_patterns<false>(tile, weights, t0, count, e, sum);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (t0 + i >= count) break;
      store4(target, (first + t0 + i) * tile.width + e, tile.width - e, aligned, sum[i]);
    }
  }
}

// What follows is done by one warp for one token, whose row of a tile no other warp touches.

// row (M) <- softmax(beta row), columns behind M become 0; returns logsumexp(beta row).
template <typename C>
__device__ inline C softmax(const HopfieldTile<C>& tile, const Array<C>& row, C beta) {
  const int lane = int(threadIdx.x) % kWarpSize;
  C top = -INFINITY;
  for (int64_t m = lane; m < tile.num_patterns; m += kWarpSize) {
    const C logit = row[m];
    top = fmax(top, beta * logit);
  }
  top = warp_max(top);
  const C shift = isinf(top) ? C(0) : top;
  C sum = 0;
  for (int64_t m = lane; m < tile.tile_stride; m += kWarpSize) {
    C weight = 0;
    if (m < tile.num_patterns) {
      const C logit = row[m];
      weight = exp(beta * logit - shift);
    }
    row[m] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  // As in torch.softmax, an infinite logit leaves no number.
  const C scale = isinf(top) ? C(NAN) : C(1) / sum;
  for (int64_t m = lane; m < tile.num_patterns; m += kWarpSize) {
    const C weight = row[m];
    row[m] = weight * scale;
  }
  __syncwarp();
  return shift + log(sum);
}

// target (M) = row (M) times the Gram matrix. Other lanes' entries of the target may be read after
// the return.
template <typename C>
__device__ inline void multiply_gram(const HopfieldTile<C>& tile, const Array<C>& row,
                                     const Array<C>& target) {
  const int lane = int(threadIdx.x) % kWarpSize;
  for (int64_t m = lane; m < tile.num_patterns; m += kWarpSize) {
    C sum = 0;
    for (int64_t j = 0; j < tile.num_patterns; ++j) {
      const C weight = row[j], product = tile.gram[j * tile.tile_stride + m];
      sum += weight * product;
    }
    target[m] = sum;
  }
  __syncwarp();
}

// sum over M of a * b.
template <typename C>
__device__ inline C dot(const HopfieldTile<C>& tile, const Array<C>& a, const Array<C>& b) {
  C sum = 0;
  for (int64_t m = int(threadIdx.x) % kWarpSize; m < tile.num_patterns; m += kWarpSize) {
    const C x = a[m], y = b[m];
    sum += x * y;
  }
  return warp_sum(sum);
}

// Copies patterns (and the Gram matrix) to shared memory, where they are to lie there.
template <bool kInShared, typename C>
__device__ inline HopfieldTile<C> load_patterns(SharedMemory& shared, const HopfieldPlan& plan,
                                                const Array<C>& patterns, const Array<C>& gram,
                                                int64_t num_patterns, int64_t width,
                                                bool has_gram) {
  HopfieldTile<C> tile{
      patterns,         gram, {}, num_patterns, plan.pattern_rows, plan.pattern_stride,
      plan.tile_stride, width};
  tile.partial = shared.take<C>(kHopfieldWarps * kHopfieldTokens * int64_t{kHopfieldPartialStride});
  if constexpr (kInShared) {
    tile.patterns = shared.take<C>(plan.pattern_rows * plan.pattern_stride);
    for (int64_t i = int64_t(threadIdx.x) * 4; i < plan.pattern_rows * plan.pattern_stride;
         i += kHopfieldThreads * 4) {
      const Pack<C> values = patterns.load4(i);
      tile.patterns.store4(i, values);
    }
    if (has_gram) {
      tile.gram = shared.take<C>(plan.pattern_rows * plan.tile_stride);
      for (int64_t i = int64_t(threadIdx.x) * 4; i < plan.pattern_rows * plan.tile_stride;
           i += kHopfieldThreads * 4) {
        const Pack<C> values = gram.load4(i);
        tile.gram.store4(i, values);
      }
    }
    __syncthreads();
  }
  return tile;
}

}  // namespace ait::cuda
