// Float32 numbers as sums of three bfloat16 terms, so that products with bfloat16 numbers run on
// tensor cores and are as accurate as float32's.
#pragma once

#include <cuda/device.h>

namespace ait::cuda {

// Takes the eight leading bits of `rest` away from it.
__device__ inline BFloat16 take_term(float& rest) {
  const bool is_nan = rest != rest;
  const BFloat16 taken{static_cast<uint16_t>(is_nan ? 0x7fc0u : __float_as_uint(rest) >> 16)};
  // Of an infinity or NaN the first term holds all.
  rest = is_nan || isinf(rest) ? 0.0f : rest - to_compute(taken);
  return taken;
}

// terms (G, 3 R, d) whose sum over the three blocks of rows is query (G, R, d).
template <typename C>
__global__ void __launch_bounds__(256)
    split_in_terms(Array<const C> query, int64_t groups, int64_t num_rows, int64_t width,
                   Array<BFloat16> terms) {
  const int64_t count = groups * num_rows * width;
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * 256) {
    const int64_t group = i / (num_rows * width), within = i % (num_rows * width);
    float rest = query[i];
    for (int term = 0; term < 3; ++term) {
      terms[(group * 3 + term) * num_rows * width + within] = take_term(rest);
    }
  }
}

// What the products of the terms add up to: (terms, rows, ...), `stride` values a term.
template <typename C>
__device__ inline C sum_of_terms(const Array<const C>& products, int64_t i, int terms,
                                 int64_t stride) {
  const C main = products[i];
  if (terms == 1) return main;
  const C second = products[i + stride], third = products[i + 2 * stride];
  return isinf(main) || main != main ? main : main + (second + third);
}

}  // namespace ait::cuda
