"""Whole steps of a model: every contender is compared with the truth, then timed in turn with the others.

Every contender has processes of its own: one for its result and its memory, one for its time.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from .contenders import Contender
from .harness import spread
from .step_worker import Task
from .subjects import Refused, is_own, source
from .worker import Failed, Worker

COLUMNS = ("what", "case", "n", "p", "dtype", "on", "optimizer", "contender", "ms", "ms_20", "ms_80", "rounds")
COLUMNS += ("over_plain", "percent_of_floor", "peak_mb", "later_mb", "memory_over_plain", "error", "compared_with")
COLUMNS += ("note", "asked_n", "source")
KEY = ("what", "case", "n", "dtype", "on", "contender")
FEWEST, WARM_UP = 3, 2  # rounds
RESIDENT = 0.8  # of the free memory that contenders which are timed in turn may fill
CONTEXT = 0.6e9  # bytes that every process takes on a GPU before its first tensor, about
ALONE = "timed alone: there is no room beside the others"
CLOSURES = "it takes samples and a loss, and here are closures alone"


def what(gram: bool) -> str:
    return "K" if gram else "step"


def start_worker(task: Task) -> Worker:
    variables = {"OMP_NUM_THREADS": str(task.threads)}
    if not task.timing:
        variables["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory leaves at once: the peak is what was needed
    arguments = ["-m", "projgrad.experiments.benchmark.step_worker", json.dumps(task._asdict())]
    return Worker(arguments, variables, quiet=bool(task.contender))


def measure_steps(
    task: Task,
    wanted: Mapping[str, Contender],
    rounds: int,
    seconds: float,
    tick: Callable[..., None],
    start: Callable[[Task], Worker],
) -> list[dict]:
    """Return a row for every contender of a case.

    rounds: at most, of every contender. seconds: about what each may take, but for three rounds. tick: hears what is
    done now, and with True behind it what is finished. start: makes the process of a task.
    Raises Refused where the model cannot be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder, "truth.pt"))
        tick("float64 truth")
        about = _describe(task, truth, start)
        common = {"what": what(task.gram), "case": task.case, "asked_n": task.n, "on": about["device"]}
        common |= {key: about[key] for key in ("n", "p", "dtype", "optimizer")} | {
            "source": source(task.case),
            "note": "",
        }
        rows = {name: dict.fromkeys(COLUMNS) | common | {"contender": name} for name in wanted}
        totals = {}
        for name, contender in wanted.items():
            row = rows[name]
            needed = contender.holds * about["G"]
            if contender.missing:
                row["note"] = f"not run: {contender.missing}"
            elif contender.needs_samples and is_own(task.case):
                row["note"] = f"not run: {CLOSURES}"
            elif contender.truth == "orthogonal" and about["no_metric"]:
                row["note"] = f"not run: {about['no_metric']}"
            elif about["free"] and needed > about["free"]:
                row["note"] = f"not run: about {needed / 2**30:.0f} GiB"
            if row["note"]:
                continue
            tick(f"result and memory of {name}")
            try:
                with start(task._replace(contender=name, file=truth)) as process:
                    found = process.ask()
            except Failed as error:
                row["note"] = str(error)
                tick(f"{name}: {error}", True)
                continue
            totals[name] = 1e6 * found.pop("total_mb") + CONTEXT * (about["device"] == "cuda")
            row |= found | {"error": found.pop("difference", None)}
            if about["unchecked"] and not row["note"]:
                row["note"] = f"unchecked: {about['unchecked']}"
            elif contender.holds and not about["slices"]:
                row["note"] = _also(row["note"], "n backward passes of the whole batch: retain has no parameter `part`")
            wrong = row["note"].startswith("wrong")
            tick(f"{name}: {row['note'] if wrong else 'result and memory'}", True)
        times = {name: [] for name in totals if not rows[name]["note"].startswith("wrong")}
        together, *alone = groups({name: totals[name] for name in times}, about["free"]) or [[]]
        for group in (together, *alone):
            _interleave(task, {name: times[name] for name in group}, rows, rounds, seconds, tick, start)
        for (name,) in alone:
            rows[name]["note"] = _also(rows[name]["note"], ALONE)
    _finish(rows, times)
    return list(rows.values())


def _describe(task: Task, truth: str, start: Callable[[Task], Worker]) -> dict:
    """Return what is measured, with the truth in a file; without it where there is too little memory for it."""
    for file in (truth, ""):
        try:
            with start(task._replace(file=file)) as process:
                return process.ask()
        except Failed as error:
            reason = str(error)
            if reason.startswith("Refused: "):
                raise Refused(reason.removeprefix("Refused: ")) from None
            if reason != "out of memory" or not file:
                raise Refused(f"{task.case} cannot be measured: {reason}") from None


def _also(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more


def groups(totals: Mapping[str, float], free: float | None) -> list[list[str]]:
    """Return which contenders are timed in turn: as many as fit into the free memory, the others one by one."""
    together, alone, filled = [], [], 0.0
    for name, total in totals.items():
        if free and together and filled + total > RESIDENT * free:
            alone.append([name])
        else:
            together.append(name)
            filled += total
    return [group for group in (together, *alone) if group]


def _interleave(
    task: Task,
    times: Mapping[str, list[float]],
    rows: Mapping[str, dict],
    rounds: int,
    seconds: float,
    tick: Callable[..., None],
    start: Callable[[Task], Worker],
) -> None:
    """Time one step of every contender in turn, after two for warming up; the slow ones take part in fewer rounds."""
    counts: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(start(task._replace(contender=name, timing=True))) for name in times}
        for i in range(-WARM_UP, rounds):
            tick(f"round {max(i + 1, 0)} of {rounds}")
            for name in list(workers):
                if i >= counts.get(name, rounds):
                    continue
                try:
                    ms = workers[name].ask()["ms"]
                except Failed as error:
                    rows[name]["note"] = str(error)
                    tick(f"{name}: {error}", True)
                    del workers[name]
                    continue
                if i >= 0:
                    times[name].append(ms)
                counts[name] = max(min(FEWEST, rounds), min(rounds, int(1e3 * seconds / max(ms, 1e-6))))
                if i + 1 >= counts[name]:
                    tick(f"{name}: {len(times[name])} times", True)


def _finish(rows: Mapping[str, dict], times: Mapping[str, list[float]]) -> None:
    """Add medians, percentiles and what follows from them."""
    for name, row in rows.items():
        row["times"] = times.get(name, [])
        row["rounds"] = len(row["times"])
        if row["rounds"] >= 2:
            row |= dict(zip(("ms", "ms_20", "ms_80"), spread(row["times"]), strict=True))
    floor = rows.get("plain", {})
    for row in rows.values():
        for ratio, column in (("over_plain", "ms"), ("memory_over_plain", "peak_mb")):
            if row[column] and floor.get(column):
                row[ratio] = row[column] / floor[column]
        row["percent_of_floor"] = 100 / row["over_plain"] if row["over_plain"] else None
