"""Time and memory of a call, on the device of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ..._torch_private import cpu_allocations

Call = Callable[[], object]


def seconds(calls: Sequence[Call], device: torch.device, rounds: int) -> list[float]:
    """Return the median time of every call, one after the other, round by round, so that they see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Make a call, and return how much more tensors hold at its peak than before; None where nobody can tell.

    CPU: the sum of what torch's allocator gave and got back. CUDA: the allocator's peak, whose statistics are reset.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        call()
        return None
    sizes = cpu_allocations(call)
    if sizes is None:
        return None
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
