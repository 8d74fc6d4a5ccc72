"""The flat ops against what a user would write: their contenders, their truth, their floors."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ...kernels.register import triton
from ...methods import projectors
from ...ops import reference
from ...ops.feasible import feasible
from ...ops.gram_solve import gram_solve
from ...ops.project_out import project_out
from ...ops.t_test import feasibility_thresholds, quantile
from .harness import Ceilings, Clock, Contender, measure
from .limits import error_limit, result_limit
from .peer import wide
from .report import about_case, meets

ops = torch.ops.projgrad
F32 = torch.float32
Check = Callable[[object], dict[str, float]]


def plain_project_out(u: Tensor, G: Tensor) -> Tensor:
    """Project by the Gram route as one would write it down; the small system in float32 or better."""
    K, v = wide(G @ G.mT), wide(G @ u)
    return u - torch.linalg.solve(K, v).to(G.dtype) @ G


def qr_project_out(u: Tensor, G: Tensor) -> Tensor:
    return projectors.qr(wide(u), wide(G)).to(u.dtype)


def lstsq_project_out(u: Tensor, G: Tensor) -> Tensor:
    return u - torch.linalg.lstsq(G.mT, u[:, None]).solution[:, 0] @ G


def plain_gram(u: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    return G @ G.mT, G @ u


def pseudo_inverse_solve(K: Tensor, b: Tensor) -> Tensor:
    """Solve by an eigendecomposition, which tells the rank too."""
    values, vectors = torch.linalg.eigh(K)
    inverse = torch.where(values > 64 * torch.finfo(K.dtype).eps * values[..., -1:], 1 / values, 0)
    return (vectors @ (inverse[..., None] * (vectors.mT @ b[..., None])))[..., 0]


def cholesky_solve(K: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b[..., None], torch.linalg.cholesky_ex(K).L)[..., 0]


def plain_feasible(d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int) -> Tensor:
    """Mask as one would write the test down."""
    mean = total / n
    error = ((squares / n - mean**2).clamp_min(0) / (n - 1)).sqrt()
    return d * ((d * u <= 0) & (d * mean + quantile(0.05, n - 1) * d.abs() * error <= 0))


class Truth:
    """The float64 solution of u and G [n, p], chunk by chunk."""

    def __init__(self, u: Tensor, G: Tensor) -> None:
        self.u, self.G = u, G
        self.K, self.v = reference.gram(G, u[None])
        self.c = torch.linalg.solve(self.K, self.v)
        self.lengths = self.K.diagonal().sqrt()
        self.exact = reference.subtract(u[None].double(), G, self.c)[0][0]

    def of_projection(self, out: Tensor) -> dict[str, float]:
        """Return the relative error of a projection, and the largest cosine that is left to a row of G."""
        remaining = reference.gram(self.G, out[None])[1][:, 0].abs() / self.lengths
        error = torch.linalg.vector_norm(self.exact - out) / torch.linalg.vector_norm(self.exact)
        return {"error": float(error), "residual": float(remaining.max() / torch.linalg.vector_norm(out.double()))}

    def of_gram(self, result: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Return the largest error of K and v, in units of the norms of what is multiplied."""
        K, v = (x.double() for x in result)
        error = ((K - self.K).abs() / self.lengths[:, None] / self.lengths).max()
        others = (v.flatten() - self.v[:, 0]).abs() / self.lengths / torch.linalg.vector_norm(self.u.double())
        return {"error": float(torch.maximum(error, others.max()))}


def projection_limits(dtype: torch.dtype) -> dict[str, float]:
    """Return the limits of a projection's errors: those of float32, and the rounding of the result in 16 bits."""
    return {"error": result_limit(1e-5, dtype), "residual": result_limit(1e-6, dtype)}


def solve_check(K: Tensor, b: Tensor) -> Callable[[Tensor], dict[str, float]]:
    exact = torch.linalg.solve(K.double(), b.double())
    return lambda x: {"error": float((x - exact).norm() / exact.norm())}


def gated(contenders: Mapping[str, Contender], check, limits: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the errors of every contender; note where ours are beyond their limits, and where others are useless."""
    errors = {}
    for name, contender in contenders.items():
        errors[name] = contender.attempt(lambda c=contender: check(c.call())) or {}
        ours = name == "projgrad"
        wrong = {k: e for k, e in errors[name].items() if not e <= (limits[k] if ours else 0.05)}
        if wrong:
            contender.note = "wrong: " + " ".join(f"{key} {error:.1e}" for key, error in wrong.items())
    return errors


def random_systems(count: int, n: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return K [count, n, n], positive definite, and b [count, n]."""
    torch.manual_seed(0)
    A = torch.randn(count, n, 2 * n, device=device)
    return A @ A.mT, torch.randn(count, n, device=device)


def op_rows(
    about: dict[str, str],
    calls: dict[str, Callable[[], object]],
    check: Check,
    limits: dict[str, float],
    clock: Clock,
    *,
    seconds: float = 0.5,
    rounds: int = 25,
    memory: bool = True,
    floor: float | None = None,
    targets: Mapping[str, list] | None = None,
) -> Iterator[dict]:
    """Yield a row for every contender of one op, measured in turn.

    floor: in seconds. seconds: about what each contender may take. rounds, memory: as `measure`.
    """
    contenders = {name: Contender(call) for name, call in calls.items()}
    errors = gated(contenders, check, limits)
    measure(contenders, clock, seconds, rounds, memory)
    ours = contenders["projgrad"].columns()
    for name, contender in contenders.items():
        row = {**about, "contender": name, **contender.columns(), **errors[name], "times": contender.device_ms}
        ms, extra = row["ms"], row["extra_mb"]
        row["times_ours"] = ms / ours["ms"] if ms and ours["ms"] else None
        known = extra and ours["extra_mb"] is not None
        row["memory_ours"] = extra / max(ours["extra_mb"], 1e-3) if known else None
        row["percent_of_floor"] = 1e5 * floor / ms if floor and ms else None
        yield row | meets(row, (targets or {}).get(name, []))


def first_subtract(u: Tensor, G: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract as the first pass of project_out does: 16-bit input in float32 on a GPU."""
    if G.is_cuda and G.element_size() == 2:
        return triton("subtract")(u, G, c, True)
    return ops.subtract(u, G, c)


def random_rows(n: int, p: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return u [p] and G [n, p]."""
    torch.manual_seed(0)
    G = torch.empty(n, p, dtype=dtype, device=device).normal_()
    return torch.empty(p, dtype=dtype, device=device).normal_(), G


def flat_rows(
    u: Tensor,
    G: Tensor,
    most: Ceilings,
    clock: Clock,
    targets: Mapping[str, list] | None = None,
    *,
    qr: bool = False,
    **how: float,
) -> Iterator[dict]:
    """Yield the rows of project_out and of its two halves, gram and subtract; how: as `op_rows`."""
    (n, p), size, how = G.shape, G.element_size(), {"seconds": 1.5} | how
    truth, limits = Truth(u, G), projection_limits(G.dtype)
    read = n * p * size / most.copy
    products = max(read, n * (n + 1) * p / most.rate(G.dtype))
    calls = {"projgrad": lambda: project_out(u, G), "plain Gram": lambda: plain_project_out(u, G)}
    if qr:  # on a GPU it may take the device with it
        calls["QR"] = lambda: qr_project_out(u, G)
    about = about_case("project_out", (n, p), G.dtype)
    floor = products + read
    yield from op_rows(about, calls, truth.of_projection, limits, clock, floor=floor, targets=targets, **how)
    calls = {"projgrad": lambda: ops.gram(G, u[None], False), "plain Gram": lambda: plain_gram(u, G)}
    rounding = {"error": error_limit(4 * torch.finfo(F32).eps, G.dtype)}
    yield from op_rows(about | {"op": "gram"}, calls, truth.of_gram, rounding, clock, floor=products, **how)
    calls = {
        "projgrad": lambda: first_subtract(u[None], G, truth.c),
        "plain": lambda: u - truth.c[:, 0].to(G.dtype) @ G,
    }
    check = lambda result: truth.of_projection(result[0][0] if isinstance(result, tuple) else result)  # noqa: E731
    floor = read + 2 * p * size / most.copy
    yield from op_rows(about | {"op": "subtract"}, calls, check, limits, clock, floor=floor, **how)


def solve_rows(systems: int, n: int, clock: Clock, floor: float | None = None, **how: float) -> Iterator[dict]:
    K, b = random_systems(systems, n, clock.device)
    calls = {
        "projgrad": lambda: gram_solve(K, b),
        "cholesky_ex + cholesky_solve": lambda: cholesky_solve(K, b),
        "linalg.solve_ex": lambda: torch.linalg.solve_ex(K, b).result,
        "eigh pseudo-inverse": lambda: pseudo_inverse_solve(K, b),
    }
    wanted = {"eigh pseudo-inverse": 5.0, "cholesky_ex + cholesky_solve": 1.5} if n == 64 else {}
    targets = {name: [("times_ours", ">=", times)] for name, times in wanted.items()}
    about, limits = about_case("gram_solve", (systems, n), F32), {"error": 1e-4}
    yield from op_rows(about, calls, solve_check(K, b), limits, clock, floor=floor, targets=targets, **how)


def feasible_rows(
    p: int, dtype: torch.dtype, most: Ceilings, clock: Clock, n: int = 64, **how: float
) -> Iterator[dict]:
    """Yield the rows of feasible: four tensors are read and one is written."""
    torch.manual_seed(0)
    d, u = (torch.randn(p, device=clock.device).to(dtype) for _ in range(2))
    total = n**0.5 * torch.randn(p, device=clock.device)
    squares = total.square() / n + n * torch.rand(p, device=clock.device)
    thresholds = feasibility_thresholds(n, 0.05, F32)
    exact = reference.feasible(d, u, total, squares, n, *thresholds)[0]
    calls = {
        "projgrad": lambda: feasible(d, u, total, squares, n),
        "plain": lambda: plain_feasible(d, u, total, squares, n),
    }
    check = lambda x: {"error": float((x != exact).double().mean())}  # noqa: E731
    about, floor = about_case("feasible", (p,), dtype), p * (3 * dtype.itemsize + 8) / most.copy
    how = {"seconds": 1.0} | how
    yield from op_rows(about, calls, check, {"error": 0.0}, clock, floor=floor, **how)
