"""Run the tests of what is in C++, compiled with address and undefined-behaviour sanitizers.

    python -m bench.sanitize_cpu                         # the widest vectors that this processor has
    python -m bench.sanitize_cpu --bits 512 256 128      # kernels for other processors too, which no other test meets
    python -m bench.sanitize_cpu --plain --bits 256 128  # without sanitizers
    python -m bench.sanitize_cpu --short                 # two parametrizations of every test

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
    "ops/test_gram",
    "ops/test_project_out",
    "ops/test_gram_solve",
    "ops/test_feasible",
    "ops/test_ops",
    "ops/test_any_input",
    "ops/test_large",
    "recording/test_in_cpp",
    "recording/test_structure",
)
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
MARKED, NAMED = "not same_without_extension", "not triton and not emulated and not kernel and not level"
COMPILER = os.environ.get("CXX", "g++")


def build(folder: Path, sanitized: bool) -> None:
    """Copy the repository into a folder, and compile the extension there."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, folder)
    setup = folder / "setup.py"
    setup.write_text(setup.read_text().replace('"cxx": ["-O3"]', '"cxx": ["-O0"]'))  # compiles in half the time
    link = SANITIZE if sanitized else ""
    flags = f"{link} -DPROJGRAD_CHOOSE_SIMD"
    environment = os.environ | {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": link}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def library(name: str) -> str:
    """Return where the compiler keeps a library."""
    return subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(folder: Path, bits: int | None, sanitized: bool, short: bool, rest: list[str]) -> int:
    """Run the tests with the package of a folder; return the exit code. bits: of vectors, None: the widest."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    if bits is not None:
        environment["PROJGRAD_SIMD_BYTES"] = str(bits // 8)
    if short:
        environment["PROJGRAD_EXAMPLES"] = "0.1"
    if sanitized:
        environment |= {
            "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so.6"))),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
    check = (
        "from projgrad import kernels; from projgrad.recording.compiled import compiled; assert compiled; "
        "assert kernels.extension(); print(kernels.extension(), compiled, flush=True)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=folder, env=environment, check=True)
    tests = [f"tests/{name}.py" for name in TESTS]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", MARKED, "-k", NAMED, *(["--quick"] if short else [])]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests, *rest], cwd=folder, env=environment
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize_cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", choices=(512, 256, 128), default=[None], help="width of vectors")
    parser.add_argument("--plain", action="store_true", help="without sanitizers")
    parser.add_argument("--short", action="store_true", help="two parametrizations of every test")
    options, rest = parser.parse_known_args()
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        print("python -m bench.sanitize_cpu needs g++ on Linux")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), not options.plain)
        # From the first that fails on nothing is run.
        return next(
            filter(None, (run(Path(folder), bits, not options.plain, options.short, rest) for bits in options.bits)), 0
        )


if __name__ == "__main__":
    sys.exit(main())
