"""Builds projgrad._C: the C++ kernels always, the CUDA kernels when torch has CUDA and a toolkit is found."""

import os
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

kernels = sorted(map(str, Path("csrc").glob("*.cu")))
cuda = bool(kernels) and torch.version.cuda is not None and CUDA_HOME is not None
sources = sorted(map(str, Path("csrc").glob("*.cpp"))) + (kernels if cuda else [])
if cuda:  # no look at the GPU of the build machine: the package must run on others
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # stable ABI of torch 2.11: one binary serves all later ones

setup(
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "projgrad._C",
            sources,
            include_dirs=[pybind11.get_include()],
            define_macros=[*macros, ("USE_CUDA", None)] if cuda else macros,
            extra_compile_args={"cxx": ["-O3"], "nvcc": ["-O3"]},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
