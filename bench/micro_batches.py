"""Retain sets in micro-batches of 16 samples: `python -m bench.micro_batches [--case NAME ...] [--counts 1 4 16 64]`.

A plain step over the same data, one with the union of all micro-batches, and one with a single batch where its memory
allows: each in a process of its own, in which plain steps are timed too. `over_plain` is a ratio of CPU seconds, which
other work on the machine disturbs less. Memory is the peak above the loaded model. `distance` is from the step with one
batch, relative, `cosine` the largest of a retain gradient and the forgetting part, measured for all alike.
What else is done with micro-batches stands beside it: projections one after the other, their sum and mean, and a basis
that is kept while the weights move on.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import projgrad
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.models import Decoder, Job, text
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.benchmark.worker import Failed, Worker, complain, serve
from projgrad.experiments.comparison.memory import peak_memory

from .command import started
from .report import RESULTS

THREADS, N = 2, 16
CASES = {  # width, layers, tokens, vocabulary; steps of training on the retain set
    "decoder": ((128, 2, 32, 500), 0),
    "fitted": ((64, 2, 32, 200), 300),
    "tiny": ((16, 1, 8, 20), 5),
}
LARGEST_BATCH = {"decoder": 64, "fitted": 16, "tiny": 4}  # micro-batches whose samples fit one batch
COLUMNS = (
    "case",
    "model",
    "micro_batches",
    "contender",
    "seconds",
    "cpu_seconds",
    "over_plain",
    "peak_mb",
    "passes",
    "iterations",
)
COLUMNS += ("distance", "cosine", "estimated_error", "preserved_norm", "note")


class Problem:
    """A decoder, forget samples, and a retain set of `count` micro-batches."""

    def __init__(self, case: str, count: int) -> None:
        torch.manual_seed(0)
        sizes, steps = CASES[case]
        self.model = Decoder(*sizes)
        batch = text(*sizes[2:])
        self.forget_samples = batch(N)
        self.retain_samples = [batch(N) for _ in range(count)]
        adam = torch.optim.Adam(self.model.parameters(), 3e-3)
        for k in range(steps):
            adam.zero_grad()
            self.losses(*self.retain_samples[k % count]).mean().backward()
            adam.step()
        self.model.zero_grad()

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return Job.losses(self.model(x), y)

    def forget(self) -> Tensor:
        return self.losses(*self.forget_samples).mean()

    def parts(self) -> list[Callable[[], Tensor]]:
        return projgrad.micro_batches(self.losses, self.retain_samples)

    def one_batch(self) -> Tensor:
        return self.losses(*(torch.cat(part) for part in zip(*self.retain_samples, strict=True)))

    def step(self, retain: object, alpha: float = 0.0, lr: float = 0.0, **options: object) -> projgrad.StepRecord:
        """Take a step, by default of forgetting alone that leaves the weights where they are."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr)
        return projgrad.OrthoGrad(self.model, optimizer, alpha, **options).step(self.forget, retain)

    def plain(self) -> None:
        """Take the same step without projection, with accumulated gradients."""
        optimizer = torch.optim.SGD(self.model.parameters(), 0.0)
        optimizer.zero_grad()
        (-0.5 * self.forget()).backward()
        for part in self.parts():
            (0.5 / len(self.retain_samples) * part().mean()).backward()
        optimizer.step()

    def update(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def cosine(self) -> float:
        """Return the largest |cos| of `.grad` and a retain gradient, from products of the tape."""
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        norm, worst = self.update().double().norm(), 0.0
        for part in self.parts():
            with projgrad.per_sample(self.model) as tape:
                losses = part()
            cosines = tape.dot(losses, grads).abs() / tape.gram(losses).diagonal().sqrt() / norm
            worst = max(worst, float(cosines.max()))
        return worst

    # What is done by hand.

    def project_(self, part: Callable[[], Tensor]) -> None:
        with projgrad.per_sample(self.model) as tape:
            losses = part()
        tape.project_(losses)

    def in_turn(self) -> None:
        """Project on the complement of one micro-batch after the other."""
        self.forget().backward()
        for part in self.parts():
            self.project_(part)

    def summed(self, weight: float) -> None:
        """Take away the sum of the projections on the micro-batches, times a weight."""
        self.forget().backward()
        u = [p.grad.clone() for p in self.model.parameters()]
        total = [g.clone() for g in u]
        for part in self.parts():
            for p, g in zip(self.model.parameters(), u, strict=True):
                p.grad = g.clone()
            self.project_(part)
            for p, g, t in zip(self.model.parameters(), u, total, strict=True):
                t.sub_(g - p.grad, alpha=weight)
        for p, t in zip(self.model.parameters(), total, strict=True):
            p.grad = t

    def kept_basis(self, steps: int) -> None:
        """Project with an orthonormal basis of the retain gradients as they were some steps before."""
        rows = []
        for part in self.parts():
            with projgrad.per_sample(self.model) as tape:
                losses = part()
            rows.append(torch.cat([g.flatten(1) for g in tape.rows(losses).values()], 1))
        Q = torch.linalg.qr(torch.cat(rows).mT).Q
        for _ in range(steps):
            self.step(self.one_batch, 0.5, 0.05, max_norm=1.0)
        self.model.zero_grad()
        self.forget().backward()
        u = self.update()
        u -= Q @ (Q.mT @ u)
        sizes = [p.numel() for p in self.model.parameters()]
        for p, g in zip(self.model.parameters(), u.split(sizes), strict=True):
            p.grad = g.view_as(p)


def contenders(case: str, count: int) -> dict[str, Callable[[Problem], projgrad.StepRecord | None]]:
    """Return what is done with so many micro-batches, by name."""
    ways = {"plain": Problem.plain}
    for scope in ("global", "per_tensor"):
        if count <= LARGEST_BATCH[case]:
            ways[f"one batch, {scope}"] = lambda problem, scope=scope: problem.step(problem.one_batch, scope=scope)
        if count > 1:
            ways[f"projgrad {scope}"] = lambda problem, scope=scope: problem.step(problem.parts(), scope=scope)
    if 1 < count <= LARGEST_BATCH[case]:
        ways["one after the other"] = Problem.in_turn
        ways["sum of projections"] = lambda problem: problem.summed(1.0)
        ways["mean of projections"] = lambda problem: problem.summed(1 / count)
    if count == 4:
        ways["unprojected"] = lambda problem: problem.forget().backward()
        for steps in (0, 1, 5, 20):
            ways[f"basis kept for {steps} steps"] = lambda problem, steps=steps: problem.kept_basis(steps)
    return ways


def work(case: str, count: int, name: str, file: str) -> None:
    """Measure one contender, on the worker's side."""

    def answer(_: str) -> dict:
        problem = Problem(case, count)
        samples = problem.retain_samples
        if "global" in name or "per_tensor" in name:  # a warm-up of the same model: it inspects the graph
            problem.retain_samples = samples if "batch" in name else samples[:2]
            contenders(case, count)[name](problem)
            problem.retain_samples = samples
        else:
            problem.plain()
        problem.model.zero_grad()
        with peak_memory() as peak:
            start = time.perf_counter(), time.process_time()
            record = contenders(case, count)[name](problem)
            seconds, used = time.perf_counter() - start[0], time.process_time() - start[1]
        row = {"seconds": seconds, "cpu_seconds": used, "peak_mb": peak.bytes and peak.bytes / 1e6}
        if name != "plain":
            torch.save(problem.update(), file)
            row["cosine"] = problem.cosine()
        if record is not None:
            row |= {key: getattr(record, key) for key in ("iterations", "estimated_error", "preserved_norm")}
            row["passes"] = record.iterations + 1
            start = time.process_time()
            for _ in range(2):
                problem.plain()
            row["over_plain"] = 2 * used / (time.process_time() - start)
        return row

    try:
        serve(answer)
    except Exception as error:
        complain(error)


def rows_of(case: str, count: int, folder: Path) -> list[dict]:
    """Measure everything with so many micro-batches."""
    (d, layers, tokens, vocabulary), steps = CASES[case]
    model = f"decoder d = {d}, {layers} layers, {tokens} tokens, vocabulary {vocabulary}, {steps} steps of training"
    rows: dict[str, dict] = {}
    for name in contenders(case, count):
        row = {"case": case, "model": model, "micro_batches": count, "contender": name, "note": ""}
        arguments = ["-m", "bench.micro_batches", "--worker", case, str(count), name, str(folder / name)]
        try:
            with Worker(arguments, {"MALLOC_MMAP_THRESHOLD_": "65536"}) as worker:  # the peak is what was needed
                row |= worker.ask()
        except Failed as error:
            row["note"] = str(error)
        rows[name] = row
        reference = folder / f"one batch, {'per_tensor' if 'per_tensor' in name else 'global'}"
        if (folder / name).exists() and reference.exists() and "kept" not in name:
            found, truth = (torch.load(path).double() for path in (folder / name, reference))
            row["distance"] = float(min((found - sign * truth).norm() for sign in (1, -1)) / truth.norm())  # or -u
        shown = {key: row[key] for key in COLUMNS[4:] if row.get(key)}
        values = (
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        )
        print(f"{case:8} {count:3} {name:24}", ", ".join(values), flush=True)
    return list(rows.values())


def _number(row: dict | None, column: str, form: str = ".3g") -> str:
    return format(float(row[column]), form) if row and row[column] else "-"


def _model(row: dict) -> str:
    return row["model"].replace(", 0 steps of training", ", not trained")


def union_table() -> str:
    """Return the table of docs/micro_batches.md about the union."""
    rows = read_csv(RESULTS / "micro_batches_cpu.csv")
    lines = [
        f"Steps in float32 on {rows[0]['threads']} threads, {rows[0]['device']}, torch {rows[0]['torch']}, commits "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}; tolerance 1e-4:",
        "",
        "| model | micro-batches of 16 | scope | passes | distance from one batch | largest cosine | CPU time / plain "
        "step | MB: union | plain | one batch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, count in dict.fromkeys((row["case"], row["micro_batches"]) for row in rows):
        by_name = {row["contender"]: row for row in rows if (row["case"], row["micro_batches"]) == (case, count)}
        for scope in ("global", "per_tensor"):
            one = by_name.get(f"one batch, {scope}")
            ours = by_name.get(f"projgrad {scope}", one if count == "1" else None)
            if ours is None or ours["note"]:
                continue
            cells = [_model(ours), count, scope, ours["passes"], *(_number(ours, k) for k in ("distance", "cosine"))]
            cells += [_number(ours, "over_plain"), *(_number(r, "peak_mb") for r in (ours, by_name["plain"], one))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_hand_table() -> str:
    """Return the table of docs/micro_batches.md about what is done by hand."""
    lines = ["| model | micro-batches of 16 | what is done | distance from one batch | largest cosine |"]
    lines.append("|---|---|---|---|---|")
    names = ("unprojected", "one after the other", "sum of projections", "mean of projections", "basis kept for")
    for row in read_csv(RESULTS / "micro_batches_cpu.csv"):
        if row["contender"].startswith(names) and not row["note"]:
            cells = [_model(row), row["micro_batches"], row["contender"], _number(row, "distance")]
            lines.append(f"| {' | '.join([*cells, _number(row, 'cosine')])} |")
    return "\n".join(lines)


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["decoder", "fitted"], metavar="NAME")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 16, 64], help="micro-batches [1 4 16 64]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of micro_batches_cpu.csv")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore", "after .* passes over")  # the columns say so
    if args.worker:
        case, count, name, file = args.worker
        return work(case, int(count), name, file)
    about, path = environment(), args.out / "micro_batches_cpu.csv"
    for case in args.case:
        for count in args.counts:
            with tempfile.TemporaryDirectory() as folder:
                rows = rows_of(case, count, Path(folder))
            key = case, str(count)
            kept = (
                [row for row in read_csv(path) if (row["case"], row["micro_batches"]) != key] if path.exists() else []
            )
            kept += [row | about for row in rows]
            kept.sort(key=lambda row: (list(CASES).index(row["case"]), int(row["micro_batches"])))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_csv(path, kept, [*COLUMNS, *about])


if __name__ == "__main__":
    started(main)
