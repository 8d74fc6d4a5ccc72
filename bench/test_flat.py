"""The flat ops against what a user would write, interleaved: `make bench`.

pytest-benchmark times ours; before each of its rounds every other contender runs once and is timed too, so all meet the
same machine. A result that is wrong is not timed.
"""

import time

import pytest
import torch

from projgrad.ops import reference

from .contenders import CASES
from .measure import extra_megabytes, matrix_rate, read_rate, spread

ROUNDS = 11
SLOW_ROUNDS = {"QR": 5, "lstsq": 5}


def _gate(case, inputs, result):
    """Nothing wrong is timed: bounds are those of the tests."""
    if case.op == "gram_solve":
        K, b = inputs
        exact = torch.linalg.solve(K.double(), b.double())
        assert (result - exact).norm() <= 1e-4 * exact.norm()
        return
    u, G = inputs
    K, v = reference.gram(G, u[None])
    if case.op == "gram":
        assert (result[0] - K).norm() <= 1e-6 * K.norm()
        return
    out = result.double()
    exact = reference.subtract(u[None].double(), G, torch.linalg.solve(K, v))[0][0]
    assert (out - exact).norm() <= 1e-5 * exact.norm()
    cosines = reference.gram(G, result[None])[1][:, 0].abs() / K.diagonal().sqrt() / out.norm()
    assert cosines.max() <= 1e-6


def _floor(case, inputs):
    """Seconds that the reads and the flops of the lower triangle need at this machine's measured rates."""
    if case.op == "gram_solve":
        systems, n = case.size
        return systems * n**3 / 3 / matrix_rate(torch.float64)
    (n, p), G = case.size, inputs[1]
    read = G.numel() * G.element_size() / read_rate(G)
    first = max(read, n * (n + 1) * p / matrix_rate(G.dtype))
    return first if case.op == "gram" else first + read


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

    _gate(case, inputs, run("projgrad"))
    others()
    for times in seconds.values():
        times.clear()  # the first call of each is its warm-up
    benchmark.group = case.op
    benchmark.pedantic(run, args=("projgrad",), setup=others, rounds=ROUNDS)
    floor = _floor(case, inputs)
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
            "extra_mb": extra_megabytes(f"{case.name}/{name}"),
            "extra_mb_target": case.megabytes if name == "projgrad" else None,
        }
        for name, times in seconds.items()
    ]
