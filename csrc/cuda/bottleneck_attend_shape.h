// Sizes of the launches of bottleneck_attend. Plain C++, so that it is tested without a GPU.
#pragma once

#include <cuda/device_limits.h>

#include <algorithm>

namespace ait::cuda {

constexpr int kAttendWarps = 8;
constexpr int kAttendThreads = 32 * kAttendWarps;
// Entries of a row that a block takes at a time: few enough that their tokens, read for the logits,
// are still in the first-level cache when their weighted sum is formed.
constexpr int kAttendTile = 32;
// So many blocks are worth cutting rows into parts, which takes one more launch to combine.
constexpr int64_t kAttendWantedBlocks = 256;
constexpr int kAttendTokens = 32;  // of a tile of tokens, one bit each in a row's mask
// A slab of columns of `query` and `grad_pooled`, all rows of it, is kept by a block of its own.
constexpr int kAttendSlabThreads = 1024;
constexpr int64_t kAttendSlabColumns = 64;
// Several blocks are to share a multiprocessor.
constexpr int64_t kAttendSharedBytes = int64_t{48} * 1024;

struct AttendPlan {
  int64_t num_rows, num_entries, num_tokens, width;
  int64_t parts, part_entries;  // of a row; they depend on the shape alone
  bool sums_in_shared;          // a part's weighted sum of tokens; else it grows in global memory
  int64_t part_bytes;           // shared memory of a block that takes a part
  int64_t token_tiles, token_blocks;
  bool rows_in_shared;  // what a tile of tokens needs to know of each row; else in global memory
  int64_t shared_bytes;
  int64_t slab_columns;                     // 0 where no slab fits into shared memory
  int64_t slabs, slab_ranges, slab_tokens;  // a block has a slab and a range of tokens
  int64_t slab_bytes, listing_bytes;
};

// `value_size`: of the compute type, in bytes.
inline AttendPlan plan_attend(int64_t num_rows, int64_t num_entries, int64_t num_tokens,
                              int64_t width, int64_t value_size, const DeviceLimits& limits) {
  AttendPlan p{};
  p.num_rows = num_rows;
  p.num_entries = num_entries;
  p.num_tokens = num_tokens;
  p.width = width;
  const int64_t most_parts = std::max(divide_up(num_entries, kAttendTile), int64_t{1});
  const int64_t wanted_parts =
      std::max(divide_up(kAttendWantedBlocks, std::max(num_rows, int64_t{1})), int64_t{1});
  p.part_entries =
      std::max(round_up(divide_up(num_entries, std::min(wanted_parts, most_parts)), kAttendTile),
               int64_t{kAttendTile});
  p.parts = std::max(divide_up(num_entries, p.part_entries), int64_t{1});
  const int64_t most_bytes = std::min(limits.shared_bytes, kAttendSharedBytes);
  // Tokens, two numbers each, one for the whole tile, and one for each warp.
  p.part_bytes = kAttendTile * (8 + 2 * value_size) + 16 + kAttendWarps * 4;
  const int64_t sum_bytes = round_up(width * value_size, 16);
  p.sums_in_shared = p.part_bytes + sum_bytes <= most_bytes;
  if (p.sums_in_shared) p.part_bytes += sum_bytes;

  p.token_tiles = divide_up(num_tokens, kAttendTokens);
  // A mask (four bytes, rounded up) and a position (eight bytes) for each row.
  const int64_t wanted = round_up(num_rows * 4, 16) + round_up(num_rows * 8, 16);
  p.rows_in_shared = wanted <= most_bytes;
  p.shared_bytes = p.rows_in_shared ? wanted : 0;
  p.token_blocks = std::min(p.token_tiles, limits.multiprocessors * 8);

  const auto bytes_of_slab = [&](int64_t columns) { return 2 * num_rows * columns * value_size; };
  for (int64_t columns = kAttendSlabColumns; columns >= 32 && p.slab_columns == 0; columns /= 2) {
    if (p.rows_in_shared && bytes_of_slab(columns) <= limits.shared_bytes) p.slab_columns = columns;
  }
  if (num_rows == 0 || num_tokens == 0 || width == 0) p.slab_columns = 0;
  if (p.slab_columns == 0) return p;
  p.slab_bytes = bytes_of_slab(p.slab_columns);
  p.slabs = divide_up(width, p.slab_columns);
  // As many blocks as multiprocessors, but none for a few tokens.
  const int64_t ranges = std::clamp(limits.multiprocessors / p.slabs, int64_t{1},
                                    divide_up(num_tokens, kAttendSlabThreads));
  p.slab_tokens = divide_up(num_tokens, ranges);
  p.slab_ranges = divide_up(num_tokens, p.slab_tokens);
  p.listing_bytes = p.shared_bytes + kAttendTokens * 8 + kAttendWarps * 8;
  return p;
}

// ---- The dense path: the library's products with all tokens, where rows list many of them ----

enum class AttendDtype { float32, float64, bfloat16, float16 };

// Nominal rates, per second, of which README.md has the sources and the reasons.
constexpr double kAttendCacheBytes = 5.5e12, kAttendMemoryBytes = 3.0e12;
constexpr double kAttendTensorFlops = 6e14, kAttendFlops = 5e13, kAttendLaunchSeconds = 4e-6;
constexpr int64_t kAttendDenseBytes = int64_t{36} << 20;  // of a matrix (terms * R, chunk)

constexpr double kAttendSharedRate = 2.5e13;

// Whether the gradient of the tokens is expected to take less time by slabs in shared memory than
// by gathering rows from the second-level cache. The sums are the same, in the same order.
inline bool prefers_slabs(const AttendPlan& p, int64_t value_size) {
  if (p.slab_columns == 0) return false;
  const double gathered =
      2.0 * double(p.num_rows) * double(p.num_entries) * double(p.width) * double(value_size);
  const double loaded = double(p.slabs * p.slab_ranges) * double(p.slab_bytes);
  return loaded / kAttendCacheBytes + gathered / kAttendSharedRate + kAttendLaunchSeconds <
         gathered / kAttendCacheBytes;
}

struct AttendDensePlan {
  int terms;  // bfloat16 terms of a float32, or 1
  int64_t chunk_tokens, chunks;
};

inline AttendDensePlan plan_attend_dense(const AttendPlan& p, AttendDtype dtype,
                                         int64_t matrix_bytes = kAttendDenseBytes) {
  AttendDensePlan d{};
  d.terms = dtype == AttendDtype::bfloat16 ? 3 : 1;
  const int64_t value_size = dtype == AttendDtype::float64 ? 8 : 4;
  const int64_t row_bytes = std::max(p.num_rows * d.terms * value_size, p.width * value_size);
  const int64_t most =
      std::max(matrix_bytes / std::max(row_bytes, int64_t{1}) / 64 * 64, int64_t{64});
  d.chunk_tokens = std::min(most, p.num_tokens);
  d.chunks = p.num_tokens == 0 ? 0 : divide_up(p.num_tokens, d.chunk_tokens);
  return d;
}

// Whether products with all tokens are expected to take less time than gathering the listed ones.
inline bool prefers_dense(const AttendPlan& p, AttendDtype dtype) {
  // A float32 cannot be written as three float16, whose exponents are too short.
  if (dtype == AttendDtype::float16) return false;
  const AttendDensePlan d = plan_attend_dense(p, dtype);
  const double rows = double(p.num_rows), tokens = double(p.num_tokens), width = double(p.width);
  const double token_size =
      dtype == AttendDtype::bfloat16 ? 2 : (dtype == AttendDtype::float64 ? 8 : 4);
  const double value_size = dtype == AttendDtype::float64 ? 8 : 4;
  const double rate = dtype == AttendDtype::bfloat16 ? kAttendTensorFlops : kAttendFlops;
  // Two products; logits written and read, weights written and read.
  const double flops = 2 * 2 * d.terms * rows * tokens * width;
  const double bytes =
      2 * rows * tokens * d.terms * (value_size + std::min(token_size, value_size));
  const double dense =
      flops / rate + bytes / kAttendMemoryBytes + kAttendLaunchSeconds * (3 + 5 * double(d.chunks));
  const double gather =
      rows * double(p.num_entries) * width * token_size / kAttendCacheBytes + kAttendLaunchSeconds;
  return dense < gather;
}

}  // namespace ait::cuda
