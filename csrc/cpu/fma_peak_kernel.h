// The fastest that multiply-adds run on this processor: what the benchmarks measure kernels
// against.
#pragma once

#include <common/cpu_capability.h>

#include <cstdint>

namespace ait::cpu {

struct FmaPeakKernels {
  // Runs independent chains of multiply-adds in registers alone, `rounds` times; the result only
  // keeps the compiler from dropping them.
  float (*run)(int64_t rounds);
  int64_t flops_per_round;
};

AIT_DECLARE_KERNELS(FmaPeakKernels, fma_peak_kernels)

}  // namespace ait::cpu
