// What the shapes of launches depend on. Plain C++, so that it is tested without a GPU.
#pragma once

#include <cstdint>

namespace ait::cuda {

struct DeviceLimits {
  int64_t shared_bytes;  // dynamic shared memory that one block can ask for
  int64_t multiprocessors;
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace ait::cuda
