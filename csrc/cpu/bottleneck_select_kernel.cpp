// Loops of bottleneck_select; compiled once for each instruction set (see csrc/README.md for what
// this file must not include).
#include <cpu/bottleneck_select_scan.h>

namespace ait::cpu::AIT_CAPABILITY {

const BottleneckSelectKernels bottleneck_select_kernels = {kKernels<float, float>,
                                                           kKernels<double, double>};

}  // namespace ait::cpu::AIT_CAPABILITY
