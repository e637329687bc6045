// ait._C: what is not a tensor operation. The operators are reached through torch.ops.ait.
#include <common/cpu_capability.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Information about the compiled kernels, and entries for their tests.";
  m.def("cpu_capability", &ait::cpu::capability_name,
        "The instruction set that the CPU kernels use: 'baseline', 'avx2' or 'avx512'.");
}
