"""The flat ops on a GPU against what a user would write: `bench/gpu.sh flat`, or `python -m bench.gpu_flat`.

A result that is wrong is not timed. QR runs in processes of its own: it may take the device with it.
"""

import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import projgrad
from projgrad import projectors
from projgrad.ops import reference
from projgrad.ops.t_test import feasibility_thresholds

from .contenders import pseudo_inverse_solve
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
    started,
    title,
)
from .gpu_rows import meets
from .worker import Failed, Worker, complain

ops = torch.ops.projgrad
F32, BF16 = torch.float32, torch.bfloat16
COLUMNS = ("op", "size", "dtype", "contender", "ms", "ms_20", "ms_80", "host_ms", "rounds", "times_ours", "target")
COLUMNS += ("met", "percent_of_floor", "rate", "unit", "extra_mb", "memory_ours", "error", "residual", "note")
KEY = COLUMNS[:4]
OVER_FLOOR = 100 / 1.3  # percent: at most 1.3 x the time of reading G twice


class Case(NamedTuple):
    """G [n, p] of a dtype; `contract`: the sizes that targets are set for; `fallback`: p where QR fails at p."""

    n: int
    p: int
    dtype: torch.dtype
    contract: bool = False
    qr: bool = False
    fallback: int = 0

    @property
    def size(self) -> str:
        return f"{self.n}x{self.p}"

    @property
    def about(self) -> dict[str, str]:
        return {"op": "project_out", "size": self.size, "dtype": name(self.dtype)}

    def inputs(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        G = torch.empty(self.n, self.p, dtype=self.dtype, device=DEVICE).normal_()
        return torch.empty(self.p, dtype=self.dtype, device=DEVICE).normal_(), G


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case(64, 5000, F32, True, True, 1000), Case(64, 5000, BF16, True, True, 1000), Case(8, 3000, F32)]
    found = [Case(64, 50_000_000, dtype, True, True, 5_000_000) for dtype in (F32, BF16)]
    for n, p in ((8, 100_000_000), (256, 4_000_000), (512, 2_000_000)):
        found += [Case(n, p, dtype, qr=dtype == F32) for dtype in (F32, BF16)]
    return found


def plain_project_out(u: Tensor, G: Tensor) -> Tensor:
    """The Gram route as one would write it down; the small system in float32 or better."""
    K, v = (G @ G.mT).float(), (G @ u).float()
    return u - torch.linalg.solve(K, v).to(G.dtype) @ G


def qr_project_out(u: Tensor, G: Tensor) -> Tensor:
    return projectors.qr(u.float(), G.float()).to(u.dtype)


class Truth:
    """The float64 solution of a case, chunk by chunk."""

    def __init__(self, u: Tensor, G: Tensor) -> None:
        self.u, self.G = u, G
        self.K, self.v = reference.gram(G, u[None])
        self.c = torch.linalg.solve(self.K, self.v)
        self.lengths = self.K.diagonal().sqrt()
        self.exact = reference.subtract(u[None].double(), G, self.c)[0][0]

    def of_projection(self, out: Tensor) -> dict[str, float]:
        left = reference.gram(self.G, out[None])[1][:, 0].abs() / self.lengths
        error = torch.linalg.vector_norm(self.exact - out) / torch.linalg.vector_norm(self.exact)
        return {"error": float(error), "residual": float(left.max() / torch.linalg.vector_norm(out.double()))}

    def of_gram(self, result: tuple[Tensor, Tensor]) -> dict[str, float]:
        K, v = (x.double() for x in result)
        error = ((K - self.K).abs() / self.lengths[:, None] / self.lengths).max()
        others = (v.flatten() - self.v[:, 0]).abs() / self.lengths / torch.linalg.vector_norm(self.u.double())
        return {"error": float(torch.maximum(error, others.max()))}


def gated(contenders: dict[str, Contender], check, limits: dict[str, float]) -> dict[str, dict[str, float]]:
    """The errors of every contender; a note where ours is beyond its limits, or another useless."""
    found = {}
    for contender, one in contenders.items():
        errors = one.attempt(lambda c=one: check(c.call()))
        found[contender] = errors or {}
        ours = contender == "projgrad"
        wrong = {k: e for k, e in found[contender].items() if not e <= (limits[k] if ours else 0.05)}
        if wrong:
            one.note = "wrong: " + " ".join(f"{key} {error:.1e}" for key, error in wrong.items())
    return found


def flat_rows(case: Case, most: Ceilings, clock: Clock) -> Iterator[dict]:
    u, G = case.inputs()
    n, p, s = case.n, case.p, G.element_size()
    truth = Truth(u, G)
    half = torch.finfo(case.dtype).eps if s == 2 else 0.0
    read = n * p * s / most.copy
    products = max(read, n * (n + 1) * p / most.rate(case.dtype))
    table = {
        "project_out": (
            {"projgrad": lambda: projgrad.project_out(u, G), "plain Gram": lambda: plain_project_out(u, G)},
            truth.of_projection,
            {"error": 1e-5 + half, "residual": 1e-6 + half},
            products + read,
        ),
        "gram": (
            {"projgrad": lambda: ops.gram(G, u[None], False), "plain Gram": lambda: (G @ G.mT, G @ u)},
            truth.of_gram,
            {"error": 4 * torch.finfo(F32).eps},
            products,
        ),
        "subtract": (
            {
                "projgrad": lambda: ops.subtract(u[None], G, truth.c),
                "plain": lambda: u - truth.c[:, 0].to(G.dtype) @ G,
            },
            lambda result: truth.of_projection(result[0][0] if isinstance(result, tuple) else result),
            {"error": 1e-5 + half, "residual": 1e-6 + half},
            read + 2 * p * s / most.copy,
        ),
    }
    for op, (calls, check, limits, floor) in table.items():
        contenders = {key: Contender(call) for key, call in calls.items()}
        errors = gated(contenders, check, limits)
        measure(contenders, clock, seconds=1.5)
        mine = contenders["projgrad"].columns()
        for key, contender in contenders.items():
            row = {"op": op, "size": case.size, "dtype": name(case.dtype), "contender": key, **contender.columns()}
            row |= errors[key] | compared(row, mine)
            row["percent_of_floor"] = 1e5 * floor / row["ms"] if row["ms"] else None
            targets = []
            if op == "project_out" and case.contract and key == "projgrad":
                targets = [("percent_of_floor", ">=", OVER_FLOOR)]
            yield row | meets(row, targets)


def compared(row: dict, ours: dict) -> dict:
    """Time and memory in units of ours."""
    times = row["ms"] / ours["ms"] if row["ms"] and ours["ms"] else None
    memory = row["extra_mb"] / max(ours["extra_mb"], 1e-3) if row["extra_mb"] and ours["extra_mb"] is not None else None
    return {"times_ours": times, "memory_ours": memory}


def qr_rows(case: Case, tiny: bool) -> Iterator[dict]:
    """QR and ours beside it, in a process of their own; at the smaller p where that ends badly."""
    for p in (case.p, case.fallback):
        if not p:
            return
        arguments = ["-m", "bench.gpu_flat", "--worker", str(case.n), str(p), name(case.dtype)]
        with Worker(arguments + ["--tiny"] * tiny) as worker:
            try:
                rows = worker.defer()["rows"]
            except Failed as error:
                size = f"{case.n}x{p}"
                row = {"op": "project_out", "size": size, "dtype": name(case.dtype), "contender": "QR"}
                yield row | {"note": str(error)} | meets(row, [])
                continue
        for row in rows:
            targets = [("times_ours", ">=", 50.0), ("memory_ours", ">=", 3.0)]
            wanted = targets if case.contract and row["contender"] == "QR" else []
            if row["contender"] == "QR" or p != case.p:  # ours at p has been measured at leisure
                yield row | meets(row, wanted)
        if all(row["ms"] for row in rows):
            return


def work(n: int, p: int, dtype: str) -> None:
    """The worker's side of `qr_rows`: three timed calls."""
    case, clock = Case(n, p, getattr(torch, dtype)), Clock()
    try:
        u, G = case.inputs()
        calls = {"projgrad": lambda: projgrad.project_out(u, G), "QR": lambda: qr_project_out(u, G)}
        contenders = {key: Contender(call) for key, call in calls.items()}
        half = torch.finfo(case.dtype).eps if case.dtype != F32 else 0.0
        truth = Truth(u, G)
        errors = gated(contenders, truth.of_projection, {"error": 1e-5 + half, "residual": 1e-6 + half})
        measure(contenders, clock, seconds=1.0, rounds=5)
        mine = contenders["projgrad"].columns()
        rows = []
        for key, contender in contenders.items():
            row = {"op": "project_out", "size": case.size, "dtype": dtype, "contender": key, **contender.columns()}
            rows.append(row | errors[key] | compared(row, mine))
        print(json.dumps({"rows": rows}), flush=True)
    except Exception as error:
        complain(error)


def solve_rows(systems: int, n: int, clock: Clock) -> Iterator[dict]:
    torch.manual_seed(0)
    A = torch.randn(systems, n, 2 * n, device=DEVICE)
    K, b = A @ A.mT, torch.randn(systems, n, device=DEVICE)
    exact = torch.linalg.solve(K.double(), b.double())

    def cholesky() -> Tensor:
        return torch.cholesky_solve(b[..., None], torch.linalg.cholesky_ex(K).L)[..., 0]

    calls = {
        "projgrad": lambda: projgrad.gram_solve(K, b),
        "cholesky_ex + cholesky_solve": cholesky,
        "linalg.solve_ex": lambda: torch.linalg.solve_ex(K, b).result,
        "eigh pseudo-inverse": lambda: pseudo_inverse_solve(K, b),
    }
    contenders = {key: Contender(call) for key, call in calls.items()}
    check = lambda x: {"error": float((x - exact).norm() / exact.norm())}  # noqa: E731
    errors = gated(contenders, check, {"error": 1e-4})
    measure(contenders, clock, seconds=0.5)
    wanted = {"eigh pseudo-inverse": 5.0, "cholesky_ex + cholesky_solve": 1.5} if n == 64 else {}
    mine = contenders["projgrad"].columns()
    for key, contender in contenders.items():
        row = {"op": "gram_solve", "size": f"{systems}x{n}", "dtype": "float32", "contender": key}
        row |= contender.columns() | errors[key]
        row |= compared(row, mine)
        yield row | meets(row, [("times_ours", ">=", wanted[key])] if key in wanted else [])


def plain_feasible(d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int) -> Tensor:
    """The test as one would write it down."""
    mean = total / n
    error = ((squares / n - mean**2).clamp_min(0) / (n - 1)).sqrt()
    return d * ((d * u <= 0) & (d * mean + 1.67 * d.abs() * error <= 0))


def feasible_rows(p: int, dtype: torch.dtype, most: Ceilings, clock: Clock) -> Iterator[dict]:
    """Four tensors are read and one is written."""
    torch.manual_seed(0)
    n = 64
    d, u = (torch.randn(p, device=DEVICE).to(dtype) for _ in range(2))
    total = n**0.5 * torch.randn(p, device=DEVICE)
    squares = total.square() / n + n * torch.rand(p, device=DEVICE)
    exact = reference.feasible(d, u, total, squares, n, *feasibility_thresholds(n, 0.05, F32))[0]
    contenders = {
        "projgrad": Contender(lambda: projgrad.feasible(d, u, total, squares, n)),
        "plain": Contender(lambda: plain_feasible(d, u, total, squares, n)),
    }
    errors = gated(contenders, lambda x: {"error": float((x != exact).double().mean())}, {"error": 0.0})
    measure(contenders, clock, seconds=1.0)
    floor, mine = p * (3 * dtype.itemsize + 8) / most.copy, contenders["projgrad"].columns()
    for key, contender in contenders.items():
        row = {"op": "feasible", "size": str(p), "dtype": name(dtype), "contender": key}
        row |= contender.columns() | errors[key]
        row |= compared(row, mine)
        row["percent_of_floor"] = 1e5 * floor / row["ms"] if row["ms"] else None
        yield row | meets(row, [])


def main() -> None:
    if "--worker" in sys.argv:
        n, p, dtype = sys.argv[sys.argv.index("--worker") + 1 :][:3]
        return work(int(n), int(p), dtype)
    args = arguments(__doc__)
    deadline, clock = Deadline(args.seconds), Clock()
    rows = rows_of("flat", args, COLUMNS, KEY)
    most = ceilings(clock, args.tiny)
    for row in most.rows():
        rows.add(row)
    systems = [(3, n) for n in (16, 64)] if args.tiny else [(200, n) for n in (64, 16, 32, 128, 256)]
    plan = [(case.about, lambda c=case: flat_rows(c, most, clock)) for case in cases(args.tiny)]
    solves = [
        ({"op": "gram_solve", "size": f"{l}x{n}", "dtype": "float32"}, lambda l=l, n=n: solve_rows(l, n, clock))
        for l, n in systems
    ]
    plan = plan[:2] + solves + plan[2:]
    sizes = [(1000 if args.tiny else 100_000_000, dtype) for dtype in (F32, BF16)]
    plan += [
        ({"op": "feasible", "size": str(p), "dtype": name(t)}, lambda p=p, t=t: feasible_rows(p, t, most, clock))
        for p, t in sizes
    ]
    plan += [({**c.about, "beside": "QR"}, lambda c=c: qr_rows(c, args.tiny)) for c in cases(args.tiny) if c.qr]
    plan = [some for some in plan if args.only in title(some[0])]
    sys.exit(run(plan, rows, deadline))


if __name__ == "__main__":
    started(main)
