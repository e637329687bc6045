// From the dtype of a tensor to the type of its elements.
#pragma once

#include <common/checks.h>
#include <common/half_types.h>

namespace ait::cuda {

// Calls run.operator()<T>() with the storage type of `dtype`.
template <typename Run>
auto dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Double:
      return run.template operator()<double>();
    case ScalarType::BFloat16:
      return run.template operator()<BFloat16>();
    case ScalarType::Half:
      return run.template operator()<Float16>();
    default:
      return run.template operator()<float>();
  }
}

// Whether rows of `width` elements can be loaded four elements at a time.
inline bool has_aligned_rows(const Tensor& tensor, int64_t width) {
  const int64_t pack = 4 * int64_t(tensor.element_size());
  return width % 4 == 0 &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (pack < 16 ? pack : 16) == 0;
}

}  // namespace ait::cuda
