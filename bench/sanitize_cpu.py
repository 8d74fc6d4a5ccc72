"""Run the tests of the ops on C++ kernels that were compiled with address and undefined-behaviour sanitizers.

    python -m bench.sanitize_cpu                     # the widest vectors that this processor has
    python -m bench.sanitize_cpu --bits 256 128      # kernels for other processors too, which no other test here meets
    python -m bench.sanitize_cpu --plain --bits 128  # only other vectors; what else is given goes to pytest

Needs g++ on Linux. Leaks are not looked for: those of Python and torch at their end would hide ours.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("projgrad", "tests", "bench", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = (
    "test_gram",
    "test_project_out",
    "test_gram_solve",
    "test_feasible",
    "test_ops",
    "test_any_input",
    "test_large",
)
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
NATIVE = "not triton and not emulated and not kernel"  # what is left does not meet the extension
COMPILER = os.environ.get("CXX", "g++")


def build(folder: Path, bits: int | None, sanitized: bool) -> None:
    """Copy the repository into a folder and compile the extension there. bits: of its vectors, None: the widest."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, folder)
    link = SANITIZE if sanitized else ""
    flags = link + (f" -DPROJGRAD_SIMD_BYTES={bits // 8}" if bits else "")
    environment = os.environ | {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": link}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def library(name: str) -> str:
    """Return where the compiler keeps a library."""
    return subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(folder: Path, sanitized: bool, rest: list[str]) -> int:
    """Run the tests with the package of a folder; return the exit code."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "passive"}
    if sanitized:
        environment |= {
            "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so.6"))),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
    check = "import projgrad.kernels as kernels; assert kernels.extension(); print(kernels.extension(), flush=True)"
    subprocess.run([sys.executable, "-c", check], cwd=folder, env=environment, check=True)
    tests = [f"tests/ops/{name}.py" for name in TESTS if (folder / f"tests/ops/{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", NATIVE, *tests, *rest]
    return subprocess.run(command, cwd=folder, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize_cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", choices=(512, 256, 128), default=[None], help="width of vectors")
    parser.add_argument("--plain", action="store_true", help="without sanitizers")
    options, rest = parser.parse_known_args()
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        sys.exit("python -m bench.sanitize_cpu needs g++ on Linux")
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), bits, not options.plain)
            code = run(Path(folder), not options.plain, rest)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
