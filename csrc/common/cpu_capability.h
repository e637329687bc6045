// Which compiled variant of the kernels runs on this processor.
#pragma once

#include <common/export.h>

namespace ait::cpu {

enum class Capability { baseline, avx2, avx512 };

// The best variant that was built and that the processor can run, at most what the environment
// variable ATEN_CPU_CAPABILITY (default, avx2, avx512; the same as torch's) allows. Read once, at
// the first call.
AIT_API Capability capability();

enum class Bfloat16Products { none, avx512_bf16, amx_bf16 };

// The best instructions for products of bfloat16 that may be used beside Capability::avx512: they
// were built, the processor and the system offer them, ATEN_CPU_CAPABILITY is not set, and the
// environment variable AIT_BFLOAT16_PRODUCTS (none, avx512_bf16, amx_bf16) allows them. Read once,
// at the first call.
AIT_API Bfloat16Products bfloat16_products();

// "none", "avx512_bf16" or "amx_bf16".
AIT_API const char* bfloat16_products_name();

// "baseline", "avx2" or "avx512".
AIT_API const char* capability_name();

}  // namespace ait::cpu

// The kernels' table for the capability in use, `ait::cpu::<capability>::name`. A variant that was
// not built must not be referred to, or linking fails.
#ifdef AIT_BUILD_AVX512
#define AIT_CASE_AVX512(name)          \
  case ::ait::cpu::Capability::avx512: \
    return ::ait::cpu::avx512::name;
#else
#define AIT_CASE_AVX512(name)
#endif
#ifdef AIT_BUILD_AVX2
#define AIT_CASE_AVX2(name)          \
  case ::ait::cpu::Capability::avx2: \
    return ::ait::cpu::avx2::name;
#else
#define AIT_CASE_AVX2(name)
#endif
#ifdef AIT_BUILD_BASELINE
#define AIT_CASE_BASELINE(name)          \
  case ::ait::cpu::Capability::baseline: \
    return ::ait::cpu::baseline::name;
#else
#define AIT_CASE_BASELINE(name)
#endif

// Body of a function that returns `const Table&` of the capability in use.
#define AIT_RETURN_KERNELS(name)      \
  switch (::ait::cpu::capability()) { \
    AIT_CASE_AVX512(name)             \
    AIT_CASE_AVX2(name)               \
    AIT_CASE_BASELINE(name)           \
    default:                          \
      break;                          \
  }                                   \
  __builtin_unreachable()

// Declares the kernels' table for every capability.
#define AIT_DECLARE_KERNELS(Table, name) \
  namespace baseline {                   \
  extern const Table name;               \
  }                                      \
  namespace avx2 {                       \
  extern const Table name;               \
  }                                      \
  namespace avx512 {                     \
  extern const Table name;               \
  }
