// ait._C: what is not a tensor operation. The operators are reached through torch.ops.ait.
#include <common/cpu_capability.h>
#include <common/path_counters.h>
#include <cpu/bottleneck_select.h>
#include <cpu/fma_peak.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

std::tuple<Array<float>, Array<int64_t>> bottleneck_select_tiled(
    const Array<float>& query, const Array<float>& tokens, int64_t k,
    const std::optional<Array<bool>>& mask, int64_t tile, int64_t ranges, bool screened) {
  if (query.ndim() != 2 || tokens.ndim() != 2 || query.shape(1) != tokens.shape(1) || k < 1 ||
      (mask && (mask->ndim() != 1 || mask->shape(0) != tokens.shape(0)))) {
    throw std::invalid_argument(
        "bottleneck_select_tiled: expected query (R, d), tokens (T, d), k of at least 1 and mask "
        "(T,) or None");
  }
  const int64_t rows = query.shape(0), num_tokens = tokens.shape(0);
  const int64_t kept = std::min(k, num_tokens);
  Array<float> values({rows, kept});
  Array<int64_t> indices({rows, kept});
  const bool* masked = mask ? mask->data() : nullptr;
  ait::cpu::bottleneck_select_tiled(
      query.data(), tokens.data(), reinterpret_cast<const uint8_t*>(masked), rows, num_tokens,
      query.shape(1), k, tile, ranges, screened, values.mutable_data(), indices.mutable_data());
  return {values, indices};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Information about the compiled kernels, and entries for their tests.";
  m.def("cpu_capability", &ait::cpu::capability_name,
        "The instruction set that the CPU kernels use: 'baseline', 'avx2' or 'avx512'.");
  m.def("bfloat16_products", &ait::cpu::bfloat16_products_name,
        "The instructions that multiply bfloat16 where it is asked for: 'none', 'avx512_bf16' or "
        "'amx_bf16'.");
  m.def("run_fma_peak", &ait::cpu::run_fma_peak, py::arg("flops"),
        py::call_guard<py::gil_scoped_release>(),
        "Runs that many float32 operations in registers on all of torch's threads, for benchmarks "
        "to time.");
  m.def(
      "bottleneck_select_tiled", &bottleneck_select_tiled, py::arg("query"), py::arg("tokens"),
      py::arg("k"), py::arg("mask") = py::none(), py::arg("tile"), py::arg("ranges"),
      py::arg("screened") = false,
      "bottleneck_select of query (R, d) and tokens (T, d), float32, with `tile` tokens loaded at "
      "a time and the tokens split into `ranges` ranges: the same bits for all of them. `screened` "
      "behind products of bfloat16, where the processor's tiles multiply them.");
  m.def("path_counters", &ait::path_counters,
        "How often the kernels took each of their paths since the last reset.");
  m.def("reset_path_counters", &ait::reset_path_counters, "Sets all path counters to 0.");
}
