"""The ops on the factors of one linear layer on a GPU: `python -m bench.layers`, `bench/gpu.sh layers`.

Every alternative is compared with float64 first; one that is wrong is not timed. Floor: the fewest flops of any route
at the measured matrix rate, or the fewest bytes at the measured bandwidth, whichever takes longer. On a CPU
`bench.routes` measures the two routes to the Gram matrix.
"""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import projgrad
from projgrad.ops import linear_cuda, linear_impl, reference
from projgrad.ops.cost import linear_route
from projgrad.ops.registration import FALLBACKS

from .command import Deadline, about_case, arguments, rows_of, run, started, title
from .harness import DEVICE, Ceilings, Clock, Contender, ceilings, measure, size_in_bytes
from .routes import gram_by

F32, BF16 = torch.float32, torch.bfloat16
COLUMNS = ("op", "size", "dtype", "contender", "ms", "ms_20", "ms_80", "host_ms", "rounds", "times_ours")
COLUMNS += ("percent_of_floor", "percent_of_rate", "rate", "unit", "extra_mb", "memory_ours", "error", "note")
KEY = COLUMNS[:4]
SIZES = [  # n, t, i, o
    (4, 512, 2048, 2048),
    (4, 512, 2048, 512),
    (4, 512, 2048, 8192),
    (4, 512, 8192, 2048),
    (16, 512, 2048, 2048),
    (16, 512, 2048, 8192),
    (32, 512, 768, 3072),
    (64, 1, 4096, 4096),
]
FLOAT = [("linear_gram", SIZES[4])]  # and what else is measured in float32
MOMENTS = SIZES[:1] + SIZES[-2:-1]
BASES = [(2048, 2048, 128), (4096, 4096, 512)]  # o, i, k
TINY, TINY_BASES = [(3, 5, 16, 24), (4, 1, 8, 8)], [(24, 16, 4)]
CHECKED = 8  # samples of a Gram matrix that are compared with float64


class Alternative(NamedTuple):
    """What an op is compared with.

    call: gets a [n, t, i], b [n, t, o] and u [o, i] for linear_dot, c [n] for linear_combine, else None; for
        basis_project D [o, i], M [i, k] and None.
    route: the route to the Gram matrix whose flops it needs.
    """

    call: Callable[[Tensor, Tensor, Tensor | None], object]
    route: str = ""


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y with a float32 result, x [..., r, k] and y [..., k, c] of any dtype."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return x.float() @ y.float()
    return (torch.mm if x.ndim == 2 else torch.bmm)(x, y, out_dtype=torch.float32)


def tokens_gram(a: Tensor, b: Tensor, _: None = None) -> Tensor:
    """Compute both token products [n t, n t] whole, as one would write it."""
    n, t, _ = a.shape
    A, B = a.flatten(0, 1), b.flatten(0, 1)
    return product(A, A.mT).mul_(product(B, B.mT)).view(n, t, n, t).sum((1, 3))


def gradients(a: Tensor, b: Tensor) -> Tensor:
    """Return all per-sample gradients [n, o i] in the dtype of the factors."""
    return torch.bmm(b.mT, a).flatten(1)


def gradients_gram(a: Tensor, b: Tensor, _: None = None) -> Tensor:
    G = gradients(a, b)
    return product(G, G.mT)


def forced(name: str, narrow: bool = False) -> Callable[[Tensor, Tensor, None], Tensor]:
    """Return a route of ours, whatever the cost model says; narrow: as where there is a direction in bfloat16."""

    def gram(a: Tensor, b: Tensor, _: None) -> Tensor:
        itemsize = max(a.dtype.itemsize, b.dtype.itemsize)
        options = {"itemsize": itemsize, "device": a.device.type, "narrow": narrow}
        route = linear_route(*a.shape, b.shape[2], only=name, **options)
        if not a.is_cuda:
            return gram_by(route, a, b)
        if name == "factors":
            return linear_cuda.token_gram(a[None], b[None], route.rows)[0]
        u = a.new_zeros((1, b.shape[2], a.shape[2])) if narrow else None
        return linear_cuda.gram_of_chunks(a[None], b[None], u, route)[0][0]

    return gram


def combined(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Add to a gradient in the dtype of the factors, as a step does."""
    out = torch.zeros(b.shape[2], a.shape[2], device=a.device, dtype=a.dtype)
    linear_impl.combine_of_layer_(out, a, b, c)
    return out


def products_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return product(a.flatten(0, 1), u.mT).mul_(b.flatten(0, 1)).view(a.shape[0], -1).sum(1)


def products_combine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (b * c.to(b.dtype)[:, None, None]).flatten(0, 1).mT @ a.flatten(0, 1)


def gradients_moments(a: Tensor, b: Tensor, _: None = None) -> tuple[Tensor, Tensor]:
    G = gradients(a, b).view(a.shape[0], b.shape[2], a.shape[2])
    return G.sum(0), G.square().sum(0)


# "library": what a user would write. "route", "kernel" and "composed" (of library products): pieces of projgrad, also
# where it would not choose them.
ALTERNATIVES: dict[str, dict[str, Alternative]] = {
    "linear_gram": {
        "projgrad": Alternative(lambda a, b, _: projgrad.linear_gram(a, b)),
        "route factors": Alternative(forced("factors"), "factors"),
        "route chunks": Alternative(forced("chunks"), "chunks"),
        "route chunks, 16 bits": Alternative(forced("chunks", narrow=True), "chunks"),
        "library, factors": Alternative(tokens_gram, "factors"),
        "library, gradients": Alternative(gradients_gram, "chunks"),
    },
    "linear_dot": {
        "projgrad": Alternative(lambda a, b, u: projgrad.linear_dot(a, b, u)),
        "library, factors": Alternative(products_dot),
    },
    "linear_combine": {
        "projgrad": Alternative(combined),
        "library, factors": Alternative(products_combine),
    },
    "linear_moments": {
        "projgrad": Alternative(lambda a, b, _: projgrad.linear_moments(a, b)),
        "composed": Alternative(lambda a, b, _: FALLBACKS["linear_moments_pass"](a, b)),
        "library, gradients": Alternative(gradients_moments),
    },
    "basis_project": {
        "projgrad": Alternative(lambda D, M, _: projgrad.basis_project(D, M)),
        "library": Alternative(lambda D, M, _: D - (D @ M) @ M.mT),
    },
}


def inputs(n: int, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a, b with samples of different length, u and c."""
    torch.manual_seed(0)
    a = torch.randn(n, t, i, device=DEVICE).to(dtype)
    b = (torch.randn(n, t, o, device=DEVICE) * torch.logspace(-4, -1, n, device=DEVICE)[:, None, None]).to(dtype)
    return a, b, torch.randn(o, i, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE, dtype=torch.float64)


def operands(op: str, size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return what an `Alternative` gets, and how many bytes it reads and writes at least."""
    if op == "basis_project":
        o, i, k = size
        torch.manual_seed(0)
        D = torch.randn(o, i, device=DEVICE).to(dtype)
        M = torch.linalg.qr(torch.randn(i, k, device=DEVICE)).Q.to(dtype)
        return D, M, None, 2 * size_in_bytes(D) + size_in_bytes(M)
    a, b, u, c = inputs(*size, dtype)
    weights = {"linear_dot": 1, "linear_combine": 1, "linear_moments": 2}.get(op, 0)  # tensors like the weight
    return a, b, {"linear_dot": u, "linear_combine": c}.get(op), size_in_bytes(a, b) + weights * size_in_bytes(u)


def lengths(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ_t ‖a_t‖ ‖b_t‖ [n] in float64."""
    x, y = (torch.linalg.vector_norm(z, dim=2, dtype=F32).double() for z in (a, b))
    return (x * y).sum(1)


def checks(op: str, a: Tensor, b: Tensor, other: Tensor | None):
    """Return a function of a result that gives its error, in units that rounding should not exceed."""
    if op == "linear_gram":
        samples = torch.linspace(0, a.shape[0] - 1, min(CHECKED, a.shape[0]), device=DEVICE).round().long()
        exact, size = reference.linear_gram(a[samples], b[samples]), lengths(a, b)[samples]
        return lambda K: ((K[samples][:, samples].double() - exact).abs() / size[:, None] / size).max()
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
        results = result if isinstance(result, tuple) else (result,)
        return torch.stack([(x.double() - e).norm() / e.norm() for x, e in zip(results, exact, strict=True)]).max()

    return worst


def flops(op: str, size: tuple[int, ...], route: str) -> float:
    """Return the flops of a route, or of the cheapest where none is named."""
    if op == "basis_project":
        o, i, k = size
        return 4 * o * i * k
    n, t, i, o = size
    if op == "linear_gram":
        routes = [route] if route else ["factors", "chunks"]
        return min(linear_route(n, t, i, o, only=name).flops for name in routes)
    return 4 * n * i * o if op == "linear_moments" and t == 1 else 2 * n * t * i * o


def layer_rows(op: str, size: tuple[int, ...], dtype: torch.dtype, most: Ceilings, clock: Clock) -> Iterator[dict]:
    """Yield a row for every alternative of one op, measured in turn."""
    a, b, other, moved = operands(op, size, dtype)
    check = checks(op, a, b, other)
    contenders, errors = {}, {}
    limit = 1e-6 if op in ("linear_gram", "linear_dot") else 1e-5 + (torch.finfo(BF16).eps if dtype == BF16 else 0.0)
    for name, alternative in ALTERNATIVES[op].items():
        contender = contenders[name] = Contender(lambda alternative=alternative: alternative.call(a, b, other))
        errors[name] = contender.attempt(lambda c=contender: float(check(c.call())))
        allowed = 0.05 if name.startswith("library") else 1e-4 if name.endswith("16 bits") else limit
        if errors[name] is not None and not errors[name] <= allowed:
            contender.note = f"wrong: error {errors[name]:.1e}"
    measure(contenders, clock, seconds=0.25)
    ours = contenders["projgrad"].columns()
    floor = max(flops(op, size, "") / most.rate(dtype), moved / most.copy)
    for name, contender in contenders.items():
        row = {**about_case(op, size, dtype), "contender": name, "error": errors[name], **contender.columns()}
        if row["ms"]:
            rate = flops(op, size, ALTERNATIVES[op][name].route) / (1e-3 * row["ms"])
            row |= {"percent_of_floor": 1e5 * floor / row["ms"], "percent_of_rate": 100 * rate / most.rate(dtype)}
            row |= {"rate": rate / 1e12, "unit": "TFLOP/s"}
            row["times_ours"] = row["ms"] / ours["ms"] if ours["ms"] else None
            row["memory_ours"] = row["extra_mb"] / max(ours["extra_mb"] or 0.0, 1e-3)
        yield row


def plan(tiny: bool, only: str, most: Ceilings, clock: Clock) -> Iterator[tuple]:
    """Yield what is measured: sizes in order of interest, in each the ops, in each the dtypes."""
    products = ("linear_gram", "linear_dot", "linear_combine")
    cases = [(op, size, BF16) for size in (TINY if tiny else SIZES) for op in products]
    cases += [(op, TINY[0] if tiny else size, F32) for op, size in FLOAT]
    cases += [("linear_moments", size, BF16) for size in (TINY if tiny else MOMENTS)]
    cases += [("basis_project", size, BF16) for size in (TINY_BASES if tiny else BASES)]
    for op, size, dtype in cases:
        about = about_case(op, size, dtype)
        if only in title(about):
            yield about, lambda op=op, size=size, dtype=dtype: layer_rows(op, size, dtype, most, clock)


def profile(op: str, size: str, dtype: str, name: str) -> None:
    """Print where the time of one call goes."""
    a, b, other, _ = operands(op, tuple(map(int, size.split("x"))), getattr(torch, dtype))
    call = ALTERNATIVES[op][name].call
    for _ in range(3):
        call(a, b, other)
    with torch.profiler.profile() as profiler:
        call(a, b, other)
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


def main() -> None:
    args = arguments(__doc__, ("--profile", {"nargs": 4, "metavar": ("OP", "SIZE", "DTYPE", "CONTENDER")}))
    if args.device == "cpu":
        raise SystemExit("the ops of a layer are measured on a GPU; for a CPU there is python -m bench.routes")
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
