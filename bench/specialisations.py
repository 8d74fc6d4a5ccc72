"""The specialisations that the Triton kernels are compiled for ahead of time: one function per kernel, listed below.

Pointers are taken to be 16-byte divisible, as torch allocates them. Name in `divisible` the sizes and strides that are
multiples of 16 in the case at hand, and put a stride of 1 among the constants, as Triton does at run time: otherwise
loads are neither vectorised nor pipelined.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

DTYPES = ("fp32", "fp64", "bf16", "fp16")


class Specialisation(NamedTuple):
    """One kernel, compiled one way.

    types: of the pointers and of scalars other than int32 ("i64", "fp64").
    kind: "matrix" where the time goes into products on tensor cores; such a kernel must not spill, and must use wgmma
        for bfloat16 on sm_90. "other" otherwise.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    kind: str = "other"
    divisible: tuple[str, ...] = ()


def matrix(
    name: str,
    kernel: Any,
    types: dict[str, str],
    launch: dict[str, int],
    constants: dict[str, Any],
    divisible: Sequence[str],
) -> Specialisation:
    """Return the specialisation of a matrix kernel; `launch`: its tile, with num_warps and num_stages."""
    constants = {name: value for name, value in launch.items() if not name.startswith("num_")} | constants
    warps, stages = launch["num_warps"], launch["num_stages"]
    return Specialisation(name, kernel, types, constants, warps, stages, "matrix", tuple(divisible))


def gram() -> Iterator[Specialisation]:
    from projgrad.kernels.gram import DIRECTIONS, gram_kernel, gram_wide_kernel, tile
    from projgrad.kernels.partial_sums import add_partial_sums_kernel, shape

    ones, divisible = {"g_column": 1, "u_column": 1}, ("p", "per_split", "g_row", "u_row")
    for dtype, size in zip(DTYPES, (4, 8, 2, 2), strict=True):
        types = {"G": f"*{dtype}", "u": f"*{dtype}", "part": "*fp64", "todo": "*i1"}
        for n in (16, 32, 64, 128) if dtype != "fp64" else ():
            N, block, warps = tile(n, False, size)
            same = n <= N
            kind = "matrix" if N == 64 else "other"  # wgmma has 64 rows at least
            constants = ones | {"W": warps, "C": block * size // 64, "SAME": same, "WITH_K": True}
            for parts in (1, 2, 3) if dtype == "fp32" and n >= 64 else (3 if dtype == "fp32" else 1,):
                for M in (0, 1) if same else (0,):
                    yield Specialisation(
                        f"gram {dtype} n={n} m={M} parts={parts}", gram_kernel, types,
                        constants | {"M": M, "D": 1, "PARTS": parts}, warps, kind=kind, divisible=divisible,
                    )  # fmt: skip
            constants |= {"WITH_K": False, "M": DIRECTIONS, "D": DIRECTIONS, "PARTS": 1}
            yield Specialisation(
                f"gram {dtype} n={n} without K", gram_kernel, types, constants, warps, divisible=divisible
            )
        for n in (16, 32, 64):
            N, block, warps = tile(n, True, size)
            constants = ones | {"N": N, "BLOCK": block, "SAME": n <= N, "WITH_K": True, "PREDICATED": True}
            for M in (0, 1) if n <= N else (0,):
                yield Specialisation(
                    f"gram {dtype} float64 n={n} m={M}", gram_wide_kernel, types, constants | {"M": M, "D": 1}, warps,
                    divisible=divisible,
                )  # fmt: skip
    types = {"part": "*fp64", "total": "*fp64", "todo": "*i1"}
    for splits in (1, 4096):
        rows, block = shape(splits)
        for mirror in ("lower", "mean"):
            constants = {"ROWS": rows, "BLOCK": block, "MIRROR": mirror, "PREDICATED": True}
            yield Specialisation(f"sums of {splits} {mirror}", add_partial_sums_kernel, types, constants, 8)


def subtract() -> Iterator[Specialisation]:
    from projgrad.kernels.residual import BLOCK, check_residual_kernel
    from projgrad.kernels.subtract import subtract_kernel, tile

    for dtype, size in zip(DTYPES, (4, 8, 2, 2), strict=True):
        types = {"u": f"*{dtype}", "G": f"*{dtype}", "out": f"*{dtype}", "c": "*fp64", "part": "*fp64", "todo": "*i1"}
        for n in (1, 16, 64, 128, 512, 513):
            N, block, warps = tile(n, size)
            constants = {"N": N, "BLOCK": block, "ONCE": n <= N, "g_column": 1, "u_column": 1}
            for narrow in (False, True) if size == 2 else (False,):
                constants |= {"PREDICATED": not narrow, "NARROW": narrow}
                yield Specialisation(
                    f"subtract {dtype} n={n}{' in float32' if narrow else ''}", subtract_kernel, types,
                    dict(constants), warps, divisible=("p", "per_split", "g_row", "u_row"),
                )  # fmt: skip
    types = {name: "*fp64" for name in ("K", "r", "squares", "c", "b", "worst")} | {"rank": "*i64", "todo": "*i1"}
    types |= {"damping": "fp64", "limit": "fp64", "noise": "fp64", "smallest": "fp64"}
    constants = {"BLOCK": BLOCK, "CHOSEN": True, "COUNTED": True, "NARROW": True}
    yield Specialisation("check_residual", check_residual_kernel, types, constants)


FACTORS = ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")  # a and b of a layer


def linear_moments() -> Iterator[Specialisation]:
    from projgrad.kernels.linear_moments import GROUP, RUN, linear_moments_kernel, tile

    divisible = ("o", "i", "a_n", "a_t", "b_n", "b_t")
    for a, b in FACTORS:
        pointers = {"sums": "*fp32", "a": f"*{a}", "b": f"*{b}"}
        for t in (8, 512):
            for size in (64, 1024):
                constants = {"a_i": 1, "b_o": 1, "PRECISION": "parts", "GROUP": GROUP, "RUN": RUN}
                name, launch = f"linear_moments {a} {b} t={t} {size}", tile(size, size, t, a == b != "fp32")
                yield matrix(name, linear_moments_kernel, pointers, launch, constants, divisible)


def basis_project() -> Iterator[Specialisation]:
    from projgrad.kernels.basis_project import GROUP, basis_project_kernel, tile

    sizes = ("rows", "columns", "depth")
    strides = tuple(f"{name}_{axis}" for name in ("out", "base", "x", "y") for axis in ("l", "row", "k"))
    for D, M in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
        for subtract in (False, True):
            pointers = {"base": f"*{D}", "out": f"*{D}" if subtract else "*fp32"}
            pointers |= {"x": "*fp32" if subtract else f"*{D}", "y": f"*{M}"}
            unit = ("out_column", "base_column", "x_k", "y_k" if subtract else "y_column")  # y is M, or M transposed
            for size in (64, 1024):
                constants = dict.fromkeys(unit, 1) | {"SUBTRACT": subtract, "PRECISION": "parts", "GROUP": GROUP}
                divisible = [s for s in (*sizes, *strides, "out_split", "y_column") if s not in unit]
                name = f"basis_project {D} {M} {size}{' subtract' if subtract else ''}"
                launch = tile(size, size, D == M != "fp32" and not subtract)
                yield matrix(name, basis_project_kernel, pointers, launch, constants, divisible)


def feasible() -> Iterator[Specialisation]:
    from projgrad.kernels.feasible import WARPS, feasible_kernel, tile

    sizes = dict(zip(DTYPES, (4, 8, 2, 2), strict=True))
    for change, moments in (("fp32", "fp32"), ("fp64", "fp64"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16")):
        types = {name: f"*{change}" for name in ("d", "u", "out")} | {"part": "*fp64"}
        types |= {name: f"*{moments}" for name in ("total", "squares")}
        types |= dict.fromkeys(("root", "bound", "slack", "floor"), "fp64")
        constants = tile(sizes[change], sizes[moments])
        yield Specialisation(f"feasible {change} {moments}", feasible_kernel, types, constants, WARPS, divisible=("p",))


KERNELS = (gram, subtract, linear_moments, basis_project, feasible)


def specialisations(names: Sequence[str] = ()) -> Iterator[Specialisation]:
    """Yield the specialisations of the kernels with these names; of all where there are none."""
    for kernel in KERNELS:
        if not names or kernel.__name__ in names:
            yield from kernel()
