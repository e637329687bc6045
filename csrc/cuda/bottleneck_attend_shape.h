// Sizes of the launches of bottleneck_attend. Plain C++, so that it is tested without a GPU.
#pragma once

#include <cuda/device_limits.h>

#include <algorithm>

namespace ait::cuda {

constexpr int kAttendWarps = 8;
constexpr int kAttendThreads = 32 * kAttendWarps;
// Entries of a row that one block takes: few enough that their tokens, read for the logits, are
// still in the first-level cache when their weighted sum is formed.
constexpr int kAttendPart = 32;
constexpr int kAttendTokens = 32;  // of a tile, one bit each in a row's mask
constexpr int kAttendPacks = 8;    // of four columns, that a lane sums at a time

struct AttendPlan {
  int64_t num_rows, num_entries, num_tokens, width;
  int64_t parts;  // of a row
  int64_t token_tiles, token_blocks;
  bool rows_in_shared;  // what a tile of tokens needs to know of each row; else in global memory
  int64_t shared_bytes;
};

inline AttendPlan plan_attend(int64_t num_rows, int64_t num_entries, int64_t num_tokens,
                              int64_t width, const DeviceLimits& limits) {
  AttendPlan p{num_rows, num_entries, num_tokens, width, 0, 0, 0, false, 0};
  p.parts = divide_up(num_entries, kAttendPart);
  p.token_tiles = divide_up(num_tokens, kAttendTokens);
  // A mask (four bytes, rounded up) and a position (eight bytes) for each row.
  const int64_t wanted = round_up(num_rows * 4, 16) + round_up(num_rows * 8, 16);
  // Several blocks are to share a multiprocessor.
  p.rows_in_shared = wanted <= std::min(limits.shared_bytes, int64_t{48} * 1024);
  p.shared_bytes = p.rows_in_shared ? wanted : 0;
  p.token_blocks = std::min(p.token_tiles, limits.multiprocessors * 8);
  return p;
}

}  // namespace ait::cuda
