// What is said about devices. Plain C++, so that it is tested without a GPU.
#pragma once

#include <cstdlib>
#include <string>

namespace ait::cuda {

// Where a tensor is: a CUDA device, or none (negative).
inline std::string place_text(int device) {
  return device < 0 ? "no CUDA device" : "cuda:" + std::to_string(device);
}

inline std::string wrong_device(const std::string& name, const std::string& argument, int expected,
                                int got) {
  return name + ": expected " + argument + " on " +
         (expected < 0 ? "a CUDA device" : place_text(expected)) + ", got a tensor on " +
         place_text(got);
}

// Whether kernels for `architectures`, such as "8.0, 9.0, 12.0 or newer", run on a device of this
// capability: those of the same major version that are no newer, and whatever is "or newer". What
// is for one architecture alone has an "a" behind its number.
inline bool is_built_for(const std::string& architectures, int major, int minor) {
  for (size_t begin = 0; begin < architectures.size();) {
    size_t end = architectures.find(", ", begin);
    if (end == std::string::npos) end = architectures.size();
    const std::string name = architectures.substr(begin, end - begin);
    const size_t point = name.find('.');
    const int own_major = std::atoi(name.c_str());
    const int own_minor = point == std::string::npos ? 0 : std::atoi(name.c_str() + point + 1);
    const bool forward = name.find("or newer") != std::string::npos;
    const bool alone = name.find('a') != std::string::npos;
    if (own_major == major && (alone ? own_minor == minor : own_minor <= minor)) return true;
    if (forward && !alone && own_major < major) return true;
    begin = end + 2;
  }
  return false;
}

inline std::string unsupported_device(const std::string& architectures, int device, int major,
                                      int minor) {
  return "ait: expected a device of compute capability " + architectures +
         ", for which the CUDA kernels were built, got " + place_text(device) + " of capability " +
         std::to_string(major) + "." + std::to_string(minor) +
         (major < 8
              ? "; the kernels need 8.0 or newer: build ait with AIT_CUDA=0, and the reference "
                "operators run there"
              : "; build ait on this machine, or name the capability in TORCH_CUDA_ARCH_LIST");
}

}  // namespace ait::cuda
