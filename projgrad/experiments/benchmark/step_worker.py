"""A process that takes the steps of one contender: `python -m projgrad.experiments.benchmark.step_worker TASK`.

The task is a `Task` as JSON.
"""

import contextlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...methods.common import trainable_parameters
from ...methods.responses import response_of
from ..comparison.memory import peak_memory, resident
from .contenders import GRAMS, STEPS, Contender, Job, Step, takes_slices
from .harness import release, wall_clock
from .subjects import BUILT_IN, DTYPES, built_in, changes, dtype_of, is_own, own
from .truth import COPIES, LIMITS, cosine_left, difference, holds, write_truth
from .worker import complain, serve

DIFFER = (
    "the losses differ from call to call: random numbers (dropout: model.eval()), or a closure that draws its batch"
)


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
    from .peers import PEERS

    own_ones, others = GRAMS if gram else STEPS, {}
    for name, peer in PEERS.items():
        same = name.split()[0] in ("plain", "projgrad") or name == "one by one"  # as those that are here already
        if same or (gram and "QR" in name):  # QR is of the projection
            continue
        start, truth = (peer.start, "gram") if gram else (_peer_step(peer.project), f"u, {peer.scope}")
        others[name] = Contender(start, truth, missing=peer.missing(), needs_samples=peer.needs_samples)
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


class State:
    """The tensors of a model, to be put back: whatever the learning rate, every step starts from the same weights."""

    def __init__(self, job: Job) -> None:
        tensors = itertools.chain(job.model.parameters(), job.model.buffers())
        self.kept = [(x, x.detach().clone()) for x in tensors]

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
    """Return what is measured, with the truth in the task's file, if it names one and that can be made."""
    job = task.job()
    release()  # what the first passes left in a GPU's cache is free
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
        "no_metric": "",
    }
    try:
        response_of(job.optimizer)
    except (TypeError, ValueError) as error:
        about["no_metric"] = str(error).splitlines()[0]
    if changes(job):
        return about | {"unchecked": DIFFER}
    if not task.file or (free is not None and free < COPIES * G):
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
    job.optimizer.zero_grad()  # above the same as the first step
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
            name, error = contender.truth, difference(result, contender.truth, truth)
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


if __name__ == "__main__":
    main()
