"""Does the cost model pick the faster route to the Gram matrix of a layer? `python -m bench.cost` measures both."""

import csv
import itertools
from pathlib import Path

import torch
from torch import Tensor

from projgrad.ops.cost import GramRoute, linear_route
from projgrad.ops.linear_impl import _chunks, _factors

from .measure import timed
from .report import environment

RESULTS = Path(__file__).parent / "results" / "cost_cpu.csv"
SAMPLES, POSITIONS, WIDTHS = (1, 4, 16, 64, 128), (1, 4, 16, 64, 256), (16, 64, 256, 1024)
FLOPS = 2e10  # a route above this is left out, and its combination with it
SECONDS = 0.3  # of measuring each combination


def run(route: GramRoute, a: Tensor, b: Tensor) -> Tensor:
    if route.name == "factors":
        return _factors(a, b, False, route)
    return _chunks(a, b, a.new_empty(0, b.shape[2], a.shape[2]), False, route)[0]


def measure(n: int, t: int, i: int, o: int) -> dict | None:
    """Milliseconds of both routes and of the ordinary weight gradient: the best of interleaved rounds."""
    routes = [linear_route(n, t, i, o, only=name) for name in ("factors", "chunks")]
    if max(route.flops for route in routes) > FLOPS:
        return None
    torch.manual_seed(0)
    a, b = torch.randn(n, t, i), torch.randn(n, t, o)
    results = [run(route, a, b) for route in routes]
    assert (results[0] - results[1]).abs().max() <= 1e-4 * results[1].abs().max()  # nothing wrong is timed
    weight = torch.empty(o, i)
    calls = [lambda r=r: run(r, a, b) for r in routes]
    calls.append(lambda: torch.mm(b.flatten(0, 1).mT, a.flatten(0, 1), out=weight))
    once = sum(timed(call) for call in calls)
    rounds = max(5, min(100, int(SECONDS / once)))
    times = [[timed(call) for call in calls] for _ in range(rounds)]
    factors, chunks, gradient = (1e3 * min(column) for column in zip(*times, strict=True))
    chosen = linear_route(n, t, i, o).name
    ratio = (factors if chosen == "factors" else chunks) / min(factors, chunks)
    row = dict(n=n, t=t, i=i, o=o, route=chosen, ms_factors=factors, ms_chunks=chunks, ms_weight_gradient=gradient)
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row | {"ratio": ratio}).items()}


def main() -> None:
    grid = itertools.product(SAMPLES, POSITIONS, WIDTHS, WIDTHS)
    rows = [row for size in grid if (row := measure(*size)) is not None]
    about = environment()
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    ratios = [float(row["ratio"]) for row in rows]
    good = sum(ratio <= 1.15 for ratio in ratios)
    print(f"{good} of {len(rows)} within 15 % of the faster route ({good / len(rows):.1%}); the worst:")
    for row in sorted(rows, key=lambda row: -float(row["ratio"]))[:5]:
        print(*(f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
