#include "fma_peak.h"

#include <common/parallel.h>

#include <atomic>

#include "fma_peak_kernel.h"

namespace ait::cpu {
namespace {

const FmaPeakKernels& kernels() { AIT_RETURN_KERNELS(fma_peak_kernels); }

}  // namespace

void run_fma_peak(double flops) {
  if (!(flops >= 0 && flops <= 1e15)) {
    throw std::invalid_argument("run_fma_peak: expected flops in [0, 1e15]");
  }
  const FmaPeakKernels& table = kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const auto rounds = int64_t(flops / double(table.flops_per_round) / double(threads)) + 1;
  static std::atomic<float> sink;
  for_each_task(threads, threads, [&](int64_t, int64_t) {
    sink.store(table.run(rounds), std::memory_order_relaxed);
  });
}

}  // namespace ait::cpu
