"""Compile every Triton kernel ahead of time, without a GPU, and show what came out: `python -m bench.aot [--arch 90]`.

Fails on a kernel that does not compile, and on one that spills registers; gram_solve alone may (triton 3.6 keeps less
of its matrix in registers than 3.9): it waits for its own pivots, not for memory.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from projgrad.kernels.gram import gram_kernel, tile
from projgrad.kernels.gram_solve import WARPS as SOLVE_WARPS
from projgrad.kernels.gram_solve import gram_solve_kernel
from projgrad.kernels.subtract import BLOCK, ROWS, WARPS, subtract_kernel

DTYPES = ("fp32", "fp64", "bf16", "fp16")


def specialisations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """name, kernel, types of the pointers (everything else is int32 or int64), constants, warps."""
    for dtype in DTYPES:
        pointers = {"G": f"*{dtype}", "u": f"*{dtype}", "K": "*fp64", "v": "*fp64", "todo": "*i1"}
        for wide in {dtype == "fp64", True}:
            for n in (16, 32, 64, 128):
                N, block, diagonal, warps = tile(n, wide)
                constants = {"N": N, "M": 1, "BLOCK": block, "WIDE": wide, "DIAGONAL": diagonal, "WITH_K": True}
                constants |= {"PREDICATED": wide, "PRECISION": "ieee"}
                yield f"gram {dtype}{' wide' if wide else ''} n={n}", gram_kernel, pointers, constants, warps
        pointers = {"u": f"*{dtype}", "G": f"*{dtype}", "out": f"*{dtype}", "todo": "*i1"}
        pointers |= {"c": "*fp64", "r": "*fp64", "squares": "*fp64"}
        for predicated in (False, True):
            constants = {"N": ROWS, "BLOCK": BLOCK, "PREDICATED": predicated}
            yield f"subtract {dtype}{' predicated' if predicated else ''}", subtract_kernel, pointers, constants, WARPS
    for dtype in ("fp32", "fp64"):
        pointers = {name: f"*{dtype}" for name in ("K", "b", "x")} | {"factor": "*fp64", "y": "*fp64", "rank": "*i64"}
        pointers |= {"damping": "fp64", "rtol": "fp64"}
        for N in (16, 32, 64):
            yield f"gram_solve {dtype} n={N}", gram_solve_kernel, pointers, {"N": N, "M": 1}, SOLVE_WARPS


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, arch: int) -> Any:
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory (spills, arrays that did not fit), from the code's own header."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    fields = dict(field.split(":")[:2] for field in text.split() if field.count(":") == 1)
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, times ten")
    table = Table("kernel", "arch", "registers", "local bytes", "shared bytes", title="Triton kernels, ahead of time")
    spilled = []
    for name, kernel, types, constants, warps in specialisations():
        for arch in parser.parse_args().arch:
            code = compiled(kernel, types, constants, warps, arch)
            registers, local = resources(code.asm["cubin"])
            if local and kernel is not gram_solve_kernel:
                spilled.append(f"{name} sm_{arch}: {local} bytes")
            table.add_row(name, f"sm_{arch}", str(registers), str(local), str(code.metadata.shared))
    Console().print(table)
    if spilled:
        print("spills:", *spilled, sep="\n  ", file=sys.stderr)
    return bool(spilled)


if __name__ == "__main__":
    sys.exit(main())
