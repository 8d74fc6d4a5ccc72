"""Whole unlearning steps against plain training, vmap and QR: `python -m bench.steps [--case NAME ...]`.

Here those on a CPU; `--device cuda` measures those of `steps_cuda.py`.
Every contender has a process of its own. Memory: the peak of three steps above the loaded model, in a fresh process;
the first of them inspects the model.
Time: the contenders of a case take one step each in turn, so that all meet the same machine. A result that is wrong is
not timed. `--profile CASE CONTENDER` shows where the time of one step goes.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import argparse
import contextlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from projgrad.experiments.benchmark.harness import spread, timed
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.models import Job
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.benchmark.worker import Failed, Worker, complain, serve
from projgrad.experiments.comparison.memory import peak_memory

from .command import add_device, chosen_device, started
from .contenders import CASES, Case, Contender
from .report import RESULTS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

THREADS = 2
UPDATE_LIMIT, GRAM_LIMIT = 1e-4, 1e-5  # relative difference from float32 QR, and from a float32 Gram matrix
RESIDUAL_LIMIT = 1e-6
RATIOS = ("over_plain", "at_most", "over_ours", "at_least")
COLUMNS = ("case", "model", "contender", "ms", "ms_20", "ms_80", "rounds", *(f"time_{ratio}" for ratio in RATIOS))
COLUMNS += ("peak_mb", *(f"memory_{ratio}" for ratio in RATIOS), "later_mb", "later_over_plain")
COLUMNS += ("difference", "residual", "note")


def worker(case: Case, contender: str, result: Path | None = None) -> Worker:
    """Start a process that measures one contender: the time of a step, or with `result` the memory of three."""
    arguments, variables = ["-m", case.command, "--worker", case.name, contender], {}
    if result:
        arguments += ["--result", str(result)]
        variables["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory leaves at once: the peak is what was needed
    return Worker(arguments, variables)


def work(case: Case, contender: Contender, result: str | None) -> None:
    """Answer every line of input, on the worker's side: seconds of a step, or memory and result of three steps."""
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap runs attention sample by sample
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # opacus on the first layer
    try:
        if result:
            contender.start(case.job(small=True))()
        job = case.job()
        step = contender.start(job)
        serve(lambda _: three_steps(job, step, result) if result else {"seconds": timed(step)})
    except Exception as error:
        complain(error)


def three_steps(job: Job, step: Callable[[], object], file: str) -> dict:
    """Return the peak memory of three steps and of the later ones, and the residual that the last one reports.

    The update of the last one, or the Gram matrix, is left in a file.
    """
    with peak_memory() as first:
        step()
    job.optimizer.zero_grad()
    with peak_memory() as later:
        for _ in range(2):
            out = step()
    whole = not isinstance(out, torch.Tensor)  # its update is in .grad
    torch.save(torch.cat([p.grad.flatten() for p in job.model.parameters()]) if whole else out, file)
    peaks = [peak.bytes and peak.bytes / 1e6 for peak in (first, later)]
    residual = getattr(out, "residual", None)
    return {"peak_mb": None if None in peaks else max(peaks), "later_mb": peaks[1], "residual": residual}


def check(case: Case, rows: dict[str, dict], folder: Path) -> None:
    """Add the relative difference of every result from its reference, and a note where it is wrong."""
    for name, row in rows.items():
        reference = case.contenders[name].reference
        if row["note"] or reference is None:
            continue
        if rows[reference]["note"]:
            row["note"] = f"unchecked: {reference} failed"
            continue
        mine, theirs = (torch.load(folder / file).double() for file in (name, reference))
        row["difference"] = float((mine - theirs).norm() / theirs.norm())
        if not row["difference"] <= (UPDATE_LIMIT if mine.ndim == 1 else GRAM_LIMIT):
            row["note"] = f"wrong: differs from {reference} by {row['difference']:.0e}"
        elif row["residual"] is not None and not row["residual"] <= RESIDUAL_LIMIT:
            row["note"] = f"wrong: residual {row['residual']:.0e}"


def interleave(case: Case, rows: dict[str, dict], rounds: int) -> None:
    """Time one step of every contender in turn; two rounds are warm-up, for the slow contenders one."""
    seconds = {name: [] for name, row in rows.items() if not row["note"]}
    slow_rounds = max(2, min(3, rounds // 2))
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(case, name)) for name in seconds}
        for i in range(-2, rounds):
            for name in list(workers):
                if case.contenders[name].slow and not -1 <= i < slow_rounds:
                    continue
                try:
                    taken = workers[name].ask()["seconds"]
                except Failed as error:
                    rows[name]["note"] = str(error)
                    del workers[name]
                    continue
                if i >= 0:
                    seconds[name].append(taken)
    for name in workers:
        middle = (1e3 * t for t in spread(seconds[name]))
        rows[name] |= dict(zip(("ms", "ms_20", "ms_80"), middle, strict=True)) | {"rounds": len(seconds[name])}


def measure(case: Case, rounds: int, console: "Console") -> list[dict]:
    rows = {}
    for name, contender in case.contenders.items():
        if contender.package and importlib.util.find_spec(contender.package) is None:
            console.print(f"{case.name}: without {name}, which is not installed")
        else:
            about = {"case": case.name, "model": f"{case.title}, n = {case.n}", "contender": name, "note": ""}
            rows[name] = dict.fromkeys(COLUMNS) | about
    with console.status(case.title) as status, tempfile.TemporaryDirectory() as folder:
        for name, row in rows.items():
            status.update(f"{case.name}: memory of {name}")
            try:
                with worker(case, name, Path(folder) / name) as process:
                    row |= process.ask()
            except Failed as error:
                row["note"] = str(error)
        check(case, rows, Path(folder))
        status.update(f"{case.name}: time of {', '.join(name for name, row in rows.items() if not row['note'])}")
        interleave(case, rows, rounds)
    plain, ours = rows["plain"], rows[case.ours]
    for name, row in rows.items():
        row["later_over_plain"] = _ratio(row["later_mb"], plain["later_mb"])
        for unit, column in (("time", "ms"), ("memory", "peak_mb")):
            row[f"{unit}_over_plain"] = _ratio(row[column], plain[column])
            row[f"{unit}_over_ours"] = _ratio(row[column], ours[column])
            row[f"{unit}_at_most"] = getattr(case, unit).get(name)
            row[f"{unit}_at_least"] = getattr(case, f"more_{unit}") if name == case.explicit else None
    return list(rows.values())


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def cell(row: dict | None, unit: str, over: str = "plain") -> str:
    """Return a ratio of time or memory with its target; `row` as measured or as read from a file."""
    if not row or row["note"] or not row[f"{unit}_over_{over}"]:
        return row["note"].split(":")[0] if row else ""
    value, target = row[f"{unit}_over_{over}"], row[f"{unit}_at_{'most' if over == 'plain' else 'least'}"]
    text = f"{float(value):.3g}"
    if not target:
        return text
    met = float(value) <= float(target) if over == "plain" else float(value) >= float(target)
    return f"{text} ({'≤' if over == 'plain' else '≥'} {target}{'' if met else ', MISSED'})"


SUMMARY = [
    "model",
    *(f"{unit} / plain, {scope}" for unit in ("time", "memory") for scope in ("global", "two passes", "per_tensor")),
    "memory / plain after the first step, global",
    *(f"vmap + {solver}: {unit} / ours" for solver in ("QR", "Gram") for unit in ("time", "memory")),
]


def summary(rows: list[dict]) -> list[list[str]]:
    """Return one line per case, under SUMMARY; for K alone `global` is K."""
    lines = []
    for case in CASES:
        by_name = {row["contender"]: row for row in rows if row["case"] == case.name}
        if by_name:
            ours = [by_name.get(name) for name in (case.ours, "projgrad two passes", "projgrad per_tensor")]
            cells = [cell(row, unit) for unit in ("time", "memory") for row in ours]
            vmap = [
                cell(by_name.get(f"vmap + {solver}"), unit, "ours")
                for solver in ("QR", "Gram")
                for unit in ("time", "memory")
            ]
            later = by_name[case.ours]["later_over_plain"] if by_name.get(case.ours) else None
            lines.append([by_name["plain"]["model"], *cells, f"{float(later):.3g}" if later else "", *vmap])
    return lines


def details(rows: list[dict]) -> "Table":
    from rich.table import Table

    table = Table(title=rows[0]["model"])
    for column in ("contender", "ms (20-80 %)", "/ plain", "peak MB", "/ plain", "later MB", "difference", "note"):
        table.add_column(column, justify="left" if column in ("contender", "note") else "right")
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['ms']:.1f} ({row['ms_20']:.1f}-{row['ms_80']:.1f})" if row["ms"] else "",
            cell(row, "time"),
            f"{row['peak_mb']:.1f}" if row["peak_mb"] else "",
            cell(row, "memory"),
            f"{row['later_mb']:.1f}" if row["later_mb"] else "",
            f"{row['difference']:.1e}" if row["difference"] else "",
            row["note"],
        )
    return table


def write(rows: list[dict], path: Path, cases: Iterable[Case] = CASES) -> list[dict]:
    """Write rows beside those of other cases in the file, in the order of `cases`, and return all of its rows."""
    about, measured = environment(), {row["case"] for row in rows}
    others = [row for row in read_csv(path) if row["case"] not in measured] if path.exists() else []
    order = [case.name for case in cases]
    merged = sorted([*(row | about for row in rows), *others], key=lambda row: order.index(row["case"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, merged, [*COLUMNS, *about])
    return read_csv(path)


def profile(case: Case, contender: Contender) -> str:
    """Return a table of where the time of one step goes."""
    step = contender.start(case.job())
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60)


def main() -> None:
    if chosen_device() == "cuda":
        from . import steps_cuda

        return steps_cuda.main()
    from rich.console import Console
    from rich.table import Table

    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_device(parser, "cpu")
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases), metavar="NAME", help=", ".join(cases))
    parser.add_argument("--repeats", type=int, help="timed steps of every fast contender, at least 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for steps_cpu.csv")
    parser.add_argument("--profile", nargs=2, metavar=("CASE", "CONTENDER"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    if chosen := args.worker or args.profile:
        case = cases[chosen[0]]
        contender = case.contenders[chosen[1]]
        return work(case, contender, args.result) if args.worker else print(profile(case, contender))
    console, rows = Console(width=150), []
    for name in args.case:
        rows += measure(cases[name], max(2, args.repeats or cases[name].rounds), console)
        console.print(details([row for row in rows if row["case"] == name]))
    rows = write(rows, args.out / "steps_cpu.csv")
    table = Table(title=f"Steps on {THREADS} CPU threads, float32", show_lines=True)
    for column in SUMMARY:
        table.add_column(column, overflow="fold")
    for line in summary(rows):
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    started(main)
