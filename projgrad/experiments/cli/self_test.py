"""Every public op and a whole OrthoGrad step against float64, in seconds: inputs with duplicated, zero, tiny and huge
rows, and the truth written out once more in plain PyTorch on the CPU."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...methods.orthograd import OrthoGrad
from ...methods.projectors import lstsq
from ...ops.basis_project import basis_project
from ...ops.feasible import feasible
from ...ops.gram import gram
from ...ops.gram_solve import gram_solve
from ...ops.linear import linear_combine, linear_dot, linear_gram, linear_moments
from ...ops.project_out import project_out
from ...ops.t_test import quantile

BUDGET = {"cpu": 10.0, "cuda": 60.0}  # seconds; no test is begun later. On a GPU the first run compiles kernels
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
N, P, T, I, O = 6, 3000, 5, 33, 17
SUMS = {F32: 1e-6, F64: 1e-13, BF16: 1e-6, F16: 1e-6}  # of products, relative to the lengths of what is multiplied
RESULTS = {F32: 1e-5, F64: 1e-12, BF16: 1e-2, F16: 2e-3}  # relative to the truth; 16 bits: their own rounding

Errors = Iterator[tuple[float, float, torch.dtype]]  # of every input: an error, its limit and the type of the input

OPS: dict[str, Callable] = {
    "gram": gram,
    "gram_solve": gram_solve,
    "project_out": project_out,
    "basis_project": basis_project,
    "feasible": feasible,
    "linear_gram": linear_gram,
    "linear_dot": linear_dot,
    "linear_combine": linear_combine,
    "linear_moments": linear_moments,
}


class Found(NamedTuple):
    """One line of the self-test. error, limit and dtype: of the input that came nearest to its limit, or beyond.

    ok: None where there was no time. why: what was raised instead of a result.
    """

    name: str
    device: str
    error: float | None
    limit: float | None
    dtype: str | None
    ok: bool | None
    why: str = ""


def self_test(device: str, end: float = math.inf) -> Iterator[Found]:
    """Yield what came out for every op and the step on a device, until `time.monotonic()` says that the end is there.

    A wrong result is reported, and so is an error; nothing is raised.
    """
    for name, test in TESTS.items():
        if time.monotonic() > end:
            yield Found(name, device, None, None, None, None)
            continue
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                error, limit, dtype = max(test(device), key=_share)
        except Exception as error:  # whatever a broken installation raises
            yield Found(
                name, device, None, None, None, False, f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
        else:
            yield Found(name, device, error, limit, str(dtype).removeprefix("torch."), error <= limit)


def example(name: str, device: str) -> Callable[[], Any]:
    """Return a call of an op in float32, without gradients."""
    G, (a, b) = _rows(F32).to(device), (x.to(device) for x in _factors(F32))
    others = {
        "gram": (G, G[0]),
        "gram_solve": (G.double() @ G.double().mT, G.double() @ G[0].double()),
        "project_out": (G[0], G),
        "basis_project": (G[:, :I], torch.eye(I, 3, device=device)),
        "feasible": (*G[:4].abs(), N),
        "linear_dot": (a, b, b.new_ones(O, I)),
        "linear_combine": (a, b, a.new_ones(N)),
    }
    return lambda: OPS[name](*others.get(name, (a, b)))


def _share(found: tuple[float, float, torch.dtype]) -> float:
    return found[0] / found[1] if math.isfinite(found[0]) else math.inf


def _exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _worst(found: Tensor, truth: Tensor, scale: Tensor | float) -> float:
    """Return the largest error relative to a scale; infinity where something is not a number or of another shape."""
    if found.shape != truth.shape:
        return math.inf
    error = (_exact(found) - truth).abs() / torch.as_tensor(scale, dtype=F64).clamp_min(1e-300)
    return float(error.max()) if error.isfinite().all() else math.inf


def _rows(dtype: torch.dtype) -> Tensor:
    """Make G [n, p]: one row twice, one that is zero and, where the type has them, a tiny and a huge one."""
    G = torch.randn(N, P, dtype=F64)
    G[3], G[4] = -2 * G[0], 0
    if dtype in (F32, F64):
        G[1] *= 1e-20
        G[2] *= 1e15
    return G.to(dtype)


def _factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make the inputs a [n, t, i] of a linear layer and the gradients b [n, t, o] at its output, one sample padded."""
    a, b = torch.randn(N, T, I, dtype=F64), torch.randn(N, T, O, dtype=F64)
    b[1, 2:] = 0
    return a.to(dtype), b.to(dtype)


def _gram(device: str) -> Errors:
    for dtype in (F32, F64, BF16, F16):
        G, u = _rows(dtype), torch.randn(2, P).to(dtype)
        K, v = OPS["gram"](G.to(device), u.to(device))
        rows, directions = _exact(G), _exact(u)
        lengths = rows.norm(dim=1)
        yield _worst(K, rows @ rows.mT, lengths[:, None] * lengths), SUMS[dtype], dtype
        yield _worst(v, rows @ directions.mT, lengths[:, None] * directions.norm(dim=1)), SUMS[dtype], dtype


def _gram_solve(device: str) -> Errors:
    """K x = b for the singular K of all rows, relative to their lengths; and x itself where K is regular."""
    rows = _exact(_rows(F64))
    K, lengths = rows @ rows.mT, rows.norm(dim=1)
    b = K @ (torch.randn(N, dtype=F64) / lengths.clamp_min(1e-300))
    x = _exact(OPS["gram_solve"](K.to(device), b.to(device)))
    yield _worst(K @ x, b, lengths), 1e-11, F64
    A = torch.randn(3, N, 4 * N)
    K, b = (A @ A.mT, torch.randn(3, N, 2))
    truth = torch.linalg.solve(K.double(), b.double())
    yield _worst(OPS["gram_solve"](K.to(device), b.to(device)), truth, truth.abs().max()), 1e-4, F32


def _project_out(device: str) -> Errors:
    for dtype in (F32, F64, BF16, F16):
        G, u = _rows(dtype), torch.randn(P).to(dtype)
        out = OPS["project_out"](u.to(device), G.to(device))
        truth, rows = lstsq(_exact(u), _exact(G)), _exact(G)
        yield _worst((_exact(out) - truth).norm(), torch.zeros((), dtype=F64), truth.norm()), RESULTS[dtype], dtype
        cosines = nn.functional.normalize(rows, eps=1e-300) @ _exact(out) / truth.norm()
        yield _worst(cosines, torch.zeros(N, dtype=F64), 1.0), max(SUMS[dtype], torch.finfo(dtype).eps), dtype


def _basis_project(device: str) -> Errors:
    for dtype in (F32, F64, BF16, F16):
        D, M = torch.randn(O, I).to(dtype), torch.linalg.qr(torch.randn(I, 7, dtype=F64)).Q.to(dtype)
        d, m = _exact(D), _exact(M)
        scale = d.abs() + d.abs() @ m.abs() @ m.abs().mT
        yield _worst(OPS["basis_project"](D.to(device), M.to(device)), d - d @ m @ m.mT, scale), RESULTS[dtype], dtype


def _feasible(device: str) -> Errors:
    """The share of coordinates in which the decision is another one; rounding may turn one in a million."""
    for dtype in (F32, F64):
        d, u, g = torch.randn(P).to(dtype), torch.randn(P).to(dtype), torch.randn(N, P).to(dtype)
        g -= 0.3 * d.sign()
        sums = g.sum(0), g.square().sum(0)
        found = _exact(OPS["feasible"](*(x.to(device) for x in (d, u, *sums)), N))
        d, u, g = _exact(d), _exact(u), _exact(g)
        upper = d * g.mean(0) + quantile(0.05, N - 1) * d.abs() * g.std(0) / math.sqrt(N)
        yield float((found != torch.where((d * u <= 0) & (upper <= 0), d, 0)).double().mean()), 1e-6, dtype


def _layers(device: str) -> Iterator[tuple[torch.dtype, tuple[Tensor, Tensor], Tensor, Tensor]]:
    """Yield by type: the factors on the device, their per-sample gradients [n, o i], and those of their absolutes."""
    for dtype in (F32, F64, BF16, F16):
        a, b = _factors(dtype)
        x, y = _exact(a), _exact(b)
        gradients, scale = ((q.mT @ p).flatten(1) for p, q in ((x, y), (x.abs(), y.abs())))
        yield dtype, (a.to(device), b.to(device)), gradients, scale


def _linear_gram(device: str) -> Errors:
    for dtype, factors, g, scale in _layers(device):
        yield _worst(OPS["linear_gram"](*factors), g @ g.mT, scale @ scale.mT), SUMS[dtype], dtype


def _linear_dot(device: str) -> Errors:
    for dtype, factors, g, scale in _layers(device):
        u = torch.randn(O, I).to(dtype)
        w = _exact(u).flatten()
        yield _worst(OPS["linear_dot"](*factors, u.to(device)), g @ w, scale @ w.abs()), SUMS[dtype], dtype


def _linear_combine(device: str) -> Errors:
    for dtype, factors, g, scale in _layers(device):
        c = torch.randn(N, dtype=F64)
        found = OPS["linear_combine"](*factors, c.to(device))
        yield _worst(found.flatten(), c @ g, c.abs() @ scale), RESULTS[dtype], dtype


def _linear_moments(device: str) -> Errors:
    for dtype, factors, g, scale in _layers(device):
        total, squares = OPS["linear_moments"](*factors)
        yield _worst(total.flatten(), g.sum(0), scale.sum(0)), RESULTS[dtype], dtype
        yield _worst(squares.flatten(), g.square().sum(0), scale.square().sum(0)), RESULTS[dtype], dtype


def _step(device: str) -> Errors:
    """The change that a step makes to the parameters, against one from a loop over the samples in float64."""
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5))
    twin = copy.deepcopy(model).double()
    x, y = torch.randn(2, N, 12), torch.randint(5, (2, N))
    cross_entropy = nn.functional.cross_entropy

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*twin.parameters()])])

    G = torch.stack([gradient(cross_entropy(twin(x[1, j : j + 1].double()), y[1, j : j + 1])) for j in range(N)])
    u = -gradient(cross_entropy(twin(x[0].double()), y[0]))
    truth = -(0.5 * G.mean(0) + 0.5 * lstsq(u, G))  # with a learning rate of 1
    model.to(device)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    (xf, xr), (yf, yr) = x.to(device), y.to(device)
    STEPS["OrthoGrad"](model, torch.optim.SGD(model.parameters(), lr=1.0)).step(
        lambda: cross_entropy(model(xf), yf), lambda: cross_entropy(model(xr), yr, reduction="none")
    )
    change = _exact(nn.utils.parameters_to_vector(model.parameters())) - _exact(before)
    yield _worst((change - truth).norm(), torch.zeros((), dtype=F64), truth.norm()), RESULTS[F32], F32


STEPS: dict[str, Callable] = {"OrthoGrad": OrthoGrad}
TESTS: dict[str, Callable[[str], Errors]] = {
    "gram": _gram,
    "gram_solve": _gram_solve,
    "project_out": _project_out,
    "basis_project": _basis_project,
    "feasible": _feasible,
    "linear_gram": _linear_gram,
    "linear_dot": _linear_dot,
    "linear_combine": _linear_combine,
    "linear_moments": _linear_moments,
    "step of OrthoGrad": _step,
}
