"""Time both routes to the Gram matrix of a linear layer on a CPU: `python -m bench.routes`, four minutes.

Chunks of per-sample gradients against products of tokens, over a grid of sizes. The times go to routes_cpu.csv. Two
tables follow: how often the cost model of projgrad/ops/cost.py picks the faster route, and its constants beside the
values that fit these times best. A result that is wrong is not timed.
"""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from projgrad.experiments.benchmark.harness import timed
from projgrad.experiments.benchmark.layers import gram_by
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.ops.cost import CPU, TOKENS, Rates, linear_route

from .report import RESULTS

ROUTES = ("factors", "chunks")
SAMPLES, POSITIONS, WIDTHS = (1, 4, 16, 64, 128), (1, 4, 16, 64, 256), (16, 64, 256, 1024)
TINY = [(1, 1, 16, 16), (4, 16, 16, 64), (16, 4, 64, 64), (16, 16, 64, 16)]
FLOPS = 2e10  # a route above this is left out, and its combination with it
SECONDS = 0.3  # of measuring each combination
CLOSE = 1.15  # times the faster route: a choice as good as that
CONSTANTS = tuple(name for name in Rates._fields if name != "chunk")
BUDGETS = [megabytes << 20 for megabytes in (1, 2, 4, 8, 16, 32, 64)]  # bytes of one chunk
LARGE = [(64, 16, 256, 1024), (16, 256, 1024, 256), (64, 64, 256, 256)]  # layers of many chunks


def time_routes(n: int, t: int, i: int, o: int) -> dict | None:
    """Return the milliseconds of both routes and of the ordinary weight gradient: the best of interleaved rounds."""
    routes = [linear_route(n, t, i, o, only=name) for name in ROUTES]
    if max(route.flops for route in routes) > FLOPS:
        return None
    torch.manual_seed(0)
    a, b = torch.randn(n, t, i), torch.randn(n, t, o)
    results = [gram_by(route, a, b) for route in routes]
    if not (results[0] - results[1]).abs().max() <= 1e-4 * results[1].abs().max():
        raise ArithmeticError(f"the routes differ at n, t, i, o = {n}, {t}, {i}, {o}")
    weight = torch.empty(o, i)
    calls = [lambda r=r: gram_by(r, a, b) for r in routes]
    calls.append(lambda: torch.mm(b.flatten(0, 1).mT, a.flatten(0, 1), out=weight))
    once = sum(timed(call) for call in calls)
    rounds = max(5, min(100, int(SECONDS / once)))
    times = [[timed(call) for call in calls] for _ in range(rounds)]
    factors, chunks, gradient = (1e3 * min(column) for column in zip(*times, strict=True))
    chosen = linear_route(n, t, i, o).name
    ratio = (factors if chosen == "factors" else chunks) / min(factors, chunks)
    row = dict(n=n, t=t, i=i, o=o, route=chosen, ms_factors=factors, ms_chunks=chunks, ms_weight_gradient=gradient)
    return row | {"ratio": ratio}


def terms(n: int, t: int, i: int, o: int) -> dict[str, dict[str, float]]:
    """Return how often each constant counts in the time of each route, as `linear_route` adds them up."""
    factors, chunks = (linear_route(n, t, i, o, only=name) for name in ROUTES)
    product, pairs = 2 * n * t * i * o, n * t * (n * t + 1)
    down, across = -(-o // chunks.rows), -(-i // chunks.columns)
    each = "gram" if n * t <= TOKENS else "token_gram"
    return {
        "factors": {each: factors.flops, "pair": pairs / 2, "call": -(-n // factors.rows)},
        "chunks": {
            "product": product,
            "gram": chunks.flops - product,
            "element": n * i * o,
            "pack": n * t * (i * down + o * across),
            "call": down * across,
        },
    }


def nanoseconds(row: dict, rates: dict[str, float]) -> list[float]:
    """Return the times that the model gives both routes of a row, with these constants."""
    by_route = terms(*(int(row[size]) for size in "ntio"))
    return [sum(rates[name] * count for name, count in by_route[route].items()) for route in ROUTES]


def fit(rows: Iterable[dict]) -> dict[str, float]:
    """Return the constants, none negative, with the least squares of log(predicted / measured)."""
    counts = []
    for row in rows:
        by_route = terms(*(int(row[size]) for size in "ntio"))
        for route in ROUTES:
            measured = 1e6 * float(row[f"ms_{route}"])
            counts.append([by_route[route].get(name, 0) / measured for name in CONSTANTS])
    A = torch.tensor(counts, dtype=torch.float64)  # [times, constants]; A x is predicted / measured
    weights = A.new_ones(len(A), 1)
    for _ in range(20):  # A x - 1 is log(A x) √(A x) where that is small
        x = _non_negative(weights * A, weights)
        weights = (A @ x).clamp_min(1e-9).rsqrt()[:, None]
    return dict(zip(CONSTANTS, x.tolist(), strict=True))


def _non_negative(A: Tensor, y: Tensor) -> Tensor:
    """Solve A x = y by least squares; what comes out negative is left out, the most negative first."""
    kept = [k for k in range(A.shape[1]) if A[:, k].any()]
    while True:
        scale = A[:, kept].norm(dim=0)
        x = torch.linalg.lstsq(A[:, kept] / scale, y, driver="gelsd").solution[:, 0]  # few rows are solved too
        if bool((x >= 0).all()):
            return A.new_zeros(A.shape[1]).index_put((torch.tensor(kept),), x / scale)
        kept.pop(int(x.argmin()))


def good_choices(rows: list[dict], rates: dict[str, float]) -> int:
    """Return in how many rows the route chosen with these constants is about as fast as the faster one."""
    count = 0
    for row in rows:
        predicted, measured = nanoseconds(row, rates), [float(row[f"ms_{route}"]) for route in ROUTES]
        count += measured[0 if predicted[0] <= predicted[1] else 1] <= CLOSE * min(measured)
    return count


def chunk_times(n: int, t: int, i: int, o: int, rounds: int = 7) -> dict[int, float]:
    """Return the seconds of the Gram matrix by chunks, by the bytes of one chunk."""
    torch.manual_seed(0)
    a, b = torch.randn(n, t, i), torch.randn(n, t, o)
    routes = {budget: linear_route(n, t, i, o, budget=budget, only="chunks") for budget in BUDGETS}
    times = [{budget: timed(lambda r=r: gram_by(r, a, b)) for budget, r in routes.items()} for _ in range(rounds)]
    return {budget: min(seconds[budget] for seconds in times) for budget in BUDGETS}


def best_budget(sizes: Iterable[tuple[int, int, int, int]]) -> int:
    """Return the bytes of one chunk with which these layers take the least time, each in units of its best."""
    times = [chunk_times(*size) for size in sizes]
    return min(BUDGETS, key=lambda budget: sum(seconds[budget] / min(seconds.values()) for seconds in times))


def table(title: str, columns: tuple[str, ...], lines: Iterable[Iterable[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right")
    for line in lines:
        shown.add_row(*line)
    Console(width=120).print(shown)


def show(rows: list[dict], chunk: int | None) -> None:
    """Print how good the model's choices are, the worst of them, and its constants beside the fitted ones."""
    today, fitted = CPU._asdict(), fit(rows)
    for title, rates in (("today's constants", today), ("the fitted ones", fitted)):
        good = good_choices(rows, rates)
        print(f"{good} of {len(rows)} within {CLOSE - 1:.0%} of the faster route with {title} ({good / len(rows):.1%})")
    worst = sorted(rows, key=lambda row: -float(row["ratio"]))[:5]
    columns = ("n x t x i x o", "route", "ms factors", "ms chunks", "chosen / faster")
    keys = ("ms_factors", "ms_chunks", "ratio")
    sizes = [" x ".join(str(row[size]) for size in "ntio") for row in worst]
    lines = ([s, row["route"], *(f"{float(row[k]):.3g}" for k in keys)] for s, row in zip(sizes, worst, strict=True))
    table("The worst choices", columns, lines)
    values = [(name, today[name], fitted[name]) for name in CONSTANTS]
    lines = [[name, f"{old:.4g}", f"{new:.4g}", f"{new / old:.2f}"] for name, old, new in values]
    if chunk:
        lines.append(["chunk, MiB", str(today["chunk"] >> 20), str(chunk >> 20), f"{chunk / today['chunk']:.2f}"])
    columns = ("constant, ns", "today", "fitted", "fitted / today")
    table("Constants of projgrad/ops/cost.py: a common factor does not matter", columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for routes_cpu.csv")
    parser.add_argument("--tiny", action="store_true", help="four sizes, to try the command; into routes_cpu_tiny.csv")
    parser.add_argument("--refit", type=Path, metavar="FILE", help="measure nothing: the tables of this file")
    args = parser.parse_args()
    if args.refit:
        return show(read_csv(args.refit), None)
    sizes = TINY if args.tiny else list(itertools.product(SAMPLES, POSITIONS, WIDTHS, WIDTHS))
    rows = [row for size in sizes if (row := time_routes(*size)) is not None]
    path = args.out / f"routes_cpu{'_tiny' if args.tiny else ''}.csv"
    about = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, [row | about for row in rows], [*rows[0], *about])
    show(rows, best_budget(TINY[:2] if args.tiny else LARGE))
    print(path)


if __name__ == "__main__":
    main()
