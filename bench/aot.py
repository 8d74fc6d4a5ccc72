"""Compile every kernel ahead of time, without a GPU, and show what came out: `python -m bench.aot [gram] [--arch 90]`.

The Triton kernels in the ways that `bench/specialisations.py` lists, and the CUDA kernels of `csrc/` where nvcc is
found. Fails on what does not compile, on registers that spill, and on a matrix product of bfloat16 on sm_90 that
is not done by wgmma.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.specialisations import Specialisation, specialisations

ARCHS = (80, 90, 100)
CSRC = Path(__file__).parent.parent / "csrc"
MATRIX = re.compile(r"\b(wgmma|mma|tcgen05)\.(?:mma|sync)[\w.:]*")
LOAD = re.compile(r"\bld\.global((?:\.[\w:]+)+)|\bcp\.async\.c[ag]\.shared\.global[^;]*?\], *(\w+)|\bcp\.async\.bulk")


@dataclass
class Code:
    """One compiled kernel, or why there is none."""

    name: str
    arch: int
    registers: int = 0
    shared: int = 0
    local: int = 0  # bytes a thread: spills, and arrays that did not fit
    matrix: Counter = field(default_factory=Counter)
    load: int = 0  # widest load from global memory, in bytes a thread; 0 where there is none
    instructions: int = 0
    faults: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        matrix = ", ".join(f"{count} {kind}" for kind, count in sorted(self.matrix.items())) or "-"
        numbers = [str(x) for x in (self.registers, self.shared, self.local)]
        return [self.name, f"sm_{self.arch}", *numbers, matrix, str(self.load or "-"), str(self.instructions)]


def width(load: re.Match) -> int:
    """Return the bytes that a load from global memory brings each thread; what TMA brings in bulk counts as 16."""
    kind, copied = load.groups()
    if copied:
        return int(copied, 0)
    if not kind:
        return 16
    bits = re.search(r"\.[bfsu](\d+)$", kind)
    vector = re.search(r"\.v(\d)", kind)
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


def text_sizes(cubin: bytes) -> dict[str, int]:
    """Return the bytes of instructions of every kernel, from the table of sections of the ELF file."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + k * size) for k in range(count)]
    start = sections[names][4]
    sizes = {cubin[start + s[0] : cubin.index(0, start + s[0])].decode(): s[5] for s in sections}
    return {name[6:]: size for name, size in sizes.items() if name.startswith(".text.")}


def inspect(ptx: str, cubin: bytes, arch: int) -> Iterator[Code]:
    """Yield every kernel: its resources from the cubin, its kinds of instructions from PTX.

    Disassembling the cubin instead would take 0.3 s.
    """
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    resources = {}
    for name, line in re.findall(r"^ *Function (\S+):\n(.*)", text, re.M):
        resources[name] = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    sizes = text_sizes(cubin)
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        name = re.match(r"\w+", part)[0]
        used = resources[name]
        code = Code(name, arch, used["REG"], used["SHARED"], used["STACK"] + used["LOCAL"])
        code.instructions = sizes[name] // 16  # with what pads the end
        code.load = max(map(width, LOAD.finditer(part)), default=0)
        for instruction in MATRIX.finditer(part):
            code.matrix[instruction[1] + (" bf16" if ".bf16" in instruction[0] else "")] += 1
        yield code


def compile_triton(case: Specialisation, arch: int) -> Code:
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in case.divisible]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return Code(case.name, arch, faults=[f"does not compile: {error!s:.500}"])
    (code,) = inspect(compiled.asm["ptx"], compiled.asm["cubin"], arch)
    code.name, code.shared = case.name, compiled.metadata.shared
    if code.local:
        code.faults.append(f"spills {code.local} bytes")
    multiplies_bf16 = "*bf16" in case.types.values() or any("bf16" in kind for kind in code.matrix)
    if case.kind == "matrix" and arch == 90 and multiplies_bf16 and not any("wgmma" in kind for kind in code.matrix):
        code.faults.append("multiplies bfloat16 without wgmma")
    return code


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def compile_cuda(file: Path, arch: int) -> list[Code]:
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O3", f"-arch=sm_{arch}", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        keep = ["--keep", "--keep-dir", folder]
        compiled = subprocess.run([nvcc(), "-cubin", *flags, *keep, "-o", cubin, file], capture_output=True, text=True)
        if compiled.returncode:
            return [Code(file.name, arch, faults=[f"does not compile: {compiled.stderr[-500:]}"])]
        codes = list(inspect(Path(folder, f"{file.stem}.ptx").read_text(), cubin.read_bytes(), arch))
    names = [code.name for code in codes]
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
    for code, name in zip(codes, names, strict=True):
        short = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name).rpartition("(")[0].replace(" >", ">")
        code.name = f"{short.replace('_kernel', '')} (CUDA)"
        if code.local:
            code.faults.append(f"spills {code.local} bytes")
    return sorted(codes, key=lambda code: code.name)


def job(case: Specialisation | Path, arch: int) -> list[Code]:
    return compile_cuda(case, arch) if isinstance(case, Path) else [compile_triton(case, arch)]


def show(codes: list[Code]) -> None:
    header = ["kernel", "arch", "registers", "shared", "local", "matrix instructions", "load", "instructions"]
    rows = [code.row() for code in codes]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title="Kernels, ahead of time; sizes in bytes, load: the widest of a thread")
    for name in header:
        table.add_column(name, justify="left" if name in ("kernel", "arch", "matrix instructions") else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="some of them only: gram, linear_dot, ...")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, times ten")
    parser.add_argument("--quick", action="store_true", help="leave out float16, which compiles as bfloat16 does")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    options = parser.parse_args()
    files = sorted(CSRC.glob("*.cu"))
    if files and not nvcc():
        print("nvcc was not found: the CUDA kernels are left out", file=sys.stderr)
        files = []
    files = [f for f in files if not options.kernels or f.stem.removesuffix("_cuda") in options.kernels]
    cases = [*files, *specialisations(options.kernels)]
    if options.quick:
        cases = [case for case in cases if isinstance(case, Path) or "*fp16" not in case.types.values()]
    global JOBS
    JOBS = [(case, arch) for case in cases for arch in options.arch]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        codes = [code for group in pool.map(numbered, range(len(JOBS))) for code in group]
    show(codes)
    faults = [f"{code.name} sm_{code.arch}: {fault}" for code in codes for fault in code.faults]
    if faults:
        print("\n".join(faults), file=sys.stderr)
    return bool(faults)


JOBS: list[tuple[Specialisation | Path, int]] = []  # kernels cannot be sent to a process, but are there after a fork


def numbered(index: int) -> list[Code]:
    return job(*JOBS[index])


if __name__ == "__main__":
    sys.exit(main())
