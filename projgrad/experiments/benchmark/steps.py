"""Whole steps of a model: every contender is compared with the truth, then timed in turn with the others.

Every contender has processes of its own: one for its result and its memory, one for its time. `python -m
projgrad.experiments.benchmark.steps` is such a process; it gets a `Task` as JSON.
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...methods.common import trainable_parameters
from ..comparison.memory import peak_memory, resident
from .contenders import GRAMS, STEPS, Contender, Job, Step, takes_slices
from .harness import spread, wall_clock
from .subjects import BUILT_IN, DTYPES, Refused, built_in, changes, dtype_of, is_own, own, source
from .truth import COPIES, LIMITS, cosine_left, difference, holds, write_truth
from .worker import Failed, Worker, complain, serve

COLUMNS = ("what", "case", "n", "p", "dtype", "on", "optimizer", "contender", "ms", "ms_20", "ms_80", "rounds")
COLUMNS += ("over_plain", "percent_of_floor", "peak_mb", "later_mb", "memory_over_plain", "error", "compared_with")
COLUMNS += ("note", "asked_n", "source")
KEY = ("what", "case", "n", "dtype", "on", "contender")
FEWEST, WARM_UP = 3, 2  # rounds
RESIDENT = 0.8  # of the free memory that contenders which are timed in turn may fill
TINY = BUILT_IN["mlp"]


class Task(NamedTuple):
    """What a process does.

    case: a built-in model or `module:function`. n: None for what the function says. dtype, device: None of a user's
    model: as it is. gram: K alone. contender: empty: the truth, which goes to `file`.
    """

    case: str
    n: int | None
    dtype: str | None
    device: str | None
    threads: int
    gram: bool = False
    contender: str = ""
    file: str = ""
    timing: bool = False

    def job(self) -> Job:
        if is_own(self.case):
            return own(self.case, self.n, self.dtype, self.device)
        dtype = DTYPES[self.dtype or "float32"]
        return built_in(self.case, self.n or BUILT_IN[self.case].n, dtype, self.device or "cpu")

    def small(self) -> Job:
        """Return a job that loads what a step loads once, on the device of the case."""
        name = "mlp" if is_own(self.case) else self.case
        return built_in(name, 4, DTYPES[self.dtype or "float32"], self.device or "cpu", small=True)


def contenders(gram: bool) -> dict[str, Contender]:
    """Return all contenders, of other packages too."""
    own_ones = GRAMS if gram else STEPS
    if importlib.util.find_spec(f"{__package__}.peers") is None:
        return dict(own_ones)
    from .peers import PEERS

    others = {}
    for name, peer in PEERS.items():
        same = name.split()[0] in ("plain", "projgrad") or name == "one by one"  # as those that are here already
        if same or (gram and "QR" in name):  # QR is of the projection
            continue
        if gram:
            others[name] = Contender(peer.start, "gram", missing=peer.missing())
        elif hasattr(peer, "project"):
            truth = f"u, {peer.scope}" if getattr(peer, "scope", "") else ""
            others[name] = Contender(_peer_step(peer.project), truth, missing=peer.missing())
        else:
            others[name] = Contender(peer.start, missing=peer.missing())
    return own_ones | others


def _peer_step(project: Callable[[Job], Callable[[], Tensor]]) -> Callable[[Job], Step]:
    """Make steps with α = 0, without a retain gradient, of the projected forget gradient that a package gives."""

    def start(job: Job) -> Step:
        params, call = list(trainable_parameters(job.model, job.optimizer).values()), project(job)

        def step() -> Tensor:
            u = call()
            for p, f in zip(params, u.split([p.numel() for p in params]), strict=True):
                p.grad = -f.view_as(p).to(p.dtype)
            job.optimizer.step()
            return u

        return step

    return start


# The worker's side.


class State:
    """The tensors of a model, to be put back: whatever the learning rate, every step starts from the same weights."""

    def __init__(self, job: Job) -> None:
        self.kept = [(x, x.detach().clone()) for x in job.model.state_dict(keep_vars=True).values()]

    def restore(self) -> None:
        with torch.no_grad():
            for x, kept in self.kept:
                x.copy_(kept)
        torch.manual_seed(0)


def answers(task: Task) -> Callable[[str], dict]:
    """Return what answers the questions of the asking side."""
    torch.set_num_threads(task.threads)
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap runs attention sample by sample
    if not task.contender:
        return lambda _: describe(task)
    contender = contenders(task.gram)[task.contender]
    if not task.timing:
        with contextlib.suppress(Exception):  # what fails here fails below, with its reason
            contender.start(task.small())()
    job = task.job()
    state, step = State(job), contender.start(job)
    if not task.timing:
        return lambda _: examine(job, step, state, contender, Path(task.file))

    def timed(_: str) -> dict:
        state.restore()
        return {"ms": wall_clock(step)}

    return timed


def describe(task: Task) -> dict:
    """Return what is measured, with the truth in a file where there is one."""
    job = task.job()
    params = trainable_parameters(job.model, job.optimizer)
    device = next(iter(params.values())).device.type
    free, G = free_bytes(device), holds(job)
    about = {
        "n": job.n,
        "p": sum(p.numel() for p in params.values()),
        "dtype": dtype_of(job.model),
        "device": device,
        "optimizer": type(job.optimizer).__name__,
        "free": free,
        "G": G // 2,  # in float32
        "slices": takes_slices(job.retain),
    }
    if changes(job):
        return about | {"unchecked": "the losses change with the random numbers (dropout? model.eval() prevents it)"}
    if free is not None and free < COPIES * G:
        return about | {"unchecked": f"the truth takes about {COPIES * G / 2**30:.0f} GiB"}
    return about | {"precision": write_truth(job, Path(task.file)), "unchecked": ""}


def free_bytes(device: str) -> int | None:
    """Return the memory that is free on a device, None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def examine(job: Job, step: Step, state: State, contender: Contender, truth: Path) -> dict:
    """Return the peak memory of a first step and of later ones, and the error of the first one's result."""
    params = list(trainable_parameters(job.model, job.optimizer).values())
    device = params[0].device
    state.restore()
    with peak_memory(device) as first:
        out = step()
    found = {"peak_mb": first.bytes and first.bytes / 1e6}
    if isinstance(out, Tensor):
        result = out.detach().clone()
    else:
        zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in params)
        result = torch.cat([g.flatten() for g in zeros])
    out = None
    state.restore()
    with peak_memory(device) as later:
        for _ in range(2):
            step()
    found["later_mb"] = later.bytes and later.bytes / 1e6
    found["total_mb"] = (torch.cuda.max_memory_reserved() if device.type == "cuda" else _highest()) / 1e6
    job.optimizer.zero_grad()
    if truth.is_file() and contender.truth != "none":
        state.restore()
        allowed = LIMITS[params[0].dtype]
        if contender.truth == "orthogonal":
            name, error = "cosine left", cosine_left(job, result)
            allowed += rounding(params, result)
        else:
            name, error = difference(result, contender.truth, truth)
        found |= {"compared_with": name, "difference": error}
        if not error <= allowed:
            found["note"] = f"wrong by {error:.1e}"
    return found


def rounding(params: Sequence[Tensor], change: Tensor) -> float:
    """Return how long the rounding of the parameters can be, relative to a change of them [p]."""
    weights = torch.stack([p.detach().double().norm() for p in params]).norm()
    return float(torch.finfo(params[0].dtype).eps / 2 * weights / change.double().norm())


def _highest() -> int:
    try:
        return resident("VmHWM")
    except OSError:
        return 0


def main() -> None:
    """Answer on what standard output is now; whatever the user's code prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = replies
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = answers(Task(**json.loads(sys.argv[1])))
            serve(answer, out=replies)
        except Exception as error:
            complain(error, out=replies)


# The asking side.


def what(gram: bool) -> str:
    return "K" if gram else "step"


def start_worker(task: Task) -> Worker:
    variables = {"OMP_NUM_THREADS": str(task.threads)}
    if not task.timing:
        variables["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory leaves at once: the peak is what was needed
    arguments = ["-m", "projgrad.experiments.benchmark.steps", json.dumps(task._asdict())]
    return Worker(arguments, variables, quiet=bool(task.contender))


def measure_steps(
    task: Task,
    wanted: Mapping[str, Contender],
    rounds: int,
    seconds: float,
    tick: Callable[[str], None],
    start: Callable[[Task], Worker],
) -> list[dict]:
    """Return a row for every contender of a case.

    rounds: at most, of every contender. seconds: about what each may take, but for three rounds. tick: hears what is
    done now. start: makes the process of a task.
    Raises Refused where the model cannot be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder, "truth.pt"))
        tick("float64 truth")
        try:
            with start(task._replace(file=truth)) as process:
                about = process.ask()
        except Failed as error:
            reason = str(error)
            if reason.startswith("Refused: "):
                raise Refused(reason.removeprefix("Refused: ")) from None
            raise Refused(f"{task.case} cannot be measured: {reason}") from None
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
                continue
            totals[name] = 1e6 * found.pop("total_mb")
            row |= found | {"error": found.pop("difference", None)}
            if about["unchecked"] and not row["note"]:
                row["note"] = f"unchecked: {about['unchecked']}"
            elif contender.holds and not about["slices"]:
                row["note"] = _also(row["note"], "n backward passes of the whole batch: retain has no parameter `part`")
        times = {name: [] for name in totals if not rows[name]["note"].startswith("wrong")}
        for group in groups({name: totals[name] for name in times}, about["free"]):
            _interleave(task, {name: times[name] for name in group}, rows, rounds, seconds, tick, start)
    _finish(rows, times)
    return list(rows.values())


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
    tick: Callable[[str], None],
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
                    del workers[name]
                    continue
                if i >= 0:
                    times[name].append(ms)
                counts[name] = max(min(FEWEST, rounds), min(rounds, int(1e3 * seconds / max(ms, 1e-6))))


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


if __name__ == "__main__":
    main()
