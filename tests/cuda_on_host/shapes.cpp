// Checks of the launches' sizes, on devices and shapes that no test could run.
#include <cuda/bottleneck_attend_shape.h>
#include <cuda/bottleneck_select_shape.h>
#include <cuda/hopfield_retrieve_shape.h>
#include <cuda/messages.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>

using namespace ait::cuda;

namespace {

int failures = 0;

void expect(bool condition, const char* text, int line) {
  if (condition) return;
  std::printf("shapes.cpp:%d: %s\n", line, text);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

// sm_80, sm_90 and sm_100, sm_120.
const DeviceLimits kDevices[] = {{163 * 1024, 108}, {227 * 1024, 132}, {99 * 1024, 188}};
constexpr int64_t kMaxBlocks = INT32_MAX;

void check_hopfield(const HopfieldShape& s, const DeviceLimits& device) {
  for (const int64_t tile_arrays : {1, 3}) {
    const HopfieldPlan p = plan_hopfield(s, tile_arrays, 1, device);
    EXPECT(p.shared_bytes > 0 && p.shared_bytes <= device.shared_bytes);
    EXPECT(p.pattern_rows >= s.num_patterns && p.pattern_rows % 4 == 0);
    EXPECT(p.pattern_stride >= s.width && p.pattern_stride % 32 == 4);
    EXPECT(p.tiles * kHopfieldTokens >= s.num_tokens);
    EXPECT(p.chunks * p.tiles_per_chunk >= p.tiles && p.chunks <= kHopfieldMaxChunks);
    EXPECT(s.num_tokens == 0 || (p.blocks >= 1 && p.blocks <= p.chunks));
    EXPECT(p.segment * p.segments >= s.steps - 1 && p.segment >= 1);
    EXPECT(p.segment + p.segments <= 2 * 101 + kHopfieldHeldSteps);
    const HopfieldPlan other = plan_hopfield(s, tile_arrays, 1, kDevices[0]);
    EXPECT(other.chunks == p.chunks);  // it decides the order of sums
  }
  const HopfieldGradPlan g = plan_hopfield_grad_patterns(s);
  EXPECT(g.chunks * g.chunk_tokens >= s.num_tokens && g.chunks <= 64);
  EXPECT(g.column_blocks * kHopfieldColumns >= s.width);
  EXPECT(g.pattern_blocks * 4 * kHopfieldWarps >= s.num_patterns);
  EXPECT(g.chunks * g.column_blocks * g.pattern_blocks <= kMaxBlocks);
}

void check_attend(int64_t rows, int64_t entries, int64_t tokens, int64_t width,
                  const DeviceLimits& device) {
  const AttendPlan p = plan_attend(rows, entries, tokens, width, 4, device);
  EXPECT(p.parts * p.part_entries >= entries && p.part_entries % kAttendTile == 0);
  EXPECT(p.part_bytes <= kAttendSharedBytes);
  EXPECT(rows * p.parts <= kMaxBlocks);
  EXPECT(p.token_tiles * kAttendTokens >= tokens);
  EXPECT(p.token_blocks <= p.token_tiles && p.token_blocks <= kMaxBlocks);
  EXPECT(p.shared_bytes <= 48 * 1024 && (p.shared_bytes > 0 || !p.rows_in_shared || rows == 0));
  if (p.slab_columns == 0) return;
  EXPECT(p.rows_in_shared && p.slab_columns % 32 == 0);
  EXPECT(p.slabs * p.slab_columns >= width && p.slab_ranges * p.slab_tokens >= tokens);
  EXPECT(p.slab_bytes <= device.shared_bytes && p.listing_bytes <= 49 * 1024);
  EXPECT(p.slabs * p.slab_ranges <= std::max(p.slabs, device.multiprocessors));
}

void check_messages() {
  const std::string usual = "8.0, 9.0, 10.0, 12.0 or newer";
  EXPECT(is_built_for(usual, 8, 0) && is_built_for(usual, 8, 9) && is_built_for(usual, 9, 0));
  EXPECT(is_built_for(usual, 12, 1) && is_built_for(usual, 13, 0));
  EXPECT(!is_built_for(usual, 7, 5) && !is_built_for(usual, 11, 0));
  EXPECT(is_built_for("8.0, 9.0a", 9, 0) && !is_built_for("8.0, 9.0a", 9, 1));
  EXPECT(is_built_for("10.0f", 10, 3) && !is_built_for("9.0a or newer", 10, 0));
  EXPECT(!is_built_for("9.0", 10, 0) && !is_built_for("8.6", 8, 0) && !is_built_for("", 9, 0));
  EXPECT(
      unsupported_device(usual, 1, 11, 0) ==
      "ait: expected a device of compute capability 8.0, 9.0, 10.0, 12.0 or newer, for which the "
      "CUDA kernels were built, got cuda:1 of capability 11.0; build ait on this machine, or name "
      "the capability in TORCH_CUDA_ARCH_LIST");
  EXPECT(
      unsupported_device(usual, 0, 7, 5) ==
      "ait: expected a device of compute capability 8.0, 9.0, 10.0, 12.0 or newer, for which the "
      "CUDA kernels were built, got cuda:0 of capability 7.5; the kernels need 8.0 or newer: build "
      "ait with AIT_CUDA=0, and the reference operators run there");
  EXPECT(wrong_device("op", "patterns", 1, 0) ==
         "op: expected patterns on cuda:1, got a tensor on cuda:0");
  EXPECT(wrong_device("op", "patterns", 1, -1) ==
         "op: expected patterns on cuda:1, got a tensor on no CUDA device");
  EXPECT(wrong_device("op", "query", -1, -1) ==
         "op: expected query on a CUDA device, got a tensor on no CUDA device");
}

void check_dense_choice() {
  const auto prefers = [](int64_t rows, int64_t entries, int64_t tokens, int64_t width,
                          AttendDtype dtype) {
    const AttendPlan p = plan_attend(rows, entries, tokens, width, 4, kDevices[1]);
    const AttendDensePlan d = plan_attend_dense(p, dtype);
    EXPECT(d.chunks * d.chunk_tokens >= tokens && (tokens == 0 || d.chunk_tokens >= 1));
    EXPECT(rows * d.terms * d.chunk_tokens * 4 <= kAttendDenseBytes || d.chunk_tokens <= 64);
    return prefers_dense(p, dtype);
  };
  for (const AttendDtype dtype :
       {AttendDtype::float32, AttendDtype::float64, AttendDtype::bfloat16}) {
    EXPECT(!prefers(256, 512, 32768, 768, dtype));  // the default shape, k / T = 1/64
    EXPECT(!prefers(256, 1024, 32768, 768, dtype));
    EXPECT(prefers(256, 8192, 32768, 768, dtype));  // one token in four
    EXPECT(prefers(256, 16384, 32768, 768, dtype));
    EXPECT(prefers(256, 4096, 8192, 256, dtype));        // in tests/gpu
    EXPECT(!prefers(8, 10, 20, 16, dtype));              // launches cost more than they save
    EXPECT(!prefers(256, 512, 3'000'000, 1536, dtype));  // T E > 2^31
    EXPECT(prefers(256, 1'500'000, 3'000'000, 1536, dtype));
    EXPECT(!prefers(0, 4, 9, 8, dtype) && !prefers(3, 0, 9, 8, dtype));
    EXPECT(!prefers(3, 4, 0, 8, dtype) && !prefers(3, 4, 9, 0, dtype));
  }
  EXPECT(!prefers(256, 16384, 32768, 768, AttendDtype::float16));
}

void check_slab_choice() {
  const auto prefers = [](int64_t rows, int64_t entries, int64_t tokens, const DeviceLimits& device,
                          int64_t width = 768) {
    return prefers_slabs(plan_attend(rows, entries, tokens, width, 4, device), 4);
  };
  for (const DeviceLimits& device : kDevices) {
    const AttendPlan p = plan_attend(256, 512, 32768, 768, 4, device);
    EXPECT(p.slab_columns == (device.shared_bytes > 128 * 1024 ? 64 : 32));
    EXPECT(prefers(256, 512, 32768, device));  // the default shape
    EXPECT(!prefers(8, 10, 20, device));       // one more launch costs more than it saves
    EXPECT(!prefers(256, 4, 1024, device));    // the slabs are larger than what is gathered
    EXPECT(plan_attend(2000, 512, 32768, 768, 4, device).slab_columns == 0);
    EXPECT(!prefers(2000, 512, 32768, device));
    for (const int64_t value_size : {4, 8}) {  // in ait/ops/_first_use.py
      const AttendPlan few = plan_attend(64, 320, 1030, 200, value_size, device);
      EXPECT(prefers_slabs(few, value_size) && few.slabs == 4 && few.slab_ranges == 2);
      EXPECT(few.parts == 4 && few.part_entries == 96);
      EXPECT(!prefers_slabs(plan_attend(34, 9, 70, 20, value_size, device), value_size));
    }
  }
}

void check_select(int64_t rows, int64_t tokens, int64_t value_size, int64_t converted) {
  const SelectPlan p = plan_select(rows, tokens, value_size, converted);
  EXPECT(p.chunks * p.chunk_tokens >= tokens);
  EXPECT(tokens == 0 || (p.chunks - 1) * p.chunk_tokens < tokens);
  for (const DeviceLimits& device : kDevices) EXPECT(p.shared_bytes <= device.shared_bytes);
  EXPECT((rows * value_size + converted) * p.chunk_tokens <= kSelectChunkBytes ||
         p.chunk_tokens <= 64);
}

}  // namespace

int main() {
  for (const DeviceLimits& device : kDevices) {
    for (const int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{33}, int64_t{32768},
                                 int64_t{5'000'000}, int64_t{INT32_MAX}}) {
      for (const int64_t width : {0, 1, 768, 4096}) {  // T E beyond 2^31, and beyond 2^42
        for (const int64_t patterns : {1, 32, 33, 2048}) {
          for (const int64_t steps : {1, 2, 65, 66, 10'000}) {
            check_hopfield({tokens, patterns, width, steps, 4}, device);
            check_hopfield({tokens, patterns, width, steps, 8}, device);
          }
        }
        check_attend(256, 512, tokens, width, device);
        check_attend(100'000, 1, tokens, width, device);
        check_attend(0, 0, tokens, width, device);
      }
      for (const int64_t rows : {1, 256, 768, 1'000'000}) {
        for (const int64_t converted : {0, 768 * 4, 1'000'000}) {
          check_select(rows, tokens, 4, converted);
          check_select(rows, tokens, 8, converted);
        }
      }
    }
  }
  // The default shape: everything in shared memory on an A100 and later, two chunks of selection.
  const HopfieldShape usual{32768, 32, 768, 1, 4};
  EXPECT(plan_hopfield(usual, 1, 1, kDevices[0]).in_shared);
  EXPECT(plan_hopfield({32768, 32, 768, 5, 4}, 3, 1, kDevices[0]).in_shared);
  EXPECT(!plan_hopfield({32768, 4096, 768, 1, 4}, 1, 1, kDevices[1]).in_shared);
  EXPECT(plan_select(3 * 256, 32768, 4, 0).chunks == 3);
  EXPECT(plan_select(256, 32768, 4, 768 * 4).chunks == 4);  // float16
  EXPECT(plan_attend(256, 512, 32768, 768, 4, kDevices[0]).parts == 1);
  check_dense_choice();
  check_slab_choice();
  check_messages();
  return failures != 0;
}
