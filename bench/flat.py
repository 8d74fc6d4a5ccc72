"""The flat ops against what a user would write: `python -m bench.flat --device cuda`, `bench/gpu.sh flat`.

On a CPU, `--device cpu`, they are a benchmark of pytest, test_flat.py: `make bench`. On a GPU a result that is wrong is
not timed, and QR runs in processes of its own: it may take the device with it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from projgrad.experiments.benchmark.flat import (
    Truth,
    feasible_rows,
    flat_rows,
    op_rows,
    projection_limits,
    qr_project_out,
    random_rows,
    solve_rows,
)
from projgrad.experiments.benchmark.harness import DEVICE, Ceilings, Clock, ceilings
from projgrad.experiments.benchmark.report import about_case, meets
from projgrad.experiments.benchmark.worker import Failed, Worker, complain
from projgrad.ops.project_out import project_out

from .command import ROOT, Deadline, arguments, rows_of, run, started, title

F32, BF16 = torch.float32, torch.bfloat16
COLUMNS = ("op", "size", "dtype", "contender", "ms", "ms_20", "ms_80", "host_ms", "rounds", "times_ours", "target")
COLUMNS += ("met", "percent_of_floor", "rate", "unit", "extra_mb", "memory_ours", "error", "residual", "note")
KEY = COLUMNS[:4]
OVER_FLOOR = [("percent_of_floor", ">=", 100 / 1.3)]  # at most 1.3 x the time of reading G twice
OVER_QR = [("times_ours", ">=", 50.0), ("memory_ours", ">=", 3.0)]


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
        return random_rows(self.n, self.p, self.dtype, DEVICE)

    def rows(self, most: Ceilings, clock: Clock) -> Iterator[dict]:
        """Yield the rows of project_out and its halves."""
        return flat_rows(*self.inputs(), most, clock, {"projgrad": OVER_FLOOR} if self.contract else {})


def gpu_cases(tiny: bool) -> list[GPUCase]:
    if tiny:
        contract = [GPUCase(64, 5000, dtype, contract=True, qr=True, fallback=1000) for dtype in (F32, BF16)]
        return [*contract, GPUCase(8, 3000, F32)]
    cases = [GPUCase(64, 50_000_000, dtype, contract=True, qr=True, fallback=5_000_000) for dtype in (F32, BF16)]
    for n, p in ((8, 100_000_000), (256, 4_000_000), (512, 2_000_000)):
        cases += [GPUCase(n, p, dtype, qr=dtype == F32) for dtype in (F32, BF16)]
    return cases


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
        calls = {"projgrad": lambda: project_out(u, G), "QR": lambda: qr_project_out(u, G)}
        check, limits = Truth(u, G).of_projection, projection_limits(case.dtype)
        rows = list(op_rows(case.about, calls, check, limits, clock, seconds=1.0, rounds=5))
        print(json.dumps({"rows": rows}), flush=True)
    except Exception as error:
        complain(error)


def plan(tiny: bool, most: Ceilings, clock: Clock) -> Iterator[tuple[dict, Callable[[], Iterator[dict]]]]:
    """Yield what is measured, most interesting first: its name and the function that measures it."""
    cases = gpu_cases(tiny)
    for case in cases[:2]:
        yield case.about, lambda c=case: c.rows(most, clock)
    for count, n in [(3, n) for n in (16, 64)] if tiny else [(200, n) for n in (64, 16, 32, 128, 256)]:
        about = about_case("gram_solve", (count, n), F32)
        yield about, lambda count=count, n=n: solve_rows(count, n, clock)
    for case in cases[2:]:
        yield case.about, lambda c=case: c.rows(most, clock)
    p = 1000 if tiny else 100_000_000
    for dtype in (F32, BF16):
        about = about_case("feasible", (p,), dtype)
        yield about, lambda dtype=dtype: feasible_rows(p, dtype, most, clock)
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
