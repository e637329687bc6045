// Storage of half-precision numbers, as plain bits: the kernels must not include torch's or the
// standard library's inline code (see csrc/README.md), and convert at load and store themselves.
#pragma once

#include <cstdint>

namespace ait {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace ait
