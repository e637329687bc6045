// Memory for large results, in pages of 2 MiB where the system offers them on request.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ait {

// Memory of this size comes straight from the system: glibc maps it anew for each result.
inline constexpr int64_t kFromSystem = int64_t{32} << 20;

// Asks for huge pages behind fresh memory that nobody has written yet. A result of some hundred MiB
// comes straight from the system, which otherwise clears and maps it 4 KiB at a time: that can cost
// more than computing it. Smaller memory is usually reused by the allocator, and left alone.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < kFromSystem) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  // Only a hint: where it is refused, small pages serve.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Lets the system clear and map fresh memory, which will be overwritten as a whole.
inline void touch_pages(char* begin, char* end) {
  constexpr int64_t kPage = 4096;
  for (volatile char* p = begin; p < end; p += kPage) *p = 0;
}

}  // namespace ait
