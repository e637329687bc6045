// Sizes of the launches of bottleneck_select. Plain C++, so that it is tested without a GPU.
#pragma once

#include <cuda/device_limits.h>

#include <algorithm>

namespace ait::cuda {

constexpr int kSelectWarps = 16;
constexpr int kSelectThreads = 32 * kSelectWarps;
constexpr int kSelectBins = 256;
// Keys of a chunk in shared memory; and logits of a chunk, which should stay in the second-level
// cache (A100 40 MB, H100 and H200 50 MB), with what is converted of its tokens. Both depend on
// shape and dtype alone: chunks decide the shapes of the library's products.
constexpr int64_t kSelectKeyBytes = int64_t{1} << 16;
constexpr int64_t kSelectChunkBytes = int64_t{36} << 20;

struct SelectPlan {
  int64_t chunk_tokens, chunks;
  int64_t shared_bytes;
};

// `rows` of logits (all groups and terms of the query) of `value_size` bytes each; copies of a
// token in other dtypes take `converted_bytes`.
inline SelectPlan plan_select(int64_t rows, int64_t num_tokens, int64_t value_size,
                              int64_t converted_bytes) {
  SelectPlan p{};
  const int64_t by_keys = kSelectKeyBytes / value_size;
  const int64_t by_bytes =
      kSelectChunkBytes / (std::max(rows, int64_t{1}) * value_size + converted_bytes);
  const int64_t most = std::max(std::min(by_keys, by_bytes) / 64 * 64, int64_t{64});
  // Chunks of like length: none of them has a short product.
  p.chunk_tokens = std::min(
      round_up(divide_up(num_tokens, std::max(divide_up(num_tokens, most), int64_t{1})), 64),
      num_tokens);
  p.chunks = p.chunk_tokens == 0 ? 0 : divide_up(num_tokens, p.chunk_tokens);
  p.shared_bytes = round_up(p.chunk_tokens * value_size, 16) + kSelectBins * 4 +
                   2 * round_up(kSelectWarps * 4, 16) + 16 + kSelectWarps * value_size;
  return p;
}

}  // namespace ait::cuda
