"""Steps under metric="optimizer" over a retain set in micro-batches: `python -m bench.micro_batches_metric`.

AdamW, after 20 plain steps that give it a state. A plain step over the same data, one with the union of all
micro-batches and one with a single batch, each in a process of its own. `distance` is from that, `cosine` the
largest of a retain gradient and what the parameters changed by for forgetting, at the weights before the step. `passes`
counts the calls of every closure. Memory is the peak above the model and the state of AdamW. Times are not taken.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import projgrad
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.benchmark.worker import Failed, Worker, complain, serve
from projgrad.experiments.comparison.memory import peak_memory

from .command import started
from .micro_batches import CASES, THREADS, N, Problem
from .report import RESULTS

NAME, STEPS = "micro_batches_metric_cpu.csv", 20
COLUMNS = ("case", "model", "micro_batches", "contender", "passes", "iterations", "distance", "cosine", "residual")
COLUMNS += ("estimated_error", "preserved_norm", "peak_mb", "note")
CONTENDERS = ("plain", *(f"{way}, {scope}" for scope in ("global", "per_tensor") for way in ("one batch", "projgrad")))


class MetricProblem(Problem):
    """The same decoder with an AdamW that has a state."""

    def __init__(self, case: str, count: int) -> None:
        super().__init__(case, count)
        self.calls = 0
        self.adamw = torch.optim.AdamW(self.model.parameters(), 1e-3)
        for k in range(STEPS):
            self.adamw.zero_grad()
            self.losses(*self.retain_samples[k % count]).mean().backward()
            self.adamw.step()
        self.adamw.zero_grad()

    def counted(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.losses(x, y)

    def parts(self) -> list[Callable[[], Tensor]]:
        return projgrad.micro_batches(self.counted, self.retain_samples)

    def take(self, contender: str) -> projgrad.StepRecord | None:
        """Take a step."""
        if contender == "plain":
            self.adamw.zero_grad()
            (-0.5 * self.forget()).backward()
            for part in self.parts():
                (0.5 / len(self.retain_samples) * part().mean()).backward()
            return self.adamw.step()
        way, _, scope = contender.partition(", ")
        unlearner = projgrad.OrthoGrad(self.model, self.adamw, 0.5, scope=scope, metric="optimizer")
        return unlearner.step(self.forget, self.one_batch if way == "one batch" else self.parts())


def measured(case: str, count: int, contender: str) -> tuple[dict, Tensor]:
    """Take one step; return its numbers, and `.grad` after it."""
    problem = MetricProblem(case, count)
    start = copy.deepcopy((problem.model.state_dict(), problem.adamw.state_dict()))
    problem.take(contender)  # a warm-up: it inspects the graph
    problem.model.load_state_dict(start[0])
    problem.adamw.load_state_dict(start[1])
    problem.adamw.zero_grad()
    problem.calls = 0
    with peak_memory() as peak:
        record = problem.take(contender)
    row = {"peak_mb": peak.bytes and peak.bytes / 1e6, "passes": problem.calls // count or 1}
    if record is not None:
        row |= {key: getattr(record, key) for key in ("iterations", "residual", "estimated_error", "preserved_norm")}
        problem.model.load_state_dict(start[0])
        row["cosine"] = problem.cosine()
    return row, problem.update()


def work(case: str, count: int, contender: str, file: str) -> None:
    """Measure one contender, on the worker's side."""

    def answer(_: str) -> dict:
        row, update = measured(case, count, contender)
        torch.save(update, file)
        return row

    try:
        serve(answer)
    except Exception as error:
        complain(error)


def rows_of(case: str, count: int, folder: Path) -> list[dict]:
    """Measure everything with so many micro-batches."""
    (d, layers, tokens, vocabulary), steps = CASES[case]
    model = f"decoder d = {d}, {layers} layers, {tokens} tokens, vocabulary {vocabulary}, {steps} steps of training"
    rows, updates = [], {}
    for name in CONTENDERS:
        if count == 1 and name.startswith("projgrad"):
            continue
        row = {"case": case, "model": model, "micro_batches": count, "contender": name, "note": ""}
        file = folder / name
        arguments = ["-m", "bench.micro_batches_metric", "--worker", case, str(count), name, str(file)]
        try:
            with Worker(arguments, {"MALLOC_MMAP_THRESHOLD_": "65536"}) as worker:  # the peak is what was needed
                row |= worker.ask()
            updates[name] = torch.load(file).double()
        except Failed as error:
            row["note"] = str(error)
        one = updates.get(name.replace("projgrad", "one batch"))
        if name in updates and one is not None and name != "plain":
            row["distance"] = float((updates[name] - one).norm() / one.norm())
        rows.append(row)
        print({key: value for key, value in row.items() if key != "model"}, flush=True)
    return rows


def metric_table() -> str:
    """Return the table of docs/micro_batches.md about the metric of the optimizer."""
    rows = read_csv(RESULTS / NAME)
    head = ("model", f"micro-batches of {N}", "scope", "passes", "distance from one batch", "largest cosine")
    lines = [
        f"Steps in float32 on {rows[0]['threads']} threads, {rows[0]['device']}, torch {rows[0]['torch']}, commits "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}; AdamW, tolerance 1e-4:",
        "",
        f"| {' | '.join((*head, 'MB: union', 'plain', 'one batch'))} |",
        "|---" * 9 + "|",
    ]
    by_name = {(row["case"], row["micro_batches"], row["contender"]): row for row in rows}
    for (case, count, name), row in by_name.items():
        way, _, scope = name.partition(", ")
        if row["note"] or way == "plain" or (way == "one batch" and count != "1"):
            continue
        others = [by_name.get((case, count, other)) for other in ("plain", f"one batch, {scope}")]
        numbers = [row["distance"], row["cosine"], *(r and r["peak_mb"] for r in (row, *others))]
        cells = [row["model"].replace(", 0 steps of training", ", not trained"), count, scope, row["passes"]]
        cells += [format(float(number), ".3g") if number else "-" for number in numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["decoder", "fitted"], metavar="NAME")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 16], help="micro-batches [1 4 16]")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {NAME}")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore", "after .* passes over")  # the columns say so
    if args.worker:
        case, count, name, file = args.worker
        return work(case, int(count), name, file)
    rows, about = [], environment()
    for case in args.case:
        for count in args.counts:
            with tempfile.TemporaryDirectory() as folder:
                rows += [row | about for row in rows_of(case, count, Path(folder))]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / NAME, rows, [*COLUMNS, *about])


if __name__ == "__main__":
    started(main)
