"""Peak memory of a piece of code, for the comparison and the benchmarks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


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
        before = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024
