"""The ops on the factors of one linear layer on a GPU: `bench/gpu.sh layers`, or `python -m bench.gpu_layers`.

Every alternative is compared with float64 first; one that is wrong is not timed. Floor: the fewest flops of any route
at the measured matrix rate, or the fewest bytes at the measured bandwidth, whichever takes longer.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import projgrad
from projgrad.ops import reference
from projgrad.ops.cost import linear_route

from .gpu_alternatives import ALTERNATIVES, Alternative
from .gpu_measure import (
    DEVICE,
    Ceilings,
    Clock,
    Contender,
    Deadline,
    arguments,
    ceilings,
    measure,
    rows_of,
    run,
    size_in_bytes,
    started,
    title,
)
from .gpu_rows import meets

F32, BF16 = torch.float32, torch.bfloat16
COLUMNS = ("op", "size", "dtype", "contender", "ms", "ms_20", "ms_80", "host_ms", "rounds", "times_ours", "target")
COLUMNS += ("met", "percent_of_floor", "percent_of_rate", "rate", "unit", "extra_mb", "memory_ours", "error", "note")
KEY = COLUMNS[:4]
SIZES = [  # n, t, i, o: the sizes with a target first
    (64, 128, 2048, 2048),
    (16, 512, 2048, 2048),
    (64, 128, 768, 768),
    (4, 2048, 4096, 4096),
    (64, 1, 4096, 4096),
    (256, 1, 1024, 1024),
    (16, 32, 1024, 1024),
    (4, 512, 2048, 8192),
    (13, 197, 771, 1030),
]
TARGETS = {size: [("percent_of_rate", ">=", 50.0)] for size in SIZES[:2]}  # of the kernel for factors, in bfloat16
BASES = [(2048, 2048, 128), (4096, 4096, 512), (8192, 2048, 256)]  # o, i, k
TINY, TINY_BASES = [(3, 5, 16, 24), (4, 1, 8, 8)], [(24, 16, 4)]
CHECKED = 8  # samples of a Gram matrix that are compared with float64


def inputs(n: int, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b with samples of different length, u and c."""
    torch.manual_seed(0)
    a = torch.randn(n, t, i, device=DEVICE).to(dtype)
    b = (torch.randn(n, t, o, device=DEVICE) * torch.logspace(-4, -1, n, device=DEVICE)[:, None, None]).to(dtype)
    return a, b, torch.randn(o, i, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE, dtype=torch.float64)


def lengths(a: Tensor, b: Tensor) -> Tensor:
    """Σ_t ‖a_t‖ ‖b_t‖ [n] in float64."""
    return sum_of(torch.linalg.vector_norm(a, dim=2, dtype=F32), torch.linalg.vector_norm(b, dim=2, dtype=F32))


def sum_of(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y.double()).sum(1)


def checks(op: str, a: Tensor, b: Tensor, other: Tensor | None):
    """A function of a result that gives its error, in units that rounding should not exceed."""
    if op == "linear_gram":
        some = torch.linspace(0, a.shape[0] - 1, min(CHECKED, a.shape[0]), device=DEVICE).round().long()
        exact, size = reference.linear_gram(a[some], b[some]), lengths(a, b)[some]
        return lambda K: ((K[some][:, some].double() - exact).abs() / size[:, None] / size).max()
    if op == "linear_dot":
        exact, size = reference.linear_dot(a, b, other[None])[:, 0], lengths(a, b) * other.double().norm()
        return lambda v: ((v.double() - exact).abs() / size).max()
    if op == "linear_combine":
        exact = (reference.linear_combine(a.double(), b.double(), other[None])[0],)
    elif op == "linear_moments":
        exact = reference.linear_moments(a.double(), b.double())
    else:
        exact = (a.double() - (a.double() @ b.double()) @ b.double().mT,)

    def worst(result: Tensor | tuple[Tensor, ...]) -> Tensor:
        found = result if isinstance(result, tuple) else (result,)
        return torch.stack([(x.double() - e).norm() / e.norm() for x, e in zip(found, exact, strict=True)]).max()

    return worst


def flops(op: str, size: tuple[int, ...], route: str) -> float:
    """Of a route, or of the cheapest."""
    if op == "basis_project":
        o, i, k = size
        return 4 * o * i * k
    n, t, i, o = size
    if op == "linear_gram":
        routes = [route] if route else ["factors", "chunks"]
        return min(linear_route(n, t, i, o, only=some).flops for some in routes)
    return 4 * n * i * o if op == "linear_moments" and t == 1 else 2 * n * t * i * o


def layer_rows(op: str, size: tuple[int, ...], dtype: torch.dtype, most: Ceilings, clock: Clock) -> Iterator[dict]:
    if op == "basis_project":
        o, i, k = size
        torch.manual_seed(0)
        a = torch.randn(o, i, device=DEVICE).to(dtype)
        b = torch.linalg.qr(torch.randn(i, k, device=DEVICE)).Q.to(dtype)
        other, moved = None, 2 * size_in_bytes(a) + size_in_bytes(b)
    else:
        a, b, u, c = inputs(*size, dtype)
        other = {"linear_dot": u, "linear_combine": c}.get(op)
        moved = size_in_bytes(a, b, *([u] if op == "linear_dot" else []))
        moved += {"linear_combine": 1, "linear_moments": 2}.get(op, 0) * size_in_bytes(u)
    check = checks(op, a, b, other)
    contenders, errors = {}, {}
    limit = 1e-6 if op in ("linear_gram", "linear_dot") else 1e-5 + (torch.finfo(BF16).eps if dtype == BF16 else 0.0)
    for name, alternative in ALTERNATIVES[op].items():
        one = contenders[name] = Contender(lambda alternative=alternative: alternative.call(a, b, other))
        errors[name] = one.attempt(lambda one=one: float(check(one.call())))
        most_wrong = 0.05 if name.startswith("library") else limit
        if errors[name] is not None and not errors[name] <= most_wrong:
            one.note = f"wrong: error {errors[name]:.1e}"
    measure(contenders, clock, seconds=0.25)
    ours = contenders["projgrad"].columns()
    floor = max(flops(op, size, "") / most.rate(dtype), moved / most.copy)
    for name, contender in contenders.items():
        row = {"op": op, "size": "x".join(map(str, size)), "dtype": str(dtype).removeprefix("torch.")}
        row |= {"contender": name, "error": errors[name], **contender.columns()}
        if row["ms"]:
            found = flops(op, size, ALTERNATIVES[op][name].route) / (1e-3 * row["ms"])
            row |= {"percent_of_floor": 1e5 * floor / row["ms"], "percent_of_rate": 100 * found / most.rate(dtype)}
            row |= {"rate": found / 1e12, "unit": "TFLOP/s"}
            row["times_ours"] = row["ms"] / ours["ms"] if ours["ms"] else None
            row["memory_ours"] = row["extra_mb"] / max(ours["extra_mb"] or 0.0, 1e-3)
        wanted = op == "linear_gram" and name == "kernel, factors" and dtype == BF16
        yield row | meets(row, TARGETS.get(size, []) if wanted else [])


def plan(tiny: bool, only: str, most: Ceilings, clock: Clock) -> Iterator[tuple]:
    """Sizes in order of interest, in each the ops, in each the dtypes."""
    ops = [op for op in ALTERNATIVES if op != "basis_project"]
    cases = [(op, size, dtype) for size in (TINY if tiny else SIZES) for op in ops for dtype in (BF16, F32)]
    if hasattr(projgrad, "basis_project"):
        bases = TINY_BASES if tiny else BASES
        cases += [("basis_project", size, dtype) for size in bases for dtype in (BF16, F32)]
    else:
        print("basis_project: projgrad has no such op", flush=True)
    for op, size, dtype in cases:
        about = {"op": op, "size": "x".join(map(str, size)), "dtype": str(dtype).removeprefix("torch.")}
        if only in title(about):
            yield about, lambda op=op, size=size, dtype=dtype: layer_rows(op, size, dtype, most, clock)


def profile(op: str, size: str, dtype: str, name: str) -> None:
    """Where the time of one call goes."""
    numbers = tuple(map(int, size.split("x")))
    a, b, u, c = inputs(*numbers, getattr(torch, dtype))
    alternative: Alternative = ALTERNATIVES[op][name]
    other = {"linear_dot": u, "linear_combine": c}.get(op)
    for _ in range(3):
        alternative.call(a, b, other)
    with torch.profiler.profile() as found:
        alternative.call(a, b, other)
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


def main() -> None:
    args = arguments(__doc__, ("--profile", {"nargs": 4, "metavar": ("OP", "SIZE", "DTYPE", "CONTENDER")}))
    if args.profile:
        return profile(*args.profile)
    deadline, clock = Deadline(args.seconds), Clock()
    rows = rows_of("layers", args, COLUMNS, KEY)
    most = ceilings(clock, args.tiny)
    for row in most.rows():
        rows.add(row)
    sys.exit(run(plan(args.tiny, args.only, most, clock), rows, deadline))


if __name__ == "__main__":
    started(main)
