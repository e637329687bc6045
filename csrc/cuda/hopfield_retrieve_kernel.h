// Kernels of hopfield_retrieve: patterns and their Gram matrix in shared memory (in global memory
// where they do not fit), one pass over the tokens.
#pragma once

#include "hopfield_retrieve_tile.h"

namespace ait::cuda {

// ---- Patterns ----

// packed (rows of the plan, pattern_stride) = patterns (M, E), zeros around.
template <typename C>
__global__ void __launch_bounds__(kHopfieldThreads)
    hopfield_pack(Array<const C> patterns, int64_t num_patterns, int64_t width, HopfieldPlan plan,
                  Array<C> packed) {
  for (int64_t i = int64_t(blockIdx.x) * kHopfieldThreads + threadIdx.x;
       i < plan.pattern_rows * plan.pattern_stride; i += int64_t(gridDim.x) * kHopfieldThreads) {
    const int64_t m = i / plan.pattern_stride, e = i % plan.pattern_stride;
    C value = 0;
    if (m < num_patterns && e < width) value = patterns[m * width + e];
    packed[i] = value;
  }
}

// gram (rows of the plan, tile_stride) = packed packed^T; a warp for each entry.
template <typename C>
__global__ void __launch_bounds__(kHopfieldThreads)
    hopfield_gram(Array<const C> packed, HopfieldPlan plan, Array<C> gram) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int64_t entries = plan.pattern_rows * plan.tile_stride;
  for (int64_t i = int64_t(blockIdx.x) * kHopfieldWarps + warp; i < entries;
       i += int64_t(gridDim.x) * kHopfieldWarps) {
    const int64_t a = i / plan.tile_stride, b = i % plan.tile_stride;
    C sum = 0;
    for (int64_t e = lane; e < plan.pattern_stride; e += kWarpSize) {
      const C x = packed[a * plan.pattern_stride + e], y = packed[b * plan.pattern_stride + e];
      sum += x * y;
    }
    sum = warp_sum(sum);
    if (lane == 0) gram[i] = sum;
  }
}

// ---- Forward ----

template <typename S>
struct HopfieldForward {
  using C = ComputeOf<S>;
  HopfieldPlan plan;
  Array<const S> state;  // (T, E)
  Array<C> patterns;     // packed
  Array<C> gram;         // where there are several steps
  int64_t num_tokens, num_patterns, width;
  C beta;
  int64_t steps;
  C tol;
  bool aligned;                // rows of state and out can be loaded four elements at a time
  Array<C> tiles;              // (blocks, tile_values), where tiles do not lie in shared memory
  Array<S> out;                // (T, E)
  Array<int64_t> steps_taken;  // (T)
  Array<C> lse;                // (T)
};

// Squared distance of a token from what its weights retrieve. By one warp.
template <typename S, typename C>
__device__ inline C squared_distance(const HopfieldTile<C>& tile, const Array<C>& weights,
                                     const Array<const S>& token) {
  C sum = 0;
  for (int64_t e = int(threadIdx.x) % kWarpSize; e < tile.width; e += kWarpSize) {
    C retrieved = 0;
    for (int64_t m = 0; m < tile.num_patterns; ++m) {
      const C weight = weights[m], pattern = tile.patterns[m * tile.pattern_stride + e];
      retrieved += weight * pattern;
    }
    const S raw = token[e];
    const C difference = retrieved - to_compute(raw);
    sum += difference * difference;
  }
  return warp_sum(sum);
}

// The steps after the first, by one warp for one token: weights <- softmax(beta weights G).
// Returns the number of steps taken. `updated` and `change` are scratch.
template <typename S, typename C>
__device__ inline int64_t take_further_steps(const HopfieldForward<S>& a,
                                             const HopfieldTile<C>& tile, const Array<C>& weights,
                                             const Array<C>& updated, const Array<C>& change,
                                             int64_t token) {
  const int lane = int(threadIdx.x) % kWarpSize;
  // The input need not lie among the patterns: its distance is measured in E dimensions.
  if (a.tol > 0 && sqrt(squared_distance(tile, weights, a.state + token * tile.width)) < a.tol) {
    return 1;
  }
  for (int64_t step = 2; step <= a.steps; ++step) {
    multiply_gram(tile, weights, updated);
    softmax(tile, updated, a.beta);
    for (int64_t m = lane; m < tile.num_patterns; m += kWarpSize) {
      const C before = weights[m], after = updated[m];
      weights[m] = after;
      change[m] = after - before;
    }
    __syncwarp();
    if (!(a.tol > 0)) continue;
    // |change P|^2 = change G change^T.
    multiply_gram(tile, change, updated);
    if (sqrt(dot(tile, change, updated)) < a.tol) return step;
    __syncwarp();
  }
  return a.steps;
}

template <typename S, bool kInShared>
__global__ void __launch_bounds__(kHopfieldThreads, 1) hopfield_forward(HopfieldForward<S> a) {
  using C = ComputeOf<S>;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const bool several = a.steps > 1;
  SharedMemory shared;
  const HopfieldTile<C> tile = load_patterns<kInShared>(shared, a.plan, a.patterns, a.gram,
                                                        a.num_patterns, a.width, several);
  Array<C> tiles = a.tiles + int64_t(blockIdx.x) * a.plan.tile_values;
  if constexpr (kInShared) tiles = shared.take<C>(a.plan.tile_values);
  const int64_t tile_size = kHopfieldTokens * tile.tile_stride;
  const Array<C> weights = tiles, updated = tiles + tile_size, change = updated + tile_size;

  for (int64_t index = blockIdx.x; index < a.plan.tiles; index += gridDim.x) {
    const int64_t first = index * kHopfieldTokens;
    const int64_t rest = a.num_tokens - first;
    const int count = rest < kHopfieldTokens ? int(rest) : kHopfieldTokens;
    multiply_transposed(tile, a.state, first, count, a.aligned, weights);
    for (int t = warp; t < count; t += kHopfieldWarps) {
      const int64_t at = t * tile.tile_stride;
      const C lse = softmax(tile, weights + at, a.beta);
      int64_t taken = 1;
      if (several) {
        taken = take_further_steps(a, tile, weights + at, updated + at, change + at, first + t);
      }
      if (lane == 0) {
        a.lse[first + t] = lse;
        a.steps_taken[first + t] = taken;
      }
    }
    __syncthreads();
    multiply(tile, weights, first, count, a.aligned, a.out);
    // The next tile's weights are written after the barriers of its products.
  }
}

// ---- Backward ----

template <typename S>
struct HopfieldBackward {
  using C = ComputeOf<S>;
  HopfieldPlan plan;
  Array<const S> grad_out, state;    // (T, E)
  Array<const int64_t> steps_taken;  // (T)
  Array<C> patterns, gram;
  int64_t num_tokens, num_patterns, width;
  C beta;
  int64_t steps;
  bool aligned;
  Array<C> tiles;         // (blocks, tile_values), where tiles do not lie in shared memory
  Array<C> history;       // (blocks, history_values), where there are several steps
  Array<C> partial_gram;  // (chunks, rows of the plan, tile_stride), where there are several steps
  Array<C> last_weights;  // (T, tile_stride): weights of the last step taken
  Array<C> grad_logits;   // (T, tile_stride): gradient of the first step's logits, times beta
  Array<S> grad_state;    // (T, E)
};

// The number of steps that a token took; one that cannot be leads out of no array.
__device__ inline int64_t clamp_steps(int64_t taken, int64_t steps) {
  return taken < 1 ? 1 : taken > steps ? steps : taken;
}

// The same for a value that nobody has looked at yet.
__device__ inline int64_t checked_steps(int64_t taken, int64_t steps) {
  if (taken < 1 || taken > steps) {
    fail("hopfield_retrieve: expected steps_taken from 1 to %lld, got %lld\n", steps, taken);
  }
  return clamp_steps(taken, steps);
}

// grad_row (M) <- beta * weights * (grad_row - sum of weights * grad_row), by one warp.
template <typename C>
__device__ inline void softmax_backward(const HopfieldTile<C>& tile, const Array<C>& weights,
                                        const Array<C>& grad_row, C beta, const Array<C>& target) {
  const C mean = dot(tile, weights, grad_row);
  for (int64_t m = int(threadIdx.x) % kWarpSize; m < tile.tile_stride; m += kWarpSize) {
    C result = 0;
    if (m < tile.num_patterns) {
      const C weight = weights[m], grad = grad_row[m];
      result = beta * weight * (grad - mean);
    }
    target[m] = result;
  }
  __syncwarp();
}

// Copies a row (M) and the zeros behind it, by one warp.
template <typename C>
__device__ inline void copy_row(const HopfieldTile<C>& tile, const Array<C>& source,
                                const Array<C>& target) {
  for (int64_t m = int(threadIdx.x) % kWarpSize; m < tile.tile_stride; m += kWarpSize) {
    const C value = source[m];
    target[m] = value;
  }
  __syncwarp();
}

// The weights of the steps of one token, by one warp: of the first step of each segment
// (checkpoints), or of all steps of one segment.
template <typename C>
struct HopfieldHistory {
  Array<C> segment;      // (segment + 1, tokens, tile_stride)
  Array<C> checkpoints;  // (segments, tokens, tile_stride)
  int64_t tile_size;

  __device__ Array<C> step(int64_t i, int64_t at) const { return segment + (i * tile_size + at); }
  __device__ Array<C> checkpoint(int64_t i, int64_t at) const {
    return checkpoints + (i * tile_size + at);
  }
};

// One tile's backward through the steps 2..most, which leaves in `grads` the gradient of each
// token's weights after the first step, and in history.step(0) these weights. Adds to
// gram_sum (M, M) the gradient of the Gram matrix. By the whole block.
template <typename S, typename C>
__device__ inline void backward_steps(const HopfieldBackward<S>& a, const HopfieldTile<C>& tile,
                                      const HopfieldHistory<C>& history, const Array<C>& grads,
                                      const Array<C>& products, int64_t first, int count,
                                      const Array<C>& gram_sum) {
  const int warp = int(threadIdx.x) / kWarpSize;
  int64_t most = 1;
  for (int t = 0; t < count; ++t) {
    const int64_t taken = clamp_steps(a.steps_taken[first + t], a.steps);
    most = taken > most ? taken : most;
  }
  const int64_t length = a.plan.segment;
  for (int64_t segment = (most - 2 + length) / length - 1; segment >= 0; --segment) {
    const int64_t begin = 1 + segment * length;  // the step of the segment's first weights
    const int64_t end = begin + length < most ? begin + length : most;
    for (int t = warp; t < count; t += kHopfieldWarps) {
      const int64_t at = t * tile.tile_stride;
      copy_row(tile, history.checkpoint(segment, at), history.step(0, at));
      for (int64_t step = begin + 1; step <= end; ++step) {
        const Array<C> target = history.step(step - begin, at);
        multiply_gram(tile, history.step(step - begin - 1, at), target);
        softmax(tile, target, a.beta);
      }
    }
    for (int64_t step = end; step > begin; --step) {
      for (int t = warp; t < count; t += kHopfieldWarps) {
        const int64_t at = t * tile.tile_stride;
        const bool takes_part = step <= clamp_steps(a.steps_taken[first + t], a.steps);
        if (takes_part) {
          softmax_backward(tile, history.step(step - begin, at), grads + at, a.beta, products + at);
          multiply_gram(tile, products + at, grads + at);
        } else {
          for (int64_t m = int(threadIdx.x) % kWarpSize; m < tile.tile_stride; m += kWarpSize) {
            products[at + m] = 0;
          }
        }
      }
      __syncthreads();
      for (int64_t cell = threadIdx.x; cell < tile.num_patterns * tile.tile_stride;
           cell += kHopfieldThreads) {
        const int64_t i = cell / tile.tile_stride, j = cell % tile.tile_stride;
        C sum = gram_sum[cell];
        for (int t = 0; t < count; ++t) {
          const C weight = history.step(step - begin - 1, t * tile.tile_stride)[i];
          const C product = products[t * tile.tile_stride + j];
          // A token that stopped earlier must not turn another's infinity into NaN.
          sum += product == 0 ? C(0) : weight * product;
        }
        gram_sum[cell] = sum;
      }
      __syncthreads();
    }
  }
}

template <typename S, bool kInShared>
__global__ void __launch_bounds__(kHopfieldThreads, 1) hopfield_backward(HopfieldBackward<S> a) {
  using C = ComputeOf<S>;
  const int warp = int(threadIdx.x) / kWarpSize;
  const bool several = a.steps > 1;
  SharedMemory shared;
  const HopfieldTile<C> tile = load_patterns<kInShared>(shared, a.plan, a.patterns, a.gram,
                                                        a.num_patterns, a.width, several);
  Array<C> tiles = a.tiles + int64_t(blockIdx.x) * a.plan.tile_values;
  if constexpr (kInShared) tiles = shared.take<C>(a.plan.tile_values);
  const int64_t tile_size = kHopfieldTokens * tile.tile_stride;
  const int64_t gram_size = tile.pattern_rows * tile.tile_stride;
  const Array<C> weights = tiles, grads = weights + tile_size, products = grads + tile_size;
  const Array<C> own_history = a.history + int64_t(blockIdx.x) * a.plan.history_values;
  const HopfieldHistory<C> history{own_history, own_history + (a.plan.segment + 1) * tile_size,
                                   tile_size};

  for (int64_t chunk = blockIdx.x; chunk < a.plan.chunks; chunk += gridDim.x) {
    const Array<C> gram_sum = a.partial_gram + chunk * gram_size;
    if (several) {
      for (int64_t i = threadIdx.x; i < gram_size; i += kHopfieldThreads) gram_sum[i] = 0;
    }
    const int64_t begin = chunk * a.plan.tiles_per_chunk;
    const int64_t end = begin + a.plan.tiles_per_chunk;
    for (int64_t index = begin; index < end && index < a.plan.tiles; ++index) {
      const int64_t first = index * kHopfieldTokens;
      const int64_t rest = a.num_tokens - first;
      const int count = rest < kHopfieldTokens ? int(rest) : kHopfieldTokens;
      multiply_transposed(tile, a.state, first, count, a.aligned, weights);
      multiply_transposed(tile, a.grad_out, first, count, a.aligned, grads);
      for (int t = warp; t < count; t += kHopfieldWarps) {
        const int64_t at = t * tile.tile_stride;
        const int64_t taken = checked_steps(a.steps_taken[first + t], a.steps);
        softmax(tile, weights + at, a.beta);
        if (several) {
          copy_row(tile, weights + at, history.step(0, at));
          copy_row(tile, weights + at, history.checkpoint(0, at));
        }
        for (int64_t step = 2; step <= taken; ++step) {
          multiply_gram(tile, weights + at, products + at);
          softmax(tile, products + at, a.beta);
          copy_row(tile, products + at, weights + at);
          if ((step - 1) % a.plan.segment == 0 && (step - 1) / a.plan.segment < a.plan.segments) {
            copy_row(tile, weights + at, history.checkpoint((step - 1) / a.plan.segment, at));
          }
        }
        copy_row(tile, weights + at, a.last_weights + (first + t) * tile.tile_stride);
      }
      if (several) {
        __syncthreads();
        backward_steps(a, tile, history, grads, products, first, count, gram_sum);
      }
      for (int t = warp; t < count; t += kHopfieldWarps) {
        const int64_t at = t * tile.tile_stride;
        if (several) {
          softmax_backward(tile, history.step(0, at), grads + at, a.beta, products + at);
        } else {
          softmax_backward(tile, weights + at, grads + at, a.beta, products + at);
        }
        copy_row(tile, products + at, a.grad_logits + (first + t) * tile.tile_stride);
      }
      __syncthreads();
      multiply(tile, products, first, count, a.aligned, a.grad_state);
      __syncthreads();
    }
  }
}

// ---- Gradient of the patterns ----

template <typename S>
struct HopfieldGradPatterns {
  using C = ComputeOf<S>;
  HopfieldGradPlan plan;
  Array<const S> grad_out, state;            // (T, E)
  Array<const C> last_weights, grad_logits;  // (T, tile_stride)
  int64_t num_tokens, num_patterns, width, tile_stride;
  bool aligned;
  Array<C> partial;  // (chunks, M, E)
};

// partial[chunk] = sum over its tokens of last_weights^T grad_out + grad_logits^T state. Each warp
// has four patterns and 128 columns, each lane four of these.
template <typename S>
__global__ void __launch_bounds__(kHopfieldThreads, 2)
    hopfield_grad_patterns(HopfieldGradPatterns<S> a) {
  using C = ComputeOf<S>;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int64_t per_chunk = a.plan.column_blocks * a.plan.pattern_blocks;
  const int64_t chunk = blockIdx.x / per_chunk, within = blockIdx.x % per_chunk;
  const int64_t m = (within / a.plan.column_blocks * kHopfieldWarps + warp) * 4;
  const int64_t e = within % a.plan.column_blocks * kHopfieldColumns + lane * 4;
  if (m >= a.num_patterns || e >= a.width) return;
  const int64_t begin = chunk * a.plan.chunk_tokens;
  const int64_t most = begin + a.plan.chunk_tokens;
  const int64_t end = most < a.num_tokens ? most : a.num_tokens;
  Pack<C> sum[4] = {};
  const auto add = [&](const Pack<C>& weight, const Pack<C>& grad_logit, const Pack<C>& grad,
                       const Pack<C>& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[i][c] += weight[i] * grad[c];
        sum[i][c] += grad_logit[i] * x[c];
      }
    }
  };
  int64_t t = begin;
  // Four tokens at a time, whose loads are on their way together.
  constexpr int kBatch = 4;
  for (; a.aligned && t + kBatch <= end; t += kBatch) {
    Pack<C> weight[kBatch], grad_logit[kBatch], grad[kBatch], x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      weight[i] = a.last_weights.load4((t + i) * a.tile_stride + m);
      grad_logit[i] = a.grad_logits.load4((t + i) * a.tile_stride + m);
      grad[i] = load_pack(a.grad_out, (t + i) * a.width + e);
      x[i] = load_pack(a.state, (t + i) * a.width + e);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) add(weight[i], grad_logit[i], grad[i], x[i]);
  }
  for (; t < end; ++t) {
    const int64_t at = t * a.width + e, rest = a.width - e;
    add(a.last_weights.load4(t * a.tile_stride + m), a.grad_logits.load4(t * a.tile_stride + m),
        load4(a.grad_out, at, rest, a.aligned), load4(a.state, at, rest, a.aligned));
  }
  for (int i = 0; i < 4 && m + i < a.num_patterns; ++i) {
    store4(a.partial, (chunk * a.num_patterns + m + i) * a.width + e, a.width - e, false, sum[i]);
  }
}

// gram_sum (M, tile_stride) = sum over the chunks, in order, of partial_gram + partial_gram^T.
template <typename C>
__global__ void __launch_bounds__(kHopfieldThreads)
    hopfield_reduce_gram(Array<const C> partial_gram, int64_t num_patterns, HopfieldPlan plan,
                         Array<C> gram_sum) {
  const int64_t gram_size = plan.pattern_rows * plan.tile_stride;
  for (int64_t cell = int64_t(blockIdx.x) * kHopfieldThreads + threadIdx.x;
       cell < num_patterns * num_patterns; cell += int64_t(gridDim.x) * kHopfieldThreads) {
    const int64_t i = cell / num_patterns, j = cell % num_patterns;
    C sum = 0;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const C a = partial_gram[chunk * gram_size + i * plan.tile_stride + j];
      const C b = partial_gram[chunk * gram_size + j * plan.tile_stride + i];
      sum += a + b;
    }
    gram_sum[i * plan.tile_stride + j] = sum;
  }
}

// grad_patterns (M, E) = sum over the chunks, in order, of partial, plus gram_sum times patterns.
template <typename C>
__global__ void __launch_bounds__(kHopfieldThreads)
    hopfield_reduce_patterns(Array<const C> partial, int64_t chunks, Array<const C> gram_sum,
                             Array<const C> packed, int64_t num_patterns, int64_t width,
                             HopfieldPlan plan, bool has_gram, Array<C> grad_patterns) {
  for (int64_t cell = int64_t(blockIdx.x) * kHopfieldThreads + threadIdx.x;
       cell < num_patterns * width; cell += int64_t(gridDim.x) * kHopfieldThreads) {
    const int64_t m = cell / width, e = cell % width;
    C sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const C part = partial[chunk * num_patterns * width + cell];
      sum += part;
    }
    for (int64_t j = 0; has_gram && j < num_patterns; ++j) {
      const C weight = gram_sum[m * plan.tile_stride + j];
      const C pattern = packed[j * plan.pattern_stride + e];
      sum += weight * pattern;
    }
    grad_patterns[cell] = sum;
  }
}

}  // namespace ait::cuda
