// Small kernels, right ones and broken ones, that show what the harness does and finds.
#include <cuda/device.h>
#include <cuda/warp.h>

#include <map>
#include <vector>

namespace {

using namespace ait::cuda;

constexpr int kThreads = 96;

// Reverses the numbers of a block by way of shared memory; `barrier` says whether it waits between.
void reverse(Array<int> out, bool barrier, int shift = 0) {
  SharedMemory shared;
  const Array<int> numbers = shared.take<int>(kThreads);
  const int t = int(threadIdx.x);
  numbers[t] = t;
  if (barrier) __syncthreads();
  const int other = numbers[kThreads - 1 - t + shift];
  out[int64_t(blockIdx.x) * kThreads + t] = other;
}

// Every lane of a warp writes, then reads its neighbour.
void neighbours(Array<int> out, bool barrier) {
  SharedMemory shared;
  const Array<int> numbers = shared.take<int>(kThreads);
  const int t = int(threadIdx.x);
  numbers[t] = t;
  if (barrier) __syncwarp();
  const int other = numbers[t ^ 1];
  out[int64_t(blockIdx.x) * kThreads + t] = other;
}

// Neighbouring warps, for which __syncwarp is not enough.
void other_warps(Array<int> out) {
  SharedMemory shared;
  const Array<int> numbers = shared.take<int>(kThreads);
  const int t = int(threadIdx.x);
  numbers[t] = t;
  __syncwarp();
  const int other = numbers[(t + 32) % kThreads];
  out[int64_t(blockIdx.x) * kThreads + t] = other;
}

void write_after_read(Array<int> out) {
  SharedMemory shared;
  const Array<int> numbers = shared.take<int>(kThreads);
  const int t = int(threadIdx.x);
  numbers[t] = t;
  __syncthreads();
  const int other = numbers[kThreads - 1 - t];
  numbers[t] = other;
  out[int64_t(blockIdx.x) * kThreads + t] = other;
}

void uninitialised(Array<int> out) {
  SharedMemory shared;
  const Array<int> numbers = shared.take<int>(kThreads);
  const int t = int(threadIdx.x);
  if (t > 0) numbers[t] = t;
  __syncthreads();
  const int own = numbers[t];
  out[int64_t(blockIdx.x) * kThreads + t] = own;
}

void divergent(Array<int> out, bool exits) {
  const int t = int(threadIdx.x);
  if (t == 5 && exits) return;
  if (t == 5) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[int64_t(blockIdx.x) * kThreads + t] = t;
}

void warp_operations(Array<int> out) {
  const int t = int(threadIdx.x), lane = t % 32;
  int wrong = 0;
  wrong += warp_sum(float(lane)) != 496;
  wrong += warp_max(double(lane == 7 ? NAN : -lane)) != 0;
  wrong += __shfl_sync(kAllLanes, t, 3) != t - lane + 3;
  wrong += __shfl_up_sync(kAllLanes, lane, 2) != (lane < 2 ? lane : lane - 2);
  wrong += __shfl_down_sync(kAllLanes, lane, 2) != (lane > 29 ? lane : lane + 2);
  wrong += __ballot_sync(kAllLanes, lane % 2 == 0) != 0x55555555u;
  wrong += __any_sync(kAllLanes, lane == 40) != 0 || __any_sync(kAllLanes, lane == 4) != 1;
  wrong += __all_sync(kAllLanes, lane < 32) != 1 || __all_sync(kAllLanes, lane < 31) != 0;
  if (lane < 8) wrong += __ballot_sync(0xffu, 1) != 0xffu;
  out[int64_t(blockIdx.x) * kThreads + t] = wrong;
}

void absent_lanes(Array<int> out) {
  const int t = int(threadIdx.x);
  if (t != 40) __syncwarp();
  out[int64_t(blockIdx.x) * kThreads + t] = t;
}

void different_warp_operations(Array<int> out) {
  const int t = int(threadIdx.x);
  if (t % 2 == 0) {
    __syncwarp();
  } else {
    __syncwarp();
  }
  out[int64_t(blockIdx.x) * kThreads + t] = t;
}

void histogram(Array<int> out, bool atomic) {
  SharedMemory shared;
  const Array<int> counts = shared.take<int>(4);
  const int t = int(threadIdx.x);
  if (t < 4) counts[t] = 0;
  __syncthreads();
  if (atomic) {
    counts.atomic_add(t % 4, 1);
  } else {
    counts[t % 4] += 1;
  }
  __syncthreads();
  const int count = counts[t % 4];
  out[int64_t(blockIdx.x) * kThreads + t] = count;
}

// Sums `count` of four numbers of its own by a pointer, so that no compiler sees the size.
void local_array(Array<int> out, int count) {
  const int t = int(threadIdx.x);
  const int numbers[4] = {t, t, t, t};
  const int* volatile pointer = numbers;
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += pointer[i];
  out[int64_t(blockIdx.x) * kThreads + t] = sum;
}

void order_of_threads(Array<int> out, Array<int> counter) {
  const int turn = counter.atomic_add(0, 1);
  out[int64_t(blockIdx.x) * kThreads + threadIdx.x] = turn;
}

void misaligned(Array<float> values) {
  if (threadIdx.x == 0) values.store4(1, {});
}

using Kernel = std::function<void(Array<int>, Array<int>)>;

const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> result{
      {"reverse", [](auto out, auto) { reverse(out, true); }},
      {"reverse_without_barrier", [](auto out, auto) { reverse(out, false); }},
      {"reverse_off_by_one", [](auto out, auto) { reverse(out, true, 1); }},
      {"neighbours", [](auto out, auto) { neighbours(out, true); }},
      {"neighbours_without_syncwarp", [](auto out, auto) { neighbours(out, false); }},
      {"syncwarp_for_other_warps", [](auto out, auto) { other_warps(out); }},
      {"write_after_read", [](auto out, auto) { write_after_read(out); }},
      {"uninitialised_shared", [](auto out, auto) { uninitialised(out); }},
      {"uninitialised_global",
       [](auto out, auto scratch) {
         const int value = scratch[threadIdx.x];
         out[threadIdx.x] = value;
       }},
      {"global_off_by_one",
       [](auto out, auto) { out[int64_t(blockIdx.x) * kThreads + threadIdx.x + 1] = 0; }},
      {"before_the_begin",
       [](auto out, auto) { (out + (-1))[int64_t(blockIdx.x) * kThreads + threadIdx.x] = 0; }},
      {"two_blocks_write_the_same", [](auto out, auto) { out[threadIdx.x] = 1; }},
      {"barrier_after_an_exit", [](auto out, auto) { divergent(out, true); }},
      {"barriers_apart", [](auto out, auto) { divergent(out, false); }},
      {"warp_operations", [](auto out, auto) { warp_operations(out); }},
      {"absent_lanes", [](auto out, auto) { absent_lanes(out); }},
      {"different_warp_operations", [](auto out, auto) { different_warp_operations(out); }},
      {"histogram", [](auto out, auto) { histogram(out, true); }},
      {"histogram_without_atomics", [](auto out, auto) { histogram(out, false); }},
      {"local_array", [](auto out, auto) { local_array(out, 4); }},
      {"local_array_off_by_one", [](auto out, auto) { local_array(out, 5); }},
      {"order_of_threads", [](auto out, auto counter) { order_of_threads(out, counter); }},
      {"misaligned",
       [](auto, auto) {
         alignas(16) static float values[8];
         misaligned({values, 8});
       }},
      {"too_much_shared_memory",
       [](auto, auto) {
         SharedMemory shared;
         shared.take<double>(1000);
       }},
  };
  return result;
}

}  // namespace

// Runs a kernel in two blocks; out (2, 96). Returns what went wrong, or an empty text.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_host_selftest(
    const char* name, uint64_t seed, int* out) {
  static std::string error;
  error.clear();
  cuda_on_host::settings().seed = seed;
  std::vector<int> scratch(kThreads);
  try {
    const Array<int> out_array(out, 2 * kThreads), scratch_array(scratch.data(), kThreads);
    const Kernel& kernel = kernels().at(name);
    if (std::string(name) == "order_of_threads") {
      cuda_on_host::run_grid(1, 1, 0, [&] { scratch_array[0] = 0; });
    }
    cuda_on_host::run_grid(2, kThreads, 1024, [&] { kernel(out_array, scratch_array); });
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  return error.c_str();
}
