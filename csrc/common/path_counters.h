// Counts which paths the kernels took, so that tests can tell that they exercised them all.
#pragma once

#include <common/export.h>

#include <cstdint>
#include <map>
#include <string>

namespace ait {

enum class Path {
  select_calls,
  select_tasks,         // blocks of rows, times ranges of tokens
  select_split_rows,    // rows whose tokens were split into several ranges
  select_list_cuts,     // lists of candidates that were cut down to about the k largest
  select_cuts_in_ties,  // of them, those that had to leave out some of several equal logits
  select_closed_rows,   // rows with k NaNs, which take no more
  select_tiles_in_place,
  select_tiles_copied,        // converted, rounded, or gathered around masked tokens
  select_masked_calls,        // calls with a mask
  select_bfloat16_calls,      // calls with products of bfloat16
  select_elementwise_calls,   // calls with ready logits: one row a group, width 1
  select_screened_calls,      // calls in float32 behind products of bfloat16
  select_logits_let_through,  // of them, logits that were computed in float32
  select_crowded_tiles,       // tiles of which many were let through
  count,
};

void count_path(Path path, int64_t times = 1);

AIT_API std::map<std::string, int64_t> path_counters();
AIT_API void reset_path_counters();

}  // namespace ait
