"""The steps that a plan compares, run on tensors without elements: what they hold, and for how long."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ...methods.common import check_batch_norm
from ...methods.projectors import qr
from ...tape.systems import HELD
from .memory import imagined
from .subjects import Losses, Subject, Unknown

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda params, **options: torch.optim.SGD(params, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
OURS = ("global", "per_tensor", "metric")
CHUNK = 64 << 20  # bytes of per-sample gradients that are made at a time


class Cost(NamedTuple):
    """Of one step: the most bytes held at one time, model and optimizer included, and floating-point operations.

    first_step_bytes: the same in the first step, which inspects the model's graph.
    """

    peak_bytes: int
    first_step_bytes: int
    flops: int


class Run(NamedTuple):
    """What was counted of a way, without Gram matrices. tensors: how many are trained."""

    first_peak: int
    later_peak: int
    flops: int
    tensors: int


Runs = dict[tuple[str, int], Run]  # by way and number of samples; "per_tensor" runs as "global"


class Use(NamedTuple):
    """A layer with a trained weight of two or more dimensions, in a forward pass: its input, and its gradient's way.

    positions: of a sample, at which the weight is applied.
    """

    module: nn.Module
    input: Tensor
    edge: object
    positions: int


class Job:
    """A model with a new optimizer, and a forget and a retain batch of n samples.

    operations: returns how many were counted so far.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[int], Losses],
        n: int,
        optimizer: str,
        device: str,
        operations: Callable[[], int] = int,
    ) -> None:
        self.model, self.n, self.operations = model, n, operations
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.forget, self.retain, self.one = (losses(k) for k in (n, n, 1))
        # torch chooses foreach by itself on a GPU, where its temporaries are as large as the model
        self.optimizer = OPTIMIZERS[optimizer](self.params, lr=1e-3, foreach=device == "cuda")

    def take(self, way: str, first: bool) -> float:
        """Take a step; return the operations that no tensor here is asked for."""
        if way == "plain":
            return self.plain()
        return self.explicit_qr() if way == "explicit_qr" else self.orthograd(first, way == "metric")

    def plain(self) -> float:
        """Take a step on the retain loss less the forget loss."""
        self.optimizer.zero_grad()
        self.forget().mean().backward()
        losses = self.retain()
        if losses.shape != (self.n,):
            raise Unknown(f"the losses of {self.n} samples must have the shape ({self.n},); got {tuple(losses.shape)}")
        losses.mean().backward()
        del losses
        self.optimizer.step()
        return 0.0

    def orthograd(self, first: bool, metric: bool) -> float:
        """Hold what a step of OrthoGrad holds; return the operations that no tensor here is asked for.

        Layers keep their input and the gradient at their output, from one backward pass.
        first: the graph is new, and plain autograd is compared with. metric: orthogonal after the optimizer.
        """
        self.optimizer.zero_grad()
        self.forget().mean().backward()
        uses, losses = self._recorded()
        total = losses.sum()
        if first:
            torch.autograd.grad(total, self.params, retain_graph=True, allow_unused=True)
        gradients = torch.autograd.grad(total, [use.edge for use in uses], allow_unused=True)
        del losses, total
        if metric:
            forgotten = [p.grad.clone() for p in self.params if p.grad is not None]
        _combine(uses, gradients)
        if metric:
            self.optimizer.step()
            _change(self.params, self.optimizer, forgotten)
        del gradients
        if not metric:
            self.optimizer.step()
        return sum(_products(use, self.n) for use in uses)

    def _recorded(self) -> tuple[list[Use], Tensor]:
        """Run the retain batch; return every use of a trained matrix in it, and the losses."""
        uses: list[Use] = []

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.requires_grad and args and isinstance(args[0], Tensor):
                inside = output.shape[2:] if output.ndim > 3 else output.shape[1:-1]  # channels come first in images
                uses.append(Use(module, args[0].detach(), get_gradient_edge(output), math.prod(inside)))

        def is_used(module: nn.Module) -> bool:  # of a vector per-sample gradients are as small as a batch
            return any(p.requires_grad and p.ndim > 1 for p in module.parameters(recurse=False))

        hooks = [module.register_forward_hook(keep) for module in self.model.modules() if is_used(module)]
        try:
            return uses, self.retain()
        finally:
            for hook in hooks:
                hook.remove()

    def explicit_qr(self) -> float:
        """Take a step with all per-sample gradients in float32 and QR of those of each tensor, as published.

        One sample stands for all. Returns the operations of the others, and of QR.
        """
        self.optimizer.zero_grad()
        self.forget().mean().backward()
        rows = [torch.empty(self.n, p.numel(), device=p.device) for p in self.params]
        before = self.operations()
        gradients = torch.autograd.grad(self.one().sum(), self.params, allow_unused=True)
        del gradients
        others = (self.n - 1) * (self.operations() - before)
        for p in self.params:
            G = rows.pop(0)
            overwritten = G.mT.clone()  # LAPACK and cuSOLVER factor in place
            update = qr(p.grad.flatten().float(), G)
            update.add_(G.mean(0))
            p.grad.copy_(update.view_as(p))
            del overwritten
        self.optimizer.step()
        return others + sum(4.0 * p.numel() * self.n * (self.n + 1) for p in self.params)


def costs(
    subject: Subject,
    ways: Iterable[str],
    n: int,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "sgd",
    device: str = "cpu",
    notify: Callable[[str], object] = lambda way: None,
    runs: Runs | None = None,
) -> dict[str, Cost]:
    """Return what a step takes, by way: "plain", "global", "per_tensor", "metric" or "explicit_qr".

    notify: called with a way before it is looked at. runs: of earlier calls with the same subject, dtype, optimizer and
    device, which are not run again; new ones are added.
    """
    ways, runs, found = list(ways), {} if runs is None else runs, {}
    unknown = [way for way in dict.fromkeys(map(_run_as, ways)) if (way, n) not in runs]
    if unknown:
        _run(runs, subject, unknown, n, dtype, optimizer, device, notify)
    for way in ways:
        run = runs[_run_as(way), n]
        first, later = (peak + _systems(way, n, run.tensors) for peak in (run.first_peak, run.later_peak))
        if way in OURS and "plain" in found:  # no step of ours was ever measured below a plain one
            later = max(later, found["plain"].peak_bytes)
        found[way] = Cost(later, first, run.flops)
    return found


def _run_as(way: str) -> str:
    return "global" if way == "per_tensor" else way


def _run(
    runs: Runs,
    subject: Subject,
    ways: Iterable[str],
    n: int,
    dtype: torch.dtype,
    optimizer: str,
    device: str,
    notify: Callable[[str], object],
) -> None:
    """Add what two steps of every way take."""
    before = torch.get_default_dtype()
    with imagined(device) as ledger:
        torch.set_default_dtype(dtype)
        try:
            model = subject.make().train()
            check_batch_norm(model)
        finally:
            torch.set_default_dtype(before)
        for way in ways:
            notify(way)
            job = Job(model, functools.partial(subject.losses, model), n, optimizer, device, lambda: ledger.flops)
            peaks = []
            for first in (True, False):
                ledger.peak, ledger.flops = ledger.live, 0
                rest = job.take(way, first)
                peaks.append(ledger.peak)
            runs[way, n] = Run(*peaks, round(ledger.flops + rest), len(job.params))
            job.optimizer.zero_grad()
            del job
            gc.collect()


def _systems(way: str, n: int, tensors: int) -> int:
    """Return the bytes of the Gram matrices that are held at a time."""
    if way not in OURS:
        return 0
    return min(HELD, 8 * n * n * (tensors if way == "per_tensor" else 1))


def _combine(uses: list[Use], gradients: tuple[Tensor | None, ...]) -> None:
    """Make Σ_j c_j g_j of every weight, and add it to what is there."""
    for use, gradient in zip(uses, gradients, strict=True):
        weight = _weight(use)
        if gradient is not None and weight.grad is not None and not isinstance(use.module, nn.Embedding):
            weight.grad += torch.empty_like(weight)


def _change(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, forgotten: list[Tensor]) -> None:
    """Make the forgetting part of the change that the optimizer made, in float32, and its momentum."""
    for p in params:
        if p.grad is None:
            continue
        state = optimizer.state[p]
        if "forget_momentum" not in state and any(key in state for key in ("exp_avg", "momentum_buffer")):
            state["forget_momentum"] = torch.zeros_like(p)
        forgotten.pop(0)
        if p.grad.dtype != torch.float32:
            state["change"] = torch.empty_like(p, dtype=torch.float32)
    largest = max((p for p in params if p.grad is not None), key=Tensor.numel, default=None)
    if largest is not None:  # its diagonal, and what is added to it
        diagonal, combined, moved = (torch.empty_like(largest, dtype=torch.float32) for _ in range(3))
        chunk = torch.empty(min(CHUNK // 4, largest.numel()), dtype=torch.float32, device=largest.device)
        del diagonal, combined, moved, chunk
    for state in optimizer.state.values():
        state.pop("change", None)


def _weight(use: Use) -> nn.Parameter:
    return next(p for p in use.module.parameters(recurse=False) if p.ndim > 1 and p.requires_grad)


def _products(use: Use, n: int) -> float:
    """Return the operations for K, G u and Gᵀ c of one use: from its factors or from gradients, whichever is less."""
    if isinstance(use.module, nn.Embedding):
        return 0.0
    weight, t = _weight(use), use.positions
    o, i = weight.shape[0], math.prod(weight.shape[1:])
    rows = 2.0 * n * t * o * i
    return rows + min(n * (n + 1) * t * t * (i + o) + rows, rows + n * (n + 3) * o * i)
