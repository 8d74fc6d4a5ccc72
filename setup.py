"""Builds, where there is a C++ compiler, projgrad._C: the C++ kernels always, the CUDA kernels when torch has CUDA and
a complete toolkit is found; and the module of csrc/recording.cpp for this release of torch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

Version = tuple[int, int]
TORCH = 2, 11  # where its stable ABI, as used here, begins

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError as missing:
    sys.exit(
        f"projgrad: building it needs {missing.name}, which is not installed. Run `pip install 'torch>=2.11' ninja "
        "'pybind11>=2.13'` first, or leave out --no-build-isolation"
    )
if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
    sys.exit(f"projgrad: building it needs torch 2.11 or later, and this is {torch.__version__}")


def nvcc_version(home: Path) -> Version | None:
    try:
        text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def runtime(home: Path, major: int) -> str | None:
    """libcudart.so of the toolkit or, as toolkits from wheels have no such link, the file that torch itself loads."""
    wheels = [Path(p, "nvidia", part) for p in sys.path for part in (f"cu{major}", "cuda_runtime")]
    for root in (home, *wheels):
        for name in ("libcudart.so", f"libcudart.so.{major}"):
            for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
                if (root / folder / name).exists():
                    return str(root / folder / name)
    return None


def toolkit() -> tuple[Path, Version, str]:
    """Where the toolkit is, its version and the runtime to link; LookupError with the reason why there is none."""
    if torch.version.cuda is None:
        raise LookupError("this torch has no CUDA")
    if cpp_extension.CUDA_HOME is None:
        raise LookupError("no CUDA toolkit found; set CUDA_HOME")
    # /usr/local where nvcc is /usr/local/bin/nvcc: a script in front of the toolkit, which is then in its usual place.
    homes = [Path(cpp_extension.CUDA_HOME), *([] if os.environ.get("CUDA_HOME") else [Path("/usr/local/cuda")])]
    home = next((h for h in homes if (h / "include" / "cuda_runtime.h").exists() and nvcc_version(h)), None)
    if home is None:
        raise LookupError(f"no nvcc with cuda_runtime.h in {cpp_extension.CUDA_HOME}; set CUDA_HOME")
    version, major = nvcc_version(home), int(torch.version.cuda.split(".")[0])
    if version[0] != major:
        raise LookupError(f"nvcc is {version[0]}.{version[1]}, but this torch was built with CUDA {torch.version.cuda}")
    library = runtime(home, major)
    if library is None:
        raise LookupError(f"no libcudart.so in {home} and no libcudart.so.{major} among the packages")
    return home, version, library


def extension():
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp") if path.name != "recording.cpp")
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # stable ABI of torch 2.11: one binary serves later ones
    options = {
        "include_dirs": [pybind11.get_include()],
        "depends": sorted(map(str, Path("csrc").glob("*.*h"))),
        "extra_compile_args": {"cxx": ["-O3"], "nvcc": ["-O3"]},
    }
    try:
        home, version, library = toolkit()
    except LookupError as reason:
        print(f"projgrad: building without CUDA kernels: {reason}", file=sys.stderr)
        return CppExtension("projgrad._C", sources, define_macros=macros, **options)
    # No look at the GPU of the build machine: the package must run on others.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX")
    cpp_extension.CUDA_HOME = str(home)
    sources += sorted(map(str, Path("csrc").glob("*.cu")))
    built = CUDAExtension("projgrad._C", sources, define_macros=[*macros, ("USE_CUDA", None)], **options)
    built.libraries.remove("cudart")
    built.extra_link_args.append(library)
    return built


def recording():
    """The one file that is written against torch's own headers, which no other release shares: it is in the name."""
    name = "_recording_" + re.sub(r"\W", "_", torch.__version__)
    options = {"define_macros": [("NAME", name)], "extra_compile_args": ["-O2"], "optional": True}
    return CppExtension(f"projgrad.{name}", ["csrc/recording.cpp"], include_dirs=[pybind11.get_include()], **options)


class Build(BuildExtension):
    """Goes on where `recording` does not compile: a later torch may have changed, and Python stands in."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception:
            if not ext.name.startswith("projgrad._recording"):
                raise
            print(f"projgrad: {ext.name} does not compile with this torch: steps take a little longer", file=sys.stderr)


def extensions() -> list:
    """The extensions; none without a compiler, which costs speed only. A compiler that fails is an error."""
    compiler = cpp_extension.get_cxx_compiler()
    # On Windows setuptools finds one that is not in PATH.
    if os.name == "nt" or any(map(shutil.which, shlex.split(compiler)[:1])):
        return [extension(), recording()]
    print(
        f"projgrad: installing without the C++ extension: there is no compiler {compiler!r}. Everything works, slower; "
        "to have the extension install g++, or name another compiler in CXX, and install projgrad again",
        file=sys.stderr,
    )
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
