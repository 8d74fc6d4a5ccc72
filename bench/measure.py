"""How the benchmarks measure: interleaved rounds, memory in a fresh process, and what the machine itself can do."""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median and the 20th and 80th percentile."""
    fifths = quantiles(seconds, n=5, method="inclusive")
    return median(seconds), fifths[0], fifths[3]


def read_rate(G: torch.Tensor, rounds: int = 9) -> float:
    """Bytes a second at which this machine reads G: the best of several sums over it."""
    return G.numel() * G.element_size() / min(timed(lambda: G.view(-1).sum()) for _ in range(rounds))


def matrix_rate(dtype: torch.dtype, size: int = 1536, rounds: int = 9) -> float:
    """Floating-point operations a second of a square matrix product: the best of several."""
    a = torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / min(timed(lambda: a @ a) for _ in range(rounds))


def extra_megabytes(case: str) -> float:
    """Peak memory of one case beyond its inputs and its result, in MB, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.contenders", case], check=True, capture_output=True, text=True, timeout=600
    )
    return float(done.stdout)
