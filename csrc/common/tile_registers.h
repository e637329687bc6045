// The processor's tile registers (AMX), where the file is compiled for them.
#pragma once

#include <common/simd.h>

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace ait {
namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kTileRows = 16;   // of every tile
constexpr int64_t kTileDepth = 32;  // BFloat16 that one tile product adds up

// Gives this thread tile registers of 16 rows of 64 bytes each. No class with a destructor: that
// would draw shared symbols of exceptions into files compiled for one instruction set.
AIT_INLINE void take_tile_registers() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  static_assert(sizeof config == 64);
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = kTileRows;
  }
  _tile_loadconfig(&config);
}

AIT_INLINE void release_tile_registers() { _tile_release(); }

#else

AIT_INLINE void take_tile_registers() {}
AIT_INLINE void release_tile_registers() {}

#endif

}  // namespace
}  // namespace ait
