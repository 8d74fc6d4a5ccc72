// Which vectors this processor has: decided at run time, in one place.
#pragma once

#ifdef PROJGRAD_CHOOSE_SIMD
#include <cstdlib>
#endif

namespace projgrad {

// Bytes of the widest vectors that the kernels may use here.
inline int simd_bytes() {
#ifdef PROJGRAD_CHOOSE_SIMD  // a build for tests: the kernels of other processors too
  if (const char* bytes = std::getenv("PROJGRAD_SIMD_BYTES")) return std::atoi(bytes);
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512) return 64;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
  return 16;
}

}  // namespace projgrad
