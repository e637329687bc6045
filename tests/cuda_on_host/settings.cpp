// What Python sets and reads.
#include <algorithm>

#include "runtime.h"

extern "C" {

__attribute__((visibility("default"))) void cuda_on_host_configure(uint64_t seed,
                                                                   int64_t shared_bytes,
                                                                   int64_t multiprocessors,
                                                                   int64_t dry, int64_t dense) {
  cuda_on_host::settings() = {seed, shared_bytes, multiprocessors, dry != 0, int(dense)};
}

// Copies the launches since the last call, three numbers each, to `out` and forgets them; returns
// how many there were.
__attribute__((visibility("default"))) int64_t cuda_on_host_take_launches(int64_t* out,
                                                                          int64_t capacity) {
  auto& launches = cuda_on_host::launches();
  const auto count = int64_t(launches.size());
  for (int64_t i = 0; i < std::min(count, capacity); ++i) {
    const cuda_on_host::Launch& launch = launches[size_t(i)];
    out[3 * i] = launch.blocks;
    out[3 * i + 1] = launch.threads;
    out[3 * i + 2] = launch.shared_bytes;
  }
  launches.clear();
  return count;
}

}  // extern "C"
