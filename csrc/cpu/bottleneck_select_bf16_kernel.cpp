// bottleneck_select with products of BFloat16, for processors that have them: compiled once for
// each of their instruction sets.
#include <cpu/bottleneck_select_scan.h>

#if defined(__AMX_BF16__)
#include <cpu/bottleneck_select_screen.h>
#endif

namespace ait::cpu::AIT_CAPABILITY {

const SelectKernels<float> bottleneck_select_bf16_kernels = kKernels<float, BFloat16>;

#if defined(__AMX_BF16__)
const SelectKernels<float> bottleneck_select_screened_kernels = kScreenKernels;
#endif

}  // namespace ait::cpu::AIT_CAPABILITY
