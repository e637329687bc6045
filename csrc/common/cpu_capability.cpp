#include <common/cpu_capability.h>

#include <cstdlib>
#include <stdexcept>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ait::cpu {
namespace {

bool is_built(Capability candidate) {
  switch (candidate) {
    case Capability::avx512:
#ifdef AIT_BUILD_AVX512
      return true;
#else
      return false;
#endif
    case Capability::avx2:
#ifdef AIT_BUILD_AVX2
      return true;
#else
      return false;
#endif
    case Capability::baseline:
#ifdef AIT_BUILD_BASELINE
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool is_supported(Capability candidate) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (candidate) {
    case Capability::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Capability::avx2:
      return avx2;
    case Capability::baseline:
      return true;
  }
#endif
  return candidate == Capability::baseline;
}

Capability highest_allowed() {
  const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view value = setting == nullptr ? "" : setting;
  if (value == "default") return Capability::baseline;
  if (value == "avx2") return Capability::avx2;
  return Capability::avx512;
}

Capability detect() {
  const Capability highest = highest_allowed();
  for (Capability candidate : {Capability::avx512, Capability::avx2, Capability::baseline}) {
    if (candidate <= highest && is_built(candidate) && is_supported(candidate)) return candidate;
  }
  throw std::runtime_error(
      "ait: no kernels were built that this processor, or ATEN_CPU_CAPABILITY, allows");
}

// Tile registers are large: Linux gives them to a process that asks.
bool asks_for_tile_registers() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Bfloat16Products detect_bfloat16_products() {
  const char* setting = std::getenv("AIT_BFLOAT16_PRODUCTS");
  const std::string_view highest = setting == nullptr ? "" : setting;
  if (capability() != Capability::avx512 || std::getenv("ATEN_CPU_CAPABILITY") != nullptr ||
      highest == "none") {
    return Bfloat16Products::none;
  }
#if defined(AIT_BUILD_AMX_BF16) && defined(__x86_64__)
  if (highest != "avx512_bf16" && __builtin_cpu_supports("amx-tile") &&
      __builtin_cpu_supports("amx-bf16") && asks_for_tile_registers()) {
    return Bfloat16Products::amx_bf16;
  }
#endif
#if defined(AIT_BUILD_AVX512_BF16) && defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return Bfloat16Products::avx512_bf16;
#endif
  return Bfloat16Products::none;
}

}  // namespace

Capability capability() {
  static const Capability detected = detect();
  return detected;
}

Bfloat16Products bfloat16_products() {
  static const Bfloat16Products detected = detect_bfloat16_products();
  return detected;
}

const char* bfloat16_products_name() {
  switch (bfloat16_products()) {
    case Bfloat16Products::amx_bf16:
      return "amx_bf16";
    case Bfloat16Products::avx512_bf16:
      return "avx512_bf16";
    case Bfloat16Products::none:
      break;
  }
  return "none";
}

const char* capability_name() {
  switch (capability()) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    case Capability::baseline:
      break;
  }
  return "baseline";
}

}  // namespace ait::cpu
