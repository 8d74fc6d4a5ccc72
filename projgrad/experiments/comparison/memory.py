"""Peak memory of a block of code, and of one whole step of each method, from the same batch and weights."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ...evaluate.problem import Problem
from .methods import METHODS, Context, Setting, batches, optimizer_of


class Peak:
    """`bytes` above what was in use at entry, filled when the block ends; None where the system cannot tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[Peak]:
    """Measure the memory that a block needs beyond what is resident when it starts.

    CPU: the resident-set high-water mark of the whole process, reset on entry (Linux; elsewhere `bytes` stays None).
    Freed memory that the allocator kept is not counted again, so measure large needs, or in a fresh process.
    CUDA: the allocator's peak.
    """
    peak = Peak()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """Return a number of bytes that Linux tells about this process: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_bytes(
    problem: Problem,
    model: nn.Module,
    steps: Sequence[tuple[str, Setting]],
    forget_batch: int,
    tick: Callable[[str], None],
) -> list[int | None]:
    """Measure the peak memory of a step of each method above the loaded model and batch.

    Each runs in a fresh process, two at a time: an earlier call's freed memory would hide the next call's need. The
    allocator returns at once what is freed: repeats then agree to 1 %, instead of 30 % for the smallest.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    running: list[subprocess.Popen] = []
    interrupted = threading.Event()

    def one(method: str, setting: Setting) -> int | None:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        running.append(process)
        if interrupted.is_set():
            process.kill()
        told, _ = process.communicate(pickle.dumps((problem, model, method, setting, forget_batch)))
        if interrupted.is_set():
            return None
        tick(method)
        if process.returncode:
            warnings.warn(f"the memory of a step of {method} could not be measured; see its error above", stacklevel=2)
            return None
        return json.loads(told)

    with ThreadPoolExecutor(2) as pool:
        try:
            return list(pool.map(one, *zip(*steps, strict=True)))
        except BaseException:  # its threads are waited for: without the processes they end at once
            interrupted.set()
            for process in running:
                process.kill()
            raise


def measure_step(problem: Problem, model: nn.Module, method: str, setting: Setting, forget_batch: int) -> int | None:
    """Measure the peak of a step above the model, the batch and what the method prepares; the learning rate is 0."""
    generator = torch.Generator().manual_seed(0)
    forget = next(batches(problem.forget, forget_batch, generator))
    retain = next(batches(problem.retain, setting.n, generator))
    optimizer = optimizer_of(problem, method, model, 0.0)
    step = METHODS[method].make(Context(problem, model, optimizer, setting, generator))
    step(forget[:2], retain[:2])  # libraries load and start their threads at the first call
    optimizer.zero_grad()
    with peak_memory(forget.labels.device) as peak:
        step(forget, retain)
    return peak.bytes


if __name__ == "__main__":
    print(json.dumps(measure_step(*pickle.load(sys.stdin.buffer))))
