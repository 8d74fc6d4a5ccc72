// The Python module: importing it registers the kernels. Only pybind11 here, whose headers do not mix with the stable
// ones.

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of projgrad; importing the module registers them with torch.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = std::string(__VERSION__);
        info["torch_target"] = "2.11";
#ifdef USE_CUDA
        info["cuda"] = true;
#else
        info["cuda"] = false;
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
        __builtin_cpu_init();
        info["simd"] = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? "avx512"
                       : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")        ? "avx2"
                                                                                                : "baseline";
#else
        info["simd"] = "baseline";
#endif
        return info;
      },
      "How the extension was built and which instruction set it uses on this machine.");
}
