// ait._C: what is not a tensor operation. The operators are reached through torch.ops.ait.
#include <common/cpu_capability.h>
#include <cpu/fma_peak.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Information about the compiled kernels, and entries for their tests.";
  m.def("cpu_capability", &ait::cpu::capability_name,
        "The instruction set that the CPU kernels use: 'baseline', 'avx2' or 'avx512'.");
  m.def("run_fma_peak", &ait::cpu::run_fma_peak, py::arg("flops"),
        py::call_guard<py::gil_scoped_release>(),
        "Runs that many float32 operations in registers on all of torch's threads, for benchmarks "
        "to time.");
}
