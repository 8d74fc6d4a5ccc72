// The Python module: importing it registers the kernels. Only pybind11 here, whose headers do not mix with the stable
// ones.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu.h"

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
        info["simd"] = std::to_string(8 * projgrad::simd_bytes()) + " bit";
        return info;
      },
      "How the extension was built and which instruction set it uses on this machine.");
}
