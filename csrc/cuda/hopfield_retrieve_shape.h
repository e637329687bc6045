// Sizes of the launches of hopfield_retrieve. Plain C++, so that it is tested without a GPU.
#pragma once

#include <cuda/device_limits.h>

#include <algorithm>
#include <cmath>

namespace ait::cuda {

constexpr int kHopfieldWarps = 8;
constexpr int kHopfieldThreads = 32 * kHopfieldWarps;
constexpr int kHopfieldTokens = 32;    // of a tile
constexpr int kHopfieldPatterns = 32;  // that a tile is multiplied with at a time
// Rows of a warp's partial products: rows of eight tokens and four patterns fall onto 32 banks.
constexpr int kHopfieldPartialStride = 36;
constexpr int kHopfieldColumns = 128;  // that a warp writes at a time

// Sums over tokens are kept for this many chunks of tokens, in at most this many bytes. Both must
// depend on the shape alone, since they decide the order of the sums.
constexpr int64_t kHopfieldMaxChunks = 512;
constexpr int64_t kHopfieldMaxPartialBytes = int64_t{1} << 28;
// So many steps are held at once; of more, some are computed again from checkpoints.
constexpr int64_t kHopfieldHeldSteps = 64;

struct HopfieldShape {
  int64_t num_tokens, num_patterns, width, steps;
  int64_t value_size;  // of the compute type, in bytes
};

// Where the arrays of a block lie. Patterns have rows of `pattern_stride` values, of which those
// behind the width are 0, and `pattern_rows` rows, of which those behind M are 0. Tiles and the
// Gram matrix have rows of `tile_stride` values.
struct HopfieldPlan {
  int64_t pattern_rows, pattern_stride, tile_stride;
  int64_t tiles, chunks, tiles_per_chunk, blocks;
  bool in_shared;  // patterns, Gram matrix and tiles; else they lie in global memory
  int64_t shared_bytes;
  int64_t tile_values;  // of a block, where tiles lie in global memory
  int64_t segment;      // steps that the backward holds at once
  int64_t segments;
  int64_t history_values;  // of a block: weights of the steps of a segment, and checkpoints
};

// `num_tile_arrays` arrays of (tokens, M) a block, `num_grams` of (M, M).
inline HopfieldPlan plan_hopfield(const HopfieldShape& s, int64_t num_tile_arrays,
                                  int64_t num_grams, const DeviceLimits& limits) {
  HopfieldPlan p{};
  p.pattern_rows = round_up(s.num_patterns, 4);
  // Rows that follow each other begin on other banks: four more than a multiple of 32.
  p.pattern_stride = round_up(s.width, 32) + 4;
  p.tile_stride = p.pattern_rows;
  p.tiles = divide_up(s.num_tokens, kHopfieldTokens);
  const int64_t gram_values = s.steps > 1 ? num_grams * p.pattern_rows * p.tile_stride : 0;
  p.tile_values = kHopfieldTokens * p.tile_stride * num_tile_arrays;
  const int64_t partial_values = kHopfieldWarps * kHopfieldTokens * kHopfieldPartialStride;
  const int64_t wanted =
      (partial_values + p.pattern_rows * p.pattern_stride + gram_values + p.tile_values) *
      s.value_size;
  p.in_shared = wanted <= limits.shared_bytes;
  p.shared_bytes = p.in_shared ? wanted : partial_values * s.value_size;

  const int64_t gram_bytes = std::max(p.pattern_rows * p.tile_stride * s.value_size, int64_t{1});
  const int64_t fitting =
      std::clamp(kHopfieldMaxPartialBytes / gram_bytes, int64_t{1}, kHopfieldMaxChunks);
  p.tiles_per_chunk = std::max(divide_up(p.tiles, fitting), int64_t{1});
  p.chunks = divide_up(p.tiles, p.tiles_per_chunk);
  const int64_t resident = std::max(limits.shared_bytes / p.shared_bytes, int64_t{1});
  p.blocks = std::min(p.chunks, limits.multiprocessors * std::min(resident, int64_t{4}));

  const int64_t further = s.steps - 1;
  p.segment =
      std::max(further <= kHopfieldHeldSteps ? further : int64_t(std::sqrt(double(further))) + 1,
               int64_t{1});
  p.segments = std::max(divide_up(further, p.segment), int64_t{1});
  p.history_values = (p.segment + 1 + p.segments) * kHopfieldTokens * p.tile_stride;
  return p;
}

// Chunks of tokens whose sums for the gradient of the patterns are kept apart.
struct HopfieldGradPlan {
  int64_t chunks, chunk_tokens;
  int64_t column_blocks, pattern_blocks;
};

inline HopfieldGradPlan plan_hopfield_grad_patterns(const HopfieldShape& s) {
  HopfieldGradPlan p{};
  const int64_t bytes = std::max(s.num_patterns * s.width * s.value_size, int64_t{1});
  const int64_t fitting = std::clamp(kHopfieldMaxPartialBytes / bytes, int64_t{1}, int64_t{64});
  p.chunk_tokens = std::max(divide_up(s.num_tokens, fitting), int64_t{256});
  p.chunks = divide_up(s.num_tokens, p.chunk_tokens);
  p.column_blocks = divide_up(s.width, kHopfieldColumns);
  p.pattern_blocks = divide_up(s.num_patterns, 4 * kHopfieldWarps);
  return p;
}

}  // namespace ait::cuda
