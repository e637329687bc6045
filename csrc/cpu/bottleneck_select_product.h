// The tile product of bottleneck_select, and reading ahead for it. Included by
// bottleneck_select_list.h and _scan.h alone.
#pragma once

#include <common/simd.h>
#include <common/tile_registers.h>
#include <cpu/bottleneck_select_load.h>

namespace ait::cpu {
namespace {

// A panel is two vectors of rows (one where the last panel has no more rows), and a step multiplies
// it with a few tokens: as many sums as fit the registers beside two of query and one of a token.
constexpr int kPanelVectors = 2;
#if defined(__AMX_BF16__)
constexpr int kStepTokens = 32;  // two of the processor's tiles of 16 x 16 sums
#elif defined(__AVX512F__)
constexpr int kStepTokens = 14;
#else
constexpr int kStepTokens = 6;
#endif

// How far ahead tokens are asked for where nothing but reading them takes time.
constexpr int64_t kBytesAhead = 1 << 13;

AIT_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Hands out parts of a block of memory; without one it measures how much is needed.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return part;
  }
};

// What is multiplied at once for each lane of a vector: one element, or a pair of BFloat16.
template <typename E>
struct Operand {
  static constexpr int size = 1;
  static AIT_INLINE Vec<E> load(const E* p) { return Vec<E>::load(p); }
  static AIT_INLINE Vec<E> broadcast(const E* p) { return Vec<E>::broadcast(*p); }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> : BFloat16Pairs {
  static constexpr int size = 2;
};
#endif

// How much of the width is multiplied between two times that lines are asked for.
template <typename E>
constexpr int64_t kFetchWidth = 8 * Operand<E>::size;

// The width is filled up with zeros to a multiple of this.
template <typename E>
constexpr int64_t kWidthStep = Operand<E>::size;

#if defined(__AMX_BF16__)
template <>
constexpr int64_t kWidthStep<BFloat16> = kTileDepth;
template <>
constexpr int64_t kFetchWidth<BFloat16> = kTileDepth;
#endif

AIT_INLINE int64_t size_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// How many elements of a token a block of rows asks for, and where the first of them is.
AIT_INLINE int64_t tile_width(const SelectProblem& problem, int64_t num_rows) {
  return problem.elementwise ? num_rows : problem.width;
}
AIT_INLINE int64_t first_element(const SelectProblem& problem, const SelectTask& task) {
  return task.group * problem.group_stride + (problem.elementwise ? task.first_row : 0);
}

// Asks for the tokens of the next tile, a few cache lines at a time while this one is multiplied: a
// processor can wait for some 16 lines, and what the product reads must not queue behind them.
class Prefetcher {
 public:
  Prefetcher(const SelectProblem& problem, const SelectTask& task)
      : size_(size_of(problem.token_storage)),
        row_bytes_(tile_width(problem, task.num_rows) * size_),
        row_stride_(problem.token_stride * size_),
        group_(static_cast<const char*>(problem.tokens) + first_element(problem, task) * size_) {}

  // The next `num_tokens` tokens, from `token` on, in `steps` steps.
  void start(int64_t token, int64_t num_tokens, int64_t steps) {
    row_ = group_ + token * row_stride_;
    byte_ = 0;
    rows_left_ = num_tokens;
    lines_per_step_ = (num_tokens * ((row_bytes_ + 63) / 64) + steps - 1) / steps;
  }

  AIT_INLINE void step() {
    for (int64_t i = 0; i < lines_per_step_ && rows_left_ > 0; ++i) {
      __builtin_prefetch(row_ + byte_, 0, 2);
      byte_ += 64;
      if (byte_ >= row_bytes_) {
        byte_ = 0;
        row_ += row_stride_;
        --rows_left_;
      }
    }
  }

 private:
  const int64_t size_, row_bytes_, row_stride_;
  const char* const group_;
  const char* row_ = nullptr;
  int64_t byte_ = 0, rows_left_ = 0, lines_per_step_ = 0;
};

#if defined(__AMX_BF16__)

// A part of multiply(), below, on tile registers: sums of 16 tokens and 16 rows at once. Adds the
// products from `begin` to `end` of the width to what the parts before have stored.
template <int kVectors>
__attribute__((noinline)) void multiply_tiles(const BFloat16* panel, const BFloat16* tile,
                                              int64_t tile_stride, int64_t begin, int64_t end,
                                              Prefetcher& next, float* logits) {
  constexpr int64_t kRow = kTileRows * 2 * kVectors;  // of the panel: a pair of all its rows
  constexpr int64_t logit_bytes = kVectors * kTileRows * int64_t(sizeof *logits);
  const int64_t token_bytes = tile_stride * int64_t(sizeof *tile);
  const BFloat16* lower = tile + kTileRows * tile_stride;
  float* lower_logits = logits + kTileRows * kVectors * kTileRows;
  panel += begin / 2 * kRow;
  // The intrinsics do not tell the compiler that they read memory.
  __asm__ volatile("" ::: "memory");
  if (begin == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, logits, logit_bytes);
    _tile_loadd(1, lower_logits, logit_bytes);
    if constexpr (kVectors == 2) {
      _tile_loadd(2, logits + kTileRows, logit_bytes);
      _tile_loadd(3, lower_logits + kTileRows, logit_bytes);
    }
  }
  for (int64_t i = begin; i < end; i += kTileDepth, panel += kTileDepth / 2 * kRow) {
    next.step();
    _tile_loadd(4, tile + i, token_bytes);
    _tile_loadd(5, lower + i, token_bytes);
    _tile_loadd(6, panel, kRow * int64_t(sizeof *panel));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kVectors == 2) {
      _tile_loadd(7, panel + 2 * kTileRows, kRow * int64_t(sizeof *panel));
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, logits, logit_bytes);
  _tile_stored(1, lower_logits, logit_bytes);
  if constexpr (kVectors == 2) {
    _tile_stored(2, logits + kTileRows, logit_bytes);
    _tile_stored(3, lower_logits + kTileRows, logit_bytes);
  }
  __asm__ volatile("" ::: "memory");
}

#endif

// logits[t][r] = sum over i of panel[i][r] * tile[t][i], for a step of tokens and a panel of rows;
// `width` is a multiple of kWidthStep. Not inlined: constants of the code around it would take
// registers that the sums need.
template <typename C, typename E, int kVectors>
__attribute__((noinline)) void multiply(const E* panel, const E* tile, int64_t tile_stride,
                                        int64_t width, Prefetcher& next, C* logits) {
#if defined(__AMX_BF16__)
  multiply_tiles<kVectors>(panel, tile, tile_stride, 0, width, next, logits);
#else
  using Op = Operand<E>;
  using V = Vec<C>;
  V sums[kStepTokens][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kStepTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[t][v] = V::zero();
  }
  for (int64_t i = 0; i < width;) {
    next.step();
    for (const int64_t end = smaller(i + kFetchWidth<E>, width); i < end; i += Op::size) {
      decltype(Op::load(panel)) query[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        query[v] = Op::load(panel + (i * kVectors + v * Op::size) * V::size);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kStepTokens; ++t) {
        const auto token = Op::broadcast(tile + t * tile_stride + i);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[t][v] = fmadd(query[v], token, sums[t][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kStepTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[t][v].store(logits + (t * kVectors + v) * V::size);
  }
#endif
}

}  // namespace
}  // namespace ait::cpu
