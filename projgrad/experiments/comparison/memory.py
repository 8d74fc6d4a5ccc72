"""Peak memory of one whole step of each method, from the same batch and weights."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ...evaluate.problem import Problem
from .methods import METHODS, Context, Setting, batches
from .peak_memory import peak_memory


def peak_bytes(
    problem: Problem,
    model: nn.Module,
    steps: Sequence[tuple[str, Setting]],
    forget_batch: int,
    tick: Callable[[str], None],
) -> list[int | None]:
    """Peak memory of a step of each method above the loaded model and batch, each in a fresh process, two at a time.

    An earlier call's freed memory would hide the next call's need. The allocator is told to return what is freed at
    once: repeats then agree to 1 %, instead of 30 % for the smallest.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}

    def one(method: str, setting: Setting) -> int | None:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=pickle.dumps((problem, model, method, setting, forget_batch)),
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        tick(method)
        if done.returncode:
            warnings.warn(f"the memory of a step of {method} could not be measured; see its error above", stacklevel=2)
            return None
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, *zip(*steps, strict=True)))


def measure(problem: Problem, model: nn.Module, method: str, setting: Setting, forget_batch: int) -> int | None:
    """The peak of a step above the model, the batch and what the method prepares; the learning rate is 0."""
    generator = torch.Generator().manual_seed(0)
    forget = next(batches(problem.forget, forget_batch, generator))
    retain = next(batches(problem.retain, setting.n, generator))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    step = METHODS[method].make(Context(problem, model, optimizer, setting, generator))
    step(forget[:2], retain[:2])  # libraries load and start their threads at the first call
    optimizer.zero_grad()
    with peak_memory(forget.labels.device) as peak:
        step(forget, retain)
    return peak.bytes


if __name__ == "__main__":
    print(json.dumps(measure(*pickle.load(sys.stdin.buffer))))
