#pragma once

#include <common/export.h>

namespace ait::cpu {

// Runs at least `flops` float32 operations (a multiply-add counts two) in registers, on all of
// torch's threads. The time it takes is the least in which any kernel can do as many.
AIT_API void run_fma_peak(double flops);

}  // namespace ait::cpu
