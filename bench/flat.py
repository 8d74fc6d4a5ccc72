"""The flat ops against what a user would write: `python -m bench.flat --device cuda`, `bench/gpu.sh flat`.

On a CPU, `--device cpu`, they are a benchmark of pytest, test_flat.py: `make bench`. On a GPU a result that is wrong is
not timed, and QR runs in processes of its own: it may take the device with it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import projgrad
from projgrad import projectors
from projgrad.kernels.register import triton
from projgrad.ops import reference
from projgrad.ops.t_test import feasibility_thresholds

from .command import ROOT, Deadline, Failed, Worker, about_case, arguments, complain, rows_of, run, started, title
from .harness import DEVICE, Ceilings, Clock, Contender, ceilings, measure
from .report import meets

ops = torch.ops.projgrad
F32, BF16 = torch.float32, torch.bfloat16
COLUMNS = ("op", "size", "dtype", "contender", "ms", "ms_20", "ms_80", "host_ms", "rounds", "times_ours", "target")
COLUMNS += ("met", "percent_of_floor", "rate", "unit", "extra_mb", "memory_ours", "error", "residual", "note")
KEY = COLUMNS[:4]
OVER_FLOOR = [("percent_of_floor", ">=", 100 / 1.3)]  # at most 1.3 x the time of reading G twice
OVER_QR = [("times_ours", ">=", 50.0), ("memory_ours", ">=", 3.0)]


def plain_project_out(u: Tensor, G: Tensor) -> Tensor:
    """Project by the Gram route as one would write it down; the small system in float32 or better."""
    K, v = (G @ G.mT).float(), (G @ u).float()
    return u - torch.linalg.solve(K, v).to(G.dtype) @ G


def qr_project_out(u: Tensor, G: Tensor) -> Tensor:
    return projectors.qr(u.float(), G.float()).to(u.dtype)


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
    return d * ((d * u <= 0) & (d * mean + 1.67 * d.abs() * error <= 0))


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
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    return {"error": 1e-5 + rounding, "residual": 1e-6 + rounding}


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


class GPUCase(NamedTuple):
    """G [n, p] of a dtype; `contract`: the sizes that targets are set for; `fallback`: p where QR fails at p."""

    n: int
    p: int
    dtype: torch.dtype
    contract: bool = False
    qr: bool = False
    fallback: int = 0

    @property
    def about(self) -> dict[str, str]:
        return about_case("project_out", (self.n, self.p), self.dtype)

    def inputs(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        G = torch.empty(self.n, self.p, dtype=self.dtype, device=DEVICE).normal_()
        return torch.empty(self.p, dtype=self.dtype, device=DEVICE).normal_(), G


def gpu_cases(tiny: bool) -> list[GPUCase]:
    if tiny:
        contract = [GPUCase(64, 5000, dtype, contract=True, qr=True, fallback=1000) for dtype in (F32, BF16)]
        return [*contract, GPUCase(8, 3000, F32)]
    cases = [GPUCase(64, 50_000_000, dtype, contract=True, qr=True, fallback=5_000_000) for dtype in (F32, BF16)]
    for n, p in ((8, 100_000_000), (256, 4_000_000), (512, 2_000_000)):
        cases += [GPUCase(n, p, dtype, qr=dtype == F32) for dtype in (F32, BF16)]
    return cases


def op_rows(
    about: dict[str, str],
    calls: dict[str, Callable[[], object]],
    check: Callable[[object], dict[str, float]],
    limits: dict[str, float],
    clock: Clock,
    *,
    seconds: float,
    rounds: int = 25,
    floor: float | None = None,
    targets: dict[str, list] | None = None,
) -> Iterator[dict]:
    """Yield a row for every contender of one op, measured in turn; `floor` in seconds, `seconds` for each to take."""
    contenders = {name: Contender(call) for name, call in calls.items()}
    errors = gated(contenders, check, limits)
    measure(contenders, clock, seconds, rounds)
    ours = contenders["projgrad"].columns()
    for name, contender in contenders.items():
        row = {**about, "contender": name, **contender.columns(), **errors[name]}
        ms, extra = row["ms"], row["extra_mb"]
        row["times_ours"] = ms / ours["ms"] if ms and ours["ms"] else None
        known = extra and ours["extra_mb"] is not None
        row["memory_ours"] = extra / max(ours["extra_mb"], 1e-3) if known else None
        row["percent_of_floor"] = 1e5 * floor / ms if floor and ms else None
        yield row | meets(row, (targets or {}).get(name, []))


def first_subtract(u: Tensor, G: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract as the first pass of project_out does: 16-bit input in float32 on a GPU."""
    if DEVICE == "cuda" and G.element_size() == 2:
        return triton("subtract")(u, G, c, True)
    return ops.subtract(u, G, c)


def flat_rows(case: GPUCase, most: Ceilings, clock: Clock) -> Iterator[dict]:
    """Yield the rows of project_out and of its two halves, gram and subtract."""
    u, G = case.inputs()
    n, p, size = case.n, case.p, G.element_size()
    truth, limits = Truth(u, G), projection_limits(case.dtype)
    read = n * p * size / most.copy
    products = max(read, n * (n + 1) * p / most.rate(case.dtype))
    calls = {"projgrad": lambda: projgrad.project_out(u, G), "plain Gram": lambda: plain_project_out(u, G)}
    targets = {"projgrad": OVER_FLOOR} if case.contract else {}
    about, floor = case.about, products + read
    yield from op_rows(about, calls, truth.of_projection, limits, clock, seconds=1.5, floor=floor, targets=targets)
    calls = {"projgrad": lambda: ops.gram(G, u[None], False), "plain Gram": lambda: plain_gram(u, G)}
    about, rounding = case.about | {"op": "gram"}, {"error": 4 * torch.finfo(F32).eps}
    yield from op_rows(about, calls, truth.of_gram, rounding, clock, seconds=1.5, floor=products)
    calls = {
        "projgrad": lambda: first_subtract(u[None], G, truth.c),
        "plain": lambda: u - truth.c[:, 0].to(G.dtype) @ G,
    }
    check = lambda result: truth.of_projection(result[0][0] if isinstance(result, tuple) else result)  # noqa: E731
    about, floor = case.about | {"op": "subtract"}, read + 2 * p * size / most.copy
    yield from op_rows(about, calls, check, limits, clock, seconds=1.5, floor=floor)


def qr_rows(case: GPUCase, tiny: bool) -> Iterator[dict]:
    """Yield rows of QR, and of ours beside it, from a process of their own; at the smaller p where that ends badly."""
    for p in (case.p, case.fallback):
        if not p:
            return
        about = case._replace(p=p).about
        command = ["-m", "bench.flat", "--worker", str(case.n), str(p), about["dtype"]]
        with Worker(command + ["--tiny"] * tiny) as worker:
            try:
                rows = worker.ask()["rows"]
            except Failed as error:
                row = {**about, "contender": "QR", "note": str(error)}
                yield row | meets(row, [])
                continue
        for row in rows:
            targets = OVER_QR if case.contract and row["contender"] == "QR" else []
            if row["contender"] == "QR" or p != case.p:  # ours at p has been measured at leisure
                yield row | meets(row, targets)
        if all(row["ms"] for row in rows):
            return


def work(n: int, p: int, dtype: str) -> None:
    """Time up to five calls on the worker's side of `qr_rows`."""
    case, clock = GPUCase(n, p, getattr(torch, dtype)), Clock()
    try:
        u, G = case.inputs()
        calls = {"projgrad": lambda: projgrad.project_out(u, G), "QR": lambda: qr_project_out(u, G)}
        check, limits = Truth(u, G).of_projection, projection_limits(case.dtype)
        rows = list(op_rows(case.about, calls, check, limits, clock, seconds=1.0, rounds=5))
        print(json.dumps({"rows": rows}), flush=True)
    except Exception as error:
        complain(error)


def solve_rows(about: dict[str, str], systems: int, n: int, clock: Clock) -> Iterator[dict]:
    K, b = random_systems(systems, n, DEVICE)
    calls = {
        "projgrad": lambda: projgrad.gram_solve(K, b),
        "cholesky_ex + cholesky_solve": lambda: cholesky_solve(K, b),
        "linalg.solve_ex": lambda: torch.linalg.solve_ex(K, b).result,
        "eigh pseudo-inverse": lambda: pseudo_inverse_solve(K, b),
    }
    wanted = {"eigh pseudo-inverse": 5.0, "cholesky_ex + cholesky_solve": 1.5} if n == 64 else {}
    targets = {name: [("times_ours", ">=", times)] for name, times in wanted.items()}
    yield from op_rows(about, calls, solve_check(K, b), {"error": 1e-4}, clock, seconds=0.5, targets=targets)


def feasible_rows(about: dict[str, str], p: int, dtype: torch.dtype, most: Ceilings, clock: Clock) -> Iterator[dict]:
    """Yield the rows of feasible: four tensors are read and one is written."""
    torch.manual_seed(0)
    n = 64
    d, u = (torch.randn(p, device=DEVICE).to(dtype) for _ in range(2))
    total = n**0.5 * torch.randn(p, device=DEVICE)
    squares = total.square() / n + n * torch.rand(p, device=DEVICE)
    exact = reference.feasible(d, u, total, squares, n, *feasibility_thresholds(n, 0.05, F32))[0]
    calls = {
        "projgrad": lambda: projgrad.feasible(d, u, total, squares, n),
        "plain": lambda: plain_feasible(d, u, total, squares, n),
    }
    check = lambda x: {"error": float((x != exact).double().mean())}  # noqa: E731
    floor = p * (3 * dtype.itemsize + 8) / most.copy
    yield from op_rows(about, calls, check, {"error": 0.0}, clock, seconds=1.0, floor=floor)


def plan(tiny: bool, most: Ceilings, clock: Clock) -> Iterator[tuple[dict, Callable[[], Iterator[dict]]]]:
    """Yield what is measured, most interesting first: its name and the function that measures it."""
    cases = gpu_cases(tiny)
    for case in cases[:2]:
        yield case.about, lambda c=case: flat_rows(c, most, clock)
    for count, n in [(3, n) for n in (16, 64)] if tiny else [(200, n) for n in (64, 16, 32, 128, 256)]:
        about = about_case("gram_solve", (count, n), F32)
        yield about, lambda a=about, count=count, n=n: solve_rows(a, count, n, clock)
    for case in cases[2:]:
        yield case.about, lambda c=case: flat_rows(c, most, clock)
    p = 1000 if tiny else 100_000_000
    for dtype in (F32, BF16):
        about = about_case("feasible", (p,), dtype)
        yield about, lambda a=about, dtype=dtype: feasible_rows(a, p, dtype, most, clock)
    for case in cases:
        if case.qr:
            yield {**case.about, "beside": "QR"}, lambda c=case: qr_rows(c, tiny)


def main() -> None:
    if "--worker" in sys.argv:
        n, p, dtype = sys.argv[sys.argv.index("--worker") + 1 :][:3]
        return work(int(n), int(p), dtype)
    args = arguments(__doc__, default="cpu")
    if args.device == "cpu":
        if args.tiny or args.only:
            raise SystemExit("--tiny and --only are for --device cuda; on a CPU: python -m pytest bench -k CASE")
        command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only"]
        sys.exit(subprocess.call(command, cwd=ROOT, env={"OMP_WAIT_POLICY": "passive", **os.environ}))
    deadline, clock = Deadline(args.seconds), Clock()
    rows = rows_of("flat", args, COLUMNS, KEY)
    most = ceilings(clock, args.tiny)
    for row in most.rows():
        rows.add(row)
    chosen = ((about, make) for about, make in plan(args.tiny, most, clock) if args.only in title(about))
    sys.exit(run(chosen, rows, deadline))


if __name__ == "__main__":
    started(main)
