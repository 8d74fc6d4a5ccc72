"""What steps with AdamW cost: the decoders, and adapters, on a CPU, `python -m bench.applied_cost`.

Every contender has a process of its own, and all take one step each in turn. Memory: the peak of a first step, which
makes the optimizer's state too, and of two later ones, above what there was before these; and of all three above the
loaded model, which is what a run needs.
"""

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import torch

from projgrad.experiments.benchmark.contenders import orthograd, plain
from projgrad.experiments.benchmark.harness import spread, timed
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.models import LEARNING_RATE, Job
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.benchmark.worker import Worker, complain, serve
from projgrad.experiments.comparison.memory import peak_memory, resident

from .command import started
from .contenders import ADAPTED, CASES, Case
from .report import RESULTS

CONTENDERS = {
    "plain": plain,
    "gradient": orthograd(),
    "gradient, per tensor": orthograd(scope="per_tensor"),
    "optimizer": orthograd(metric="optimizer"),
    "optimizer, per tensor": orthograd(metric="optimizer", scope="per_tensor"),
}
MODELS = {case.name: case for case in [*CASES, *ADAPTED] if case.name.startswith(("decoder", "adapters"))}
TIME, MEMORY = 2.0, 1.25  # at most, in units of plain
PEAKS = ("first", "later", "run")
COLUMNS = ("case", "model", "contender", "ms", "ms_20", "ms_80", "rounds", "time_over_plain", "first_mb")
COLUMNS += ("first_over_plain", "later_mb", "later_over_plain", "run_mb", "run_over_plain", "residual")


def job_of(case: Case, small: bool = False) -> Job:
    job = case.job(small)
    job.optimizer = torch.optim.AdamW(job.model.parameters(), lr=LEARNING_RATE)
    return job


def worker(case: Case, contender: str, memory: bool) -> Worker:
    """Start a process that measures the time of a step, or the memory of three."""
    # Freed memory leaves at once: the peak is what was needed.
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536"} if memory else {}
    return Worker(
        ["-m", "bench.applied_cost", "--worker", case.name, contender, "memory" if memory else "time"], variables
    )


def work(case: Case, contender: str, what: str) -> None:
    """Answer every line of input, on the worker's side."""
    try:
        start = CONTENDERS[contender]
        start(job_of(case, small=True))()
        step = start(job_of(case))
        serve(lambda _: three_steps(step) if what == "memory" else {"seconds": timed(step)})
    except Exception as error:
        complain(error)


def three_steps(step: Callable[[], object]) -> dict:
    loaded = resident("VmRSS")
    with peak_memory() as first:
        step()
    kept = resident("VmRSS") - loaded
    with peak_memory() as later:
        for _ in range(2):
            record = step()
    peaks = {"first": first.bytes, "later": later.bytes, "run": max(first.bytes, kept + later.bytes)}
    return {f"{name}_mb": bytes / 1e6 for name, bytes in peaks.items()} | {
        "residual": getattr(record, "residual", None)
    }


def measure(case: Case, rounds: int) -> list[dict]:
    rows = {}
    for name in CONTENDERS:
        with worker(case, name, memory=True) as process:
            rows[name] = {"case": case.name, "model": f"{case.title}, n = {case.n}, AdamW", "contender": name}
            rows[name] |= process.ask()
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(case, name, memory=False)) for name in CONTENDERS}
        for i in range(-2, rounds):
            for name, process in workers.items():
                taken = process.ask()["seconds"]
                if i >= 0:
                    seconds[name].append(taken)
    for name, row in rows.items():
        middle = (1e3 * t for t in spread(seconds[name]))
        row |= dict(zip(("ms", "ms_20", "ms_80"), middle, strict=True)) | {"rounds": rounds}
    for row in rows.values():
        for ratio, column in (("time", "ms"), *((name, f"{name}_mb") for name in PEAKS)):
            row[f"{ratio}_over_plain"] = row[column] / rows["plain"][column]
    return list(rows.values())


def table(prefix: str) -> str:
    """Return the table of the cases whose names begin like this; limits of time and memory are in the documents."""
    rows = [row for row in read_csv(RESULTS / "applied_cost.csv") if row["case"].startswith(prefix)]
    lines = [
        f"Multiples of a plain step, medians of {rows[0]['rounds']} rounds in turn, float32, {rows[0]['threads']} "
        f"threads, {rows[0]['device']}, torch {rows[0]['torch']}, "
        f"commits {', '.join(dict.fromkeys(row['commit'] for row in rows))}:",
        "",
        "| model | step | time | memory, first step | memory, later steps | memory, whole run |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["contender"] == "plain":
            cells = [row["model"], "plain", f"{float(row['ms']):,.0f} ms"]
            cells += [f"{float(row[column]):,.0f} MB" for column in ("first_mb", "later_mb", "run_mb")]
        else:
            metric, _, scope = row["contender"].partition(", ")
            cells = ["", f'`metric="{metric}"`' + (f", {scope}" if scope else "")]
            cells += [f"{float(row[f'{what}_over_plain']):.2f} x" for what in ("time", *PEAKS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, help="timed steps, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for applied_cost.csv")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        name, contender, what = args.worker
        return work(MODELS[name], contender, what)
    path, about = args.out / "applied_cost.csv", environment()
    for name in args.case:
        rows = measure(MODELS[name], max(2, args.repeats or MODELS[name].rounds))
        for row in rows:
            time, *peaks = (f"{row[f'{what}_over_plain']:.2f} x" for what in ("time", *PEAKS))
            print(
                f"{name}, {row['contender']}: time {time} (at most {TIME}), memory of the first step, later ones, the "
                f"run {', '.join(peaks)} (at most {MEMORY})",
                flush=True,
            )
        others = [row for row in read_csv(path) if row["case"] != name] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, [*others, *(row | about for row in rows)], [*COLUMNS, *about])


if __name__ == "__main__":
    started(main)
