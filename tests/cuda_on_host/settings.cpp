// What Python sets: seed, size of shared memory, number of multiprocessors.
#include "runtime.h"

extern "C" __attribute__((visibility("default"))) void cuda_on_host_configure(
    uint64_t seed, int64_t shared_bytes, int64_t multiprocessors) {
  cuda_on_host::settings() = {seed, shared_bytes, multiprocessors};
}
