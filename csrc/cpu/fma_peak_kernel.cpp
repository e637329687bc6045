#include "fma_peak_kernel.h"

#include <common/simd.h>

namespace ait::cpu {
namespace {

// More chains than latency times throughput on any processor so far, and few enough to stay in the
// 16 registers of AVX2.
constexpr int kChains = 12;

float run(int64_t rounds) {
  using V = Vec<float>;
  const V factor = V::broadcast(0.5f);
  V chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = V::broadcast(float(i));
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) chains[i] = fmadd(chains[i], factor, factor);
  }
  V sum = chains[0];
  for (int i = 1; i < kChains; ++i) sum = sum + chains[i];
  return reduce_add(sum);
}

}  // namespace

namespace AIT_CAPABILITY {

const FmaPeakKernels fma_peak_kernels = {run, 2 * kChains * Vec<float>::size};

}  // namespace AIT_CAPABILITY
}  // namespace ait::cpu
