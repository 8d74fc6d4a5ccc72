"""The ops on the factors of one linear layer against library calls: their contenders, their truth, their floors."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import linear_cuda, linear_impl, reference
from ...ops.basis_project import basis_project
from ...ops.cost import GramRoute, linear_route
from ...ops.linear import linear_dot, linear_gram, linear_moments
from ...ops.registration import FALLBACKS
from .harness import Ceilings, Clock, Contender, measure, size_in_bytes
from .limits import error_limit, result_limit
from .report import about_case

F32 = torch.float32
CHECKED = 8  # samples of a Gram matrix that are compared with float64


class Alternative(NamedTuple):
    """What an op is compared with.

    call: gets a [n, t, i], b [n, t, o] and u [o, i] for linear_dot, c [n] for linear_combine, else None; for
        basis_project D [o, i], M [i, k] and None.
    route: the route to the Gram matrix whose flops it needs.
    """

    call: Callable[[Tensor, Tensor, Tensor | None], object]
    route: str = ""


def gram_by(route: GramRoute, a: Tensor, b: Tensor) -> Tensor:
    """Return K [n, n] of a [n, t, i] and b [n, t, o] by this route, whatever the cost model says."""
    if route.name == "factors":
        return linear_impl.token_gram(a, b, False, route.rows)
    return linear_impl.gram_of_chunks(a, b, b.new_empty(0, b.shape[2], a.shape[2]), False, route)[0]


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y in float32 or better, x [..., r, k] and y [..., k, c] of any dtype."""
    if x.element_size() > 2:
        return x @ y
    if not x.is_cuda:
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
        "projgrad": Alternative(lambda a, b, _: linear_gram(a, b)),
        "route factors": Alternative(forced("factors"), "factors"),
        "route chunks": Alternative(forced("chunks"), "chunks"),
        "route chunks, 16 bits": Alternative(forced("chunks", narrow=True), "chunks"),
        "library, factors": Alternative(tokens_gram, "factors"),
        "library, gradients": Alternative(gradients_gram, "chunks"),
    },
    "linear_dot": {
        "projgrad": Alternative(lambda a, b, u: linear_dot(a, b, u)),
        "library, factors": Alternative(products_dot),
    },
    "linear_combine": {
        "projgrad": Alternative(combined),
        "library, factors": Alternative(products_combine),
    },
    "linear_moments": {
        "projgrad": Alternative(lambda a, b, _: linear_moments(a, b)),
        "composed": Alternative(lambda a, b, _: FALLBACKS["linear_moments_pass"](a, b)),
        "library, gradients": Alternative(gradients_moments),
    },
    "basis_project": {
        "projgrad": Alternative(lambda D, M, _: basis_project(D, M)),
        "library": Alternative(lambda D, M, _: D - (D @ M) @ M.mT),
    },
}


def inputs(n: int, t: int, i: int, o: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a, b with samples of different length, u and c."""
    torch.manual_seed(0)
    a = torch.randn(n, t, i, device=device).to(dtype)
    b = (torch.randn(n, t, o, device=device) * torch.logspace(-4, -1, n, device=device)[:, None, None]).to(dtype)
    return a, b, torch.randn(o, i, device=device).to(dtype), torch.randn(n, device=device, dtype=torch.float64)


def operands(
    op: str, size: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return what an `Alternative` gets, and how many bytes it reads and writes at least."""
    if op == "basis_project":
        o, i, k = size
        torch.manual_seed(0)
        D = torch.randn(o, i, device=device).to(dtype)
        M = torch.linalg.qr(torch.randn(i, k, device=device)).Q.to(dtype)
        return D, M, None, 2 * size_in_bytes(D) + size_in_bytes(M)
    a, b, u, c = inputs(*size, dtype, device)
    weights = {"linear_dot": 1, "linear_combine": 1, "linear_moments": 2}.get(op, 0)  # tensors like the weight
    return a, b, {"linear_dot": u, "linear_combine": c}.get(op), size_in_bytes(a, b) + weights * size_in_bytes(u)


def lengths(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ_t ‖a_t‖ ‖b_t‖ [n] in float64."""
    x, y = (torch.linalg.vector_norm(z, dim=2, dtype=torch.promote_types(z.dtype, F32)).double() for z in (a, b))
    return (x * y).sum(1)


def checks(op: str, a: Tensor, b: Tensor, other: Tensor | None):
    """Return a function of a result that gives its error, in units that rounding should not exceed."""
    if op == "linear_gram":
        samples = torch.linspace(0, a.shape[0] - 1, min(CHECKED, a.shape[0]), device=a.device).round().long()
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


def layer_rows(
    op: str, size: tuple[int, ...], dtype: torch.dtype, most: Ceilings, clock: Clock, **how: float
) -> Iterator[dict]:
    """Yield a row for every alternative of one op, measured in turn; how: as `measure`."""
    a, b, other, moved = operands(op, size, dtype, clock.device)
    check = checks(op, a, b, other)
    contenders, errors = {}, {}
    limit = error_limit(1e-6, dtype) if op in ("linear_gram", "linear_dot") else result_limit(1e-5, dtype)
    for name, alternative in ALTERNATIVES[op].items():
        contender = contenders[name] = Contender(lambda alternative=alternative: alternative.call(a, b, other))
        errors[name] = contender.attempt(lambda c=contender: float(check(c.call())))
        allowed = 0.05 if name.startswith("library") else 1e-4 if name.endswith("16 bits") else limit
        if errors[name] is not None and not errors[name] <= allowed:
            contender.note = f"wrong: error {errors[name]:.1e}"
    measure(contenders, clock, **({"seconds": 0.25} | how))
    ours = contenders["projgrad"].columns()
    floor = max(flops(op, size, "") / most.rate(dtype), moved / most.copy)
    for name, contender in contenders.items():
        row = {**about_case(op, size, dtype), "contender": name, "error": errors[name], **contender.columns()}
        row["times"] = contender.device_ms
        if row["ms"]:
            rate = flops(op, size, ALTERNATIVES[op][name].route) / (1e-3 * row["ms"])
            row |= {"percent_of_floor": 1e5 * floor / row["ms"], "percent_of_rate": 100 * rate / most.rate(dtype)}
            row |= {"rate": rate / 1e12, "unit": "TFLOP/s"}
            row["times_ours"] = row["ms"] / ours["ms"] if ours["ms"] else None
            row["memory_ours"] = (row["extra_mb"] or 0.0) / max(ours["extra_mb"] or 0.0, 1e-3)
        yield row
