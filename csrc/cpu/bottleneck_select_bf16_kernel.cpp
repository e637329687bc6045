// bottleneck_select with products of BFloat16, for processors that have them. Compiled for
// avx512_bf16 alone.
#include <cpu/bottleneck_select_scan.h>

namespace ait::cpu::avx512_bf16 {

const SelectKernels<float> bottleneck_select_kernels = kKernels<float, BFloat16>;

}  // namespace ait::cpu::avx512_bf16
