// Loading for bottleneck_select: rows of any storage type, as the compute type, rounded on request.
// Included by bottleneck_select_product.h and _scan.h alone.
#pragma once

#include <common/simd.h>
#include <cpu/bottleneck_select_kernel.h>

namespace ait::cpu {
namespace {

AIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
AIT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// By way of vectors V, which load what `source` holds and store what `row` holds.
template <typename V, typename S, typename E>
void convert_row(const S* source, int64_t n, E* row) {
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) V::load(source + i).store(row + i);
  if (i < n) V::load(source + i, n - i).store(row + i, n - i);
}

// Rounds to float, and on to the half type H unless that is float too, as torch does from double.
template <typename H, typename C>
void round_row(int64_t n, C* row) {
  using V = Vec<float>;
  for (int64_t i = 0; i < n; i += V::size) {
    const int64_t m = smaller(V::size, n - i);
    float rounded[V::size] = {};
    H half[V::size];
    for (int64_t j = 0; j < m; ++j) rounded[j] = float(row[i + j]);
    V::load(rounded).store(half);
    V::load(half).store(rounded);
    for (int64_t j = 0; j < m; ++j) row[i + j] = C(rounded[j]);
  }
}

template <typename E>
constexpr Storage kStorageOf = sizeof(E) == 8   ? Storage::float64
                               : sizeof(E) == 4 ? Storage::float32
                                                : Storage::bfloat16;

// Writes the n elements of `source` that begin at `offset`, as C, rounded to `rounding`.
template <typename C>
void load_row(const void* source, Storage storage, int64_t offset, Storage rounding, int64_t n,
              C* row) {
  if constexpr (sizeof(C) == sizeof(float)) {
    if (storage == Storage::bfloat16) {
      convert_row<Vec<C>>(static_cast<const BFloat16*>(source) + offset, n, row);
    } else if (storage == Storage::float16) {
      convert_row<Vec<C>>(static_cast<const Float16*>(source) + offset, n, row);
    } else {
      convert_row<Vec<C>>(static_cast<const float*>(source) + offset, n, row);
    }
  } else {
    convert_row<Vec<C>>(static_cast<const C*>(source) + offset, n, row);
    if (rounding == Storage::float32) round_row<float>(n, row);
  }
  if (rounding == Storage::bfloat16) round_row<BFloat16>(n, row);
  if (rounding == Storage::float16) round_row<Float16>(n, row);
}

// The same for rows that are kept as BFloat16, which is all that they can be rounded to.
inline void load_row(const void* source, Storage storage, int64_t offset, Storage, int64_t n,
                     BFloat16* row) {
  if (storage == Storage::bfloat16) {
    std::memcpy(row, static_cast<const BFloat16*>(source) + offset, size_t(n) * sizeof *row);
  } else if (storage == Storage::float16) {
    convert_row<Vec<float>>(static_cast<const Float16*>(source) + offset, n, row);
  } else {
    convert_row<Vec<float>>(static_cast<const float*>(source) + offset, n, row);
  }
}

}  // namespace
}  // namespace ait::cpu
