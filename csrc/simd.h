// Compiles KERNEL_FILE once per instruction set, each in a namespace of its own, so that one binary runs on any
// processor and uses the widest vectors it finds. Includers define KERNEL_FILE and call through SIMD_DISPATCH.

#define SIMD_BYTES 16
#define SIMD_NAME baseline
#include KERNEL_FILE
#undef SIMD_BYTES
#undef SIMD_NAME

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SIMD_BYTES 32
#define SIMD_NAME avx2
#include KERNEL_FILE
#undef SIMD_BYTES
#undef SIMD_NAME
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#define SIMD_BYTES 64
#define SIMD_NAME avx512
#include KERNEL_FILE
#undef SIMD_BYTES
#undef SIMD_NAME
#pragma GCC pop_options

#define SIMD_DISPATCH(...)                   \
  do {                                       \
    const int bytes = simd_bytes();          \
    if (bytes == 64) avx512::__VA_ARGS__;    \
    else if (bytes == 32) avx2::__VA_ARGS__; \
    else baseline::__VA_ARGS__;              \
  } while (0)
#else
#define SIMD_DISPATCH(...) baseline::__VA_ARGS__
#endif
