"""Time and memory of a step as n, t and p grow: `python -m bench.growth [--axis NAME ...]`, ten minutes.

Each axis makes one size of an encoder larger and keeps the others: n samples, t positions, p parameters. A fourth one
is the small encoder of `bench.steps` at n = 256. Contenders: plain training, projgrad, and explicit per-sample
gradients (vmap) with QR or with their Gram matrix. What would not fit into `LIMIT` is not run, and its row says so.
Memory: the peak of a first step, which inspects the model, above the loaded model. Time: of the first step, and the
median of later ones, in which all contenders take one step each in turn; on the clock, and of the processors. All
updates are compared with one in float64, and ours is not timed where it is wrong.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import argparse
import contextlib
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import NamedTuple

import torch

from projgrad.experiments.benchmark.contenders import ALPHA
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.models import Job, encoder
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.benchmark.worker import Failed, Worker, complain, serve
from projgrad.experiments.comparison.memory import peak_memory

from .command import started
from .contenders import STEPS
from .report import RESULTS
from .steps import RESIDUAL_LIMIT, THREADS, UPDATE_LIMIT

LIMIT = 10 << 30  # bytes that a contender may take above the model
NAMES = ("plain", "projgrad global", "vmap + Gram", "vmap + QR")
ROUNDS = {"plain": 4, "projgrad global": 4, "vmap + Gram": 2, "vmap + QR": 1}  # after the first step
REFERENCE = "float64"  # is compared with, and is no contender
LETTERS = {"n": "samples n", "t": "positions t", "p": "parameters p", "encoder": "samples n, encoder of the README"}
COLUMNS = ("axis", "contender", "n", "t", "p", "width", "blocks", "ms", "ms_cpu", "first_ms", "first_ms_cpu", "rounds")
COLUMNS += ("peak_mb", "difference", "residual", "note")


class Point(NamedTuple):
    """One size: an encoder of `blocks` blocks of `width`, with n samples of t positions."""

    axis: str
    n: int
    t: int
    width: int
    blocks: int = 1

    def job(self) -> Job:
        torch.manual_seed(0)
        return Job(*encoder(self.width, self.blocks, self.t), self.n)

    @property
    def p(self) -> int:
        """Return the number of parameters: 12 d² + 13 d a block, 2 d of the last norm, 10 d + 10 of the head."""
        return self.blocks * (12 * self.width**2 + 13 * self.width) + 12 * self.width + 10

    @property
    def size(self) -> int:
        """Return what grows along the axis."""
        return {"t": self.t, "p": self.p}.get(self.axis, self.n)


POINTS = [Point("n", n, 16, 256) for n in (8, 32, 128, 256, 512)]
POINTS += [Point("t", 8, t, 256) for t in (32, 128, 512, 1024)]
POINTS += [Point("p", 8, 16, width) for width in (320, 896, 1664, 2880)]
POINTS += [Point("encoder", 256, 64, 256, 4)]
TINY = [Point("n", n, 4, 16) for n in (4, 8, 16)] + [Point("p", 4, 4, width) for width in (16, 32)]


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the milliseconds of one call on the clock and of the processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


# The worker's side.


def work(name: str, folder: str | None) -> None:
    """Answer with a step's milliseconds for a point that stays, or with `folder` the memory and result of one."""
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap runs attention sample by sample
    torch.set_num_threads(THREADS)
    start, at, step = exact if name == REFERENCE else STEPS[name].start, None, None

    def answer(question: str) -> dict:
        nonlocal at, step
        if question != at:
            at, step = question, None  # of the point before: its memory is free now
            job = named(question).job()
            step = start(job)
            if folder:
                return one_step(job, step, Path(folder) / name)
        return dict(zip(("ms", "ms_cpu"), timed(step), strict=True))

    try:
        start(Point("", 4, 4, 16).job())()  # code that is loaded once is not measured
        serve(answer)
    except Exception as error:
        complain(error)


def exact(job: Job) -> Callable[[], object]:
    """Start a step in float64: one backward pass for every retain sample, and their Gram matrix."""

    def step() -> None:
        job.model.double()
        job.samples = [(x.double(), y) for x, y in job.samples]
        params = list(job.model.parameters())
        u, losses = torch.autograd.grad(job.forget(), params), job.retain()
        G = [p.new_empty(len(losses), p.numel()) for p in params]
        for j, loss in enumerate(losses):
            for rows, g in zip(G, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
                rows[j] = g.flatten()
        K = sum(rows @ rows.mT for rows in G)
        v = sum(rows @ f.flatten() for rows, f in zip(G, u, strict=True))
        weights = ALPHA / len(K) + (1 - ALPHA) * torch.linalg.solve(K, v)
        for p, rows, f in zip(params, G, u, strict=True):
            p.grad = (weights @ rows).view_as(p) - (1 - ALPHA) * f

    return step


def named(question: str) -> Point:
    """Return the point that a question names."""
    axis, *sizes = question.split()
    return Point(axis, *map(int, sizes))


def one_step(job: Job, step: Callable[[], object], file: Path) -> dict:
    """Return the peak memory of a step and the residual that projgrad reports; the update is left in a file."""
    with peak_memory() as peak:
        record = step()
    torch.save(torch.cat([p.grad.flatten() for p in job.model.parameters()]), file)
    return {"peak_mb": peak.bytes and peak.bytes / 1e6, "residual": getattr(record, "residual", None)}


# The asking side.


class Team:
    """A worker for every contender, started when it is first asked and dropped when it fails."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder, self.stack, self.workers = folder, contextlib.ExitStack(), {}

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *details: object) -> None:
        self.stack.close()

    def ask(self, name: str, point: Point) -> dict:
        if name not in self.workers:
            arguments, variables = ["-m", "bench.growth", "--worker", name], {}
            if self.folder:
                arguments += ["--folder", self.folder]
                variables["MALLOC_MMAP_THRESHOLD_"] = (
                    "65536"  # freed memory leaves at once: the peak is what was needed
                )
            self.workers[name] = self.stack.enter_context(Worker(arguments, variables))
        try:
            return self.workers[name].ask(" ".join(map(str, point)))
        except Failed:
            del self.workers[name]
            raise


def measure_memory(points: Sequence[Point], limit: float = LIMIT) -> list[dict]:
    """Return a row for every point and contender, with its memory, and a note where it is wrong or was not run."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Team(folder) as team:
        bytes_each: dict[tuple[str, str], float] = {}  # of an entry of G, at the point before on the axis
        for point in points:
            results = {}
            for name in NAMES if point.axis != "encoder" else NAMES[:2]:
                row = dict.fromkeys(COLUMNS) | point._asdict() | {"p": point.p, "contender": name, "note": ""}
                rows.append(row)
                expected = point.n * point.p * bytes_each.get((point.axis, name), 4.0)
                if name.startswith("vmap") and expected > limit:
                    row["note"] = f"not run: about {expected / 2**30:.0f} GiB"
                    continue
                try:
                    row |= team.ask(name, point)
                except Failed as error:
                    row["note"] = str(error)
                    continue
                if row["peak_mb"]:
                    bytes_each[point.axis, name] = 1e6 * row["peak_mb"] / (point.n * point.p)
                results[name] = row
            team.ask(REFERENCE, point)
            check(results, Path(folder))
    return rows


def check(results: dict[str, dict], folder: Path) -> None:
    """Add to a point's rows how far the updates are from that in float64, and note whether projgrad's is wrong."""
    exact = torch.load(folder / REFERENCE)
    for name, row in results.items():
        if name != "plain":
            row["difference"] = float((torch.load(folder / name) - exact).norm() / exact.norm())
    ours = results.get(NAMES[1])
    if ours is None:
        return
    if not ours["difference"] <= UPDATE_LIMIT:
        ours["note"] = f"wrong: differs from float64 by {ours['difference']:.0e}"
    if not ours["residual"] <= RESIDUAL_LIMIT:
        ours["note"] = f"wrong: residual {ours['residual']:.0e}"


def measure_time(rows: list[dict], rounds: dict[str, int]) -> None:
    """Add the times: the contenders of a point take one step each in turn."""
    with Team() as team:
        for point, some in by_point(rows):
            times: dict[str, list[dict]] = {row["contender"]: [] for row in some if not row["note"]}
            for i in range(1 + max(rounds.values())):
                for row in some:
                    name = row["contender"]
                    if row["note"] or i > rounds[name]:
                        continue
                    try:
                        times[name].append(team.ask(name, point))
                    except Failed as error:
                        row["note"] = str(error)
            for row in some:
                if not row["note"]:
                    first, *later = times[row["contender"]]
                    row |= {f"first_{key}": value for key, value in first.items()} | {"rounds": len(later)}
                    row |= {key: median(step[key] for step in later) for key in first}
            print(
                " ".join(map(str, point)),
                *(f"{row['contender']} {row['ms'] or row['note']}" for row in some),
                flush=True,
            )


def by_point(rows: Iterable[dict]) -> Iterator[tuple[Point, list[dict]]]:
    """Yield every point with its rows, in the order of the rows; as measured or as read from a file."""
    points: dict[Point, list[dict]] = {}
    for row in rows:
        sizes = (int(row[size]) for size in ("n", "t", "width", "blocks"))
        points.setdefault(Point(row["axis"], *sizes), []).append(row)
    yield from points.items()


def curve(rows: Sequence[dict], axis: str, contender: str, column: str) -> tuple[list[int], list[float]]:
    """Return the sizes along an axis and what was measured there; rows as read from a file."""
    pairs = [
        (point.size, float(row[column]))
        for point, some in by_point(rows)
        for row in some
        if (row["axis"], row["contender"]) == (axis, contender) and row[column]
    ]
    return [size for size, _ in pairs], [value for _, value in pairs]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the e of values ~ sizesᵉ, by least squares of the logarithms over the larger half of the points."""
    if len(sizes) < 2:
        return None
    half = slice(-(len(sizes) // 2 + 1), None)
    return linear_regression(*([math.log(value) for value in some[half]] for some in (sizes, values))).slope


def draw(rows: Sequence[dict], axis: str, path: Path) -> None:
    """Draw time and memory along one axis, both on logarithmic scales."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "projgrad"  # the same rows give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    titles = {"ms_cpu": "milliseconds of the processors, a step", "peak_mb": "peak MB above the model"}
    for panel, (column, title) in zip(axes, titles.items(), strict=True):
        for name, color in zip(NAMES, ("0.6", "C0", "C1", "C3"), strict=True):
            panel.loglog(*curve(rows, axis, name, column), "o-", color=color, label=name, markersize=4)
        panel.set_xlabel(LETTERS[axis])
        panel.set_title(title, fontsize=9)
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", nargs="+", choices=LETTERS, default=list(LETTERS), help="what grows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for growth_cpu.csv and its pictures")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the command; into growth_cpu_tiny")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.folder)
    rows = measure_memory([point for point in (TINY if args.tiny else POINTS) if point.axis in args.axis])
    measure_time(rows, dict.fromkeys(NAMES, 1) if args.tiny else ROUNDS)
    path, about = args.out / f"growth_cpu{'_tiny' if args.tiny else ''}.csv", environment()
    measured = {row["axis"] for row in rows}
    others = [row for row in read_csv(path) if row["axis"] not in measured] if path.exists() else []
    merged = sorted([*(row | about for row in rows), *others], key=lambda row: list(LETTERS).index(row["axis"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, merged, [*COLUMNS, *about])
    for axis in measured - {"encoder"}:
        draw(read_csv(path), axis, path.with_name(f"{path.stem}_{axis}.svg"))
    print(path)
    sys.exit(any(row["note"].startswith("wrong") for row in rows))


if __name__ == "__main__":
    started(main)
