"""One whole step without projection, on the tape and with the reference projector: time, peak memory, agreement."""

import copy
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..data import Part, Task
from ..measure import peak_memory
from .methods import make
from .runs import FORGET_BATCH, batches

METHODS = ("neggrad", "orthograd", "orthograd-qr")  # the same step without projection, on the tape, from explicit rows
ALPHA = 0.5
REPEATS = 5


def batch(task: Task, n: int, seed: int) -> tuple[Part, Part]:
    """What one step is given: forget samples, and n retain samples."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((task.forget, FORGET_BATCH), (task.retain, n))
    forget, retain = (Part(*next(batches(part, size, generator))) for part, size in sizes)
    return forget, retain


def prepare(method: str, model: nn.Module, forget: Part, retain: Part) -> Callable[[], object]:
    """One step of the method; it leaves its update in `.grad`. With learning rate 0 every step has the same start."""
    unlearner = make(method, model, torch.optim.SGD(model.parameters(), lr=0.0), ALPHA)
    return lambda: unlearner.step(
        lambda: cross_entropy(model(forget.x), forget.y),
        lambda: cross_entropy(model(retain.x), retain.y, reduction="none"),
    )


def compare(model: nn.Module, forget: Part, retain: Part) -> dict[str, Any]:
    """Seconds of each step, repeats interleaved so that all meet the same load, and how far the two projected updates
    are apart, relative to the reference."""
    models = {method: copy.deepcopy(model) for method in METHODS}
    steps = {method: prepare(method, models[method], forget, retain) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(-1, REPEATS):
        for method, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 0:  # the first is warm-up
                seconds[method].append(time.perf_counter() - start)
    ours, reference = (
        torch.cat([p.grad.flatten() for p in models[method].parameters()]).double() for method in METHODS[1:]
    )
    return {
        "n": len(retain.y),
        "seconds": {method: median(values) for method, values in seconds.items()},
        "relative_difference": float((ours - reference).norm() / reference.norm()),
    }


def peak_bytes(model: nn.Module, forget: Part, retain: Part) -> dict[str, Any]:
    """Peak memory of each step above the loaded model and batch, each in a fresh process.

    An earlier call's freed memory would hide the next call's need. The allocator is told to return what is freed at
    once: repeats then agree to 1 %, instead of 30 % for the smallest.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = {}
    for method in METHODS:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=pickle.dumps((method, model, forget, retain)),
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's to handle
            check=True,
        )
        found[method] = json.loads(done.stdout)
    return {"n": len(retain.y), "bytes": found}


def measure(method: str, model: nn.Module, forget: Part, retain: Part) -> int | None:
    few = (Part(part.x[:2], part.y[:2]) for part in (forget, retain))
    prepare(method, model, *few)()  # libraries load and start their threads at the first call
    model.zero_grad()
    step = prepare(method, model, forget, retain)
    with peak_memory() as peak:
        step()
    return peak.bytes


if __name__ == "__main__":
    print(json.dumps(measure(*pickle.load(sys.stdin.buffer))))
