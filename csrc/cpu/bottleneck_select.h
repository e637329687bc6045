#pragma once

#include <common/export.h>

#include <cstdint>

namespace ait::cpu {

// bottleneck_select of one group, float32, with a chosen partition, which must not change a bit of
// the result. For tests.
//
// query (num_rows, width), tokens (num_tokens, width), mask (num_tokens, not 0 = ignore) or null,
// all contiguous; writes values and indices, (num_rows, min(k, num_tokens)). `tile_tokens` tokens
// are loaded at a time; the tokens are split into `ranges` ranges that are scanned on their own.
// `screened` behind products of bfloat16, where the processor's tiles multiply them.
AIT_API void bottleneck_select_tiled(const float* query, const float* tokens, const uint8_t* mask,
                                     int64_t num_rows, int64_t num_tokens, int64_t width, int64_t k,
                                     int64_t tile_tokens, int64_t ranges, bool screened,
                                     float* values, int64_t* indices);

}  // namespace ait::cpu
