#include <common/cpu_capability.h>

#include <cstdlib>
#include <stdexcept>
#include <string_view>

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

}  // namespace

Capability capability() {
  static const Capability detected = detect();
  return detected;
}

bool multiplies_bfloat16() {
#if defined(AIT_BUILD_AVX512_BF16) && defined(__x86_64__)
  static const bool detected = capability() == Capability::avx512 &&
                               std::getenv("ATEN_CPU_CAPABILITY") == nullptr &&
                               __builtin_cpu_supports("avx512bf16");
  return detected;
#else
  return false;
#endif
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
