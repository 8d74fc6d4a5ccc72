"""The flat ops on the CPU against what a user would write, interleaved: `make bench`.

pytest-benchmark times ours; before each of its rounds every other contender runs once and is timed too, so all meet the
same machine. A result that is wrong is not timed. `python -m bench.test_flat CASE/CONTENDER` prints the extra memory of
one call, in MB.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import projgrad
from projgrad import projectors
from projgrad.experiments.benchmark.flat import (
    Truth,
    lstsq_project_out,
    plain_gram,
    plain_project_out,
    projection_limits,
    pseudo_inverse_solve,
    random_systems,
    solve_check,
)
from projgrad.experiments.benchmark.harness import matrix_rate, read_rate, size_in_bytes, spread
from projgrad.experiments.comparison.memory import peak_memory

ROUNDS = 11
SLOW_ROUNDS = {"QR": 5, "lstsq": 5}


@dataclass(frozen=True)
class Case:
    """One input in float32.

    size: (n, p), or (systems, n) for gram_solve.
    targets: how many times our time each should take, at least.
    megabytes: what ours may need beyond its inputs and its result.
    """

    op: str
    size: tuple[int, int]
    contenders: dict[str, Callable]
    targets: dict[str, float]
    megabytes: float | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.size[0]}x{self.size[1]}"

    def inputs(self) -> tuple[Tensor, Tensor]:
        if self.op == "gram_solve":
            return random_systems(*self.size)
        torch.manual_seed(0)
        G = torch.randn(self.size)
        return torch.randn(self.size[1]), G

    def gate(self, inputs: tuple[Tensor, Tensor]) -> tuple[Callable, dict[str, float]]:
        """Return the function that gives the errors of a result, and their limits."""
        if self.op == "gram_solve":
            return solve_check(*inputs), {"error": 1e-4}
        truth = Truth(*inputs)
        if self.op == "gram":
            return truth.of_gram, {"error": 1e-6}
        return truth.of_projection, projection_limits(torch.float32)


PROJECT = {
    "projgrad": projgrad.project_out,
    "plain Gram": plain_project_out,
    "QR": projectors.qr,
    "lstsq": lstsq_project_out,
}
GRAM = {"projgrad": lambda u, G: projgrad.gram(G, u), "plain Gram": plain_gram}
SOLVE = {
    "projgrad": projgrad.gram_solve,
    "linalg.solve": torch.linalg.solve,
    "eigh pseudo-inverse": pseudo_inverse_solve,
}
CASES = [
    Case("project_out", (8, 2_000_000), PROJECT, {"QR": 4, "plain Gram": 1.5}, 16),
    Case("project_out", (32, 2_000_000), PROJECT, {"QR": 12, "plain Gram": 1.3}, 16),
    Case("project_out", (128, 500_000), PROJECT, {"QR": 12, "plain Gram": 1.2}, 16),
    Case("gram", (8, 2_000_000), GRAM, {}),
    Case("gram", (32, 2_000_000), GRAM, {}),
    Case("gram", (128, 500_000), GRAM, {}),
    Case("gram_solve", (200, 64), SOLVE, {"eigh pseudo-inverse": 5, "linalg.solve": 1}),
]


def floor_seconds(case, inputs):
    """Return the seconds that the reads and the flops of the lower triangle need at this machine's measured rates."""
    if case.op == "gram_solve":
        systems, n = case.size
        return systems * n**3 / 3 / matrix_rate(torch.float64)
    (n, p), G = case.size, inputs[1]
    read = size_in_bytes(G) / read_rate(G)
    first = max(read, n * (n + 1) * p / matrix_rate(G.dtype))
    return first if case.op == "gram" else first + read


def extra_megabytes(case, contender):
    """Return the peak memory of one call beyond its inputs and its result, in MB, in a process of its own."""
    command = [sys.executable, "-m", "bench.test_flat", f"{case.name}/{contender}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flat(benchmark, case):
    inputs = case.inputs()
    seconds = {name: [] for name in case.contenders}

    def run(name):
        started = time.perf_counter()
        result = case.contenders[name](*inputs)
        seconds[name].append(time.perf_counter() - started)
        return result

    def others():
        for name in case.contenders:
            if name != "projgrad" and len(seconds[name]) < SLOW_ROUNDS.get(name, ROUNDS):
                run(name)

    check, limits = case.gate(inputs)
    for name, error in check(run("projgrad")).items():
        assert error <= limits[name], name
    others()
    for times in seconds.values():
        times.clear()  # the first call of each is its warm-up
    benchmark.group = case.op
    benchmark.pedantic(run, args=("projgrad",), setup=others, rounds=ROUNDS)
    floor = floor_seconds(case, inputs)
    mine = spread(seconds["projgrad"])[0]
    benchmark.extra_info["rows"] = [
        {
            "op": case.op,
            "size": "x".join(map(str, case.size)),
            "contender": name,
            **dict(zip(("ms", "ms_20", "ms_80"), (1e3 * t for t in spread(times)), strict=True)),
            "times_ours": spread(times)[0] / mine,
            "target": case.targets.get(name),
            "percent_of_floor": 100 * floor / spread(times)[0],
            "extra_mb": extra_megabytes(case, name),
            "extra_mb_target": case.megabytes if name == "projgrad" else None,
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    name, contender = sys.argv[1].split("/")
    case = next(case for case in CASES if case.name == name)
    call, inputs = case.contenders[contender], case.inputs()
    small = [x[:2] if case.op == "gram_solve" else x[..., :256].contiguous() for x in inputs]
    call(*small)  # loads what is loaded once
    with peak_memory() as peak:
        result = call(*inputs)
    if peak.bytes is None:
        raise SystemExit("peak memory is measured on Linux only")
    results = result if isinstance(result, tuple) else (result,)
    print((peak.bytes - size_in_bytes(*results)) / 1e6)


if __name__ == "__main__":
    main()
