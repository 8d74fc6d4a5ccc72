"""The two projectors alone, on the same gradients of a real model: time, peak memory, agreement."""

import multiprocessing
import signal
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Task
from ..explicit import ExplicitGradients
from ..measure import peak_memory
from ..ops.flat import project_out
from ..projectors import qr
from .methods import CHUNK
from .runs import FORGET_BATCH

PROJECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"qr": qr, "projgrad": project_out}
REPEATS = 3


def gradients(model: nn.Module, task: Task, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """u (p,), the gradient of the forget loss, and G (n, p), one gradient per retain sample."""
    generator = torch.Generator().manual_seed(seed)
    (xf, yf), (xr, yr) = (
        (part.x[rows], part.y[rows])
        for part, size in ((task.forget, FORGET_BATCH), (task.retain, n))
        for rows in [torch.randperm(len(part.y), generator=generator)[:size]]
    )
    params = dict(model.named_parameters())
    u = torch.autograd.grad(cross_entropy(model(xf), yf), list(params.values()))
    rows = ExplicitGradients(model, lambda: cross_entropy(model(xr), yr, reduction="none"), params, CHUNK)
    return torch.cat([g.flatten() for g in u]), rows.rows(list(params))


def compare(u: Tensor, G: Tensor) -> dict[str, Any]:
    """Seconds of each projector, repeats interleaved so that both meet the same load, and how far they agree."""
    results: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in PROJECTORS}
    for _ in range(REPEATS):
        for name, projector in PROJECTORS.items():
            start = time.perf_counter()
            results[name] = projector(u, G)
            seconds[name].append(time.perf_counter() - start)
    difference = (results["qr"].double() - results["projgrad"].double()).norm() / results["projgrad"].double().norm()
    return {
        "n": len(G),
        "p": G.shape[1],
        "seconds": {name: median(values) for name, values in seconds.items()},
        "relative_difference": float(difference),
    }


def peak_bytes(u: Tensor, G: Tensor, ns: list[int]) -> list[dict[str, Any]]:
    """Peak memory of each projector beyond (u, G) themselves, for the first n rows of G.

    Each in a fresh process: memory that an earlier call freed but the allocator kept would hide the next call's need.
    """
    jobs = [(name, u.numpy(), G[:n].numpy()) for n in ns for name in PROJECTORS]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=_ignore_interrupts, maxtasksperchild=1) as pool:
        peaks = pool.map(_peak_bytes, jobs, chunksize=1)
    names = list(PROJECTORS)
    return [
        {"n": n, "gradients": G[:n].nbytes, **dict(zip(names, peaks[i * len(names) :], strict=False))}
        for i, n in enumerate(ns)
    ]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _peak_bytes(job: tuple[str, np.ndarray, np.ndarray]) -> int | None:
    name, u, G = job
    u, G, projector = torch.from_numpy(u), torch.from_numpy(G), PROJECTORS[name]
    projector(u[:1000], G[:4, :1000])  # libraries load and start their threads at the first call
    with peak_memory() as peak:
        projector(u, G)
    return peak.bytes
