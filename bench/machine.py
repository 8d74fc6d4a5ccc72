"""What this machine has, and what the GPU benchmarks miss on it: `python -m bench.machine [--arch]`.

projgrad is not imported: its extension may not be built yet, or be broken.
"""

import importlib.metadata
import importlib.util
import shutil
import sys

import torch

OPTIONAL = {
    "rich": "the tests of tables, the ahead-of-time compilation test",
    "transformers": "tests on its models; whole steps then run on the repository's own decoder",
    "peft": "tests on adapters",
    "xdist": "tests in several processes",
    "sklearn": "the tests of the comparison",
    "matplotlib": "pictures",
    "pytest_benchmark": "nothing on a GPU",
}
NEEDED = {"triton": "every Triton kernel", "pytest": "the part `tests`", "pybind11": "the compiled extension"}
TOOLS = {
    "nvcc": "the CUDA part of the extension",
    "ninja": "a fast build",
    "c++": "the extension",
    "compute-sanitizer": "the part `sanitize`",
}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def arch() -> str:
    """Return the compute capabilities of all GPUs here, as TORCH_CUDA_ARCH_LIST wants them."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def main() -> int:
    if "--arch" in sys.argv:
        print(arch())
        return 0
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__} (CUDA {torch.version.cuda})", end=", ")
    print(", ".join(f"{name} {version(name)}" for name in ("triton", "numpy", "transformers")))
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0] / 2**30
        print(f"cuda:{i} {about.name}, {arch()}, {free:.1f} of {about.total_memory / 2**30:.1f} GiB free")
    for name, use in {**NEEDED, **OPTIONAL}.items():
        if importlib.util.find_spec(name) is None:
            print(f"missing: {name}; without it: no {use}" if name in NEEDED else f"missing: {name}; skipped: {use}")
    for name, use in TOOLS.items():
        if shutil.which(name) is None:
            print(f"missing: {name}, for {use}")
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
