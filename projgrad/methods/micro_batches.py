"""Retain and forget sets in micro-batches: iterables of closures, each called as often as the projection needs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _options
from .._torch_private import tree_leaves
from ..recording.losses import check_shape, check_values, instead
from ..tape.passes import Passes
from ..tape.per_sample import per_sample
from .closures import Closures
from .protocol import Closure
from .replicas import ReplicatedModel

Closed = Closure | Iterable[Closure]


@dataclass(frozen=True)
class MicroBatchOptions:
    """How micro-batches are handled; see `OrthoGrad`. Raises TypeError or ValueError for an option out of its range."""

    tolerance: float = 1e-4
    max_passes: int = 100
    progress: bool = False
    forget_reduction: str = "mean"

    def __post_init__(self) -> None:
        _options.within("union_tolerance", self.tolerance, "(0, 1)")
        _options.check_integer("max_passes", self.max_passes, 2)
        _options.check_flag("progress", self.progress)
        _options.check_choice("forget_reduction", self.forget_reduction, ("mean", "sum"))


def micro_batches(losses: Callable[..., Tensor], batches: Iterable[object]) -> list[Closure]:
    """Return one closure per batch of a data loader, `losses(*batch)`, for `OrthoGrad.step`.

    Each closure keeps its own batch. A lambda in a loop does not: all of them see the last one. The loader is read
    once, and its batches are held, so move them to the device inside `losses`.

    Args:
        losses: a function of one batch: of its parts for a tuple or list, of its entries by name for a dictionary.
        batches: an iterable of batches, such as a `torch.utils.data.DataLoader`.

    Raises:
        ValueError: two batches that are the same tensors.

    Example:
        >>> model, loss = torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy
        >>> loader = [(torch.randn(3, 4), torch.tensor([0, 1, 0])) for _ in range(2)]
        >>> retain = projgrad.micro_batches(lambda x, y: loss(model(x), y, reduction="none"), loader)
        >>> [len(closure()) for closure in retain]
        [3, 3]
    """
    _options.check_callable("losses", losses, "a function of one batch")

    def closure(batch: object) -> Closure:
        if isinstance(batch, Mapping):
            return functools.partial(losses, **batch)
        return functools.partial(losses, *(batch if isinstance(batch, (tuple, list)) else (batch,)))

    held = list(batches)
    seen: dict[tuple, int] = {}
    for k, batch in enumerate(held):
        key = tuple(id(t) for t in tree_leaves(batch) if isinstance(t, Tensor))
        if key and seen.setdefault(key, k) != k:
            raise ValueError(
                f"batches {seen[key]} and {k} are the same tensors: a loader that fills its buffers anew has to be "
                "given with a copy of each, `(batch.clone() for batch in loader)`"
            )
    return [closure(batch) for batch in held]


def closures_of(name: str, given: Closed) -> dict[str, Closure]:
    """Return the closures of one side of a step by name; an iterable is read once, here.

    Raises ValueError for an empty iterable, and for functions that can only return the same batch.
    """
    if callable(given) or isinstance(given, (Tensor, nn.Module, str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        return {name: given}
    closures = list(given)
    if not closures:
        raise ValueError(
            f"{name} is an iterable without closures. A generator is exhausted after one step: give a list, or a new "
            "generator to every step"
        )
    seen: dict[tuple, int] = {}
    for k, closure in enumerate(closures):
        key = _captured(closure)
        if key is not None and seen.setdefault(key, k) != k and closures[seen[key]] is not closure:
            raise ValueError(
                f"{name}[{seen[key]}] and {name}[{k}] are one function with the same variables: a lambda made in a "
                "loop sees the batch that the loop ended with. Use projgrad.micro_batches, or bind the batch as in "
                "`lambda x=x, y=y: ...`"
            )
    if len(closures) == 1:
        return {name: closures[0]}
    return {f"{name}[{k}]": closure for k, closure in enumerate(closures)}


def _captured(closure: object) -> tuple | None:
    """Return what a plain function is made of; functions for which that is equal do the same."""
    if not hasattr(closure, "__code__") or hasattr(closure, "__self__"):
        return None
    values = (*(closure.__defaults__ or ()), *(closure.__kwdefaults__ or {}).values())
    return closure.__code__, *map(id, closure.__closure__ or ()), *map(id, values)


class Replay:
    """Random states of torch by micro-batch: every call of a closure draws what its first call drew.

    What is drawn after the step does not depend on how often the closures were called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" and torch.cuda.is_available() else None
        self.states: dict[str, list[Tensor]] = {}  # of those that draw at all: 5 kB on a CPU

    @contextmanager
    def drawn(self, name: str, first: bool) -> Iterator[None]:
        before = self._state()
        if not first and name in self.states:
            self._set(self.states[name])
        try:
            yield
        finally:
            if not first:
                self._set(before)
        if first and any(not torch.equal(a, b) for a, b in zip(before, self._state(), strict=True)):
            self.states[name] = before

    def _state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device else [])]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device:
            torch.cuda.set_rng_state(states[1], self.device)


class RetainBatches:
    """The micro-batches of the retain side: forward passes that are recorded, and the same at every call.

    named: closures by name. prepare: what is done with losses [n] before they are differentiated. spread: over
    processes, where the model is.
    values: the losses of the first calls, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        closures: Closures,
        named: Mapping[str, Closure],
        prepare: Callable[[Tensor], Tensor],
        spread: ReplicatedModel | None = None,
    ) -> None:
        self.model, self.closures, self.named, self.prepare = model, closures, named, prepare
        self.tape = functools.partial(per_sample, model, closures.params) if spread is None else spread.tape
        self.running, self.spread = nullcontext if spread is None else spread.running, spread
        self.check_made_inside = closures.check_made_inside
        if spread is not None:
            self.check_made_inside = functools.partial(spread.check_made_inside, closures)
        self.replay = Replay(next(iter(closures.params.values())).device)
        self.values: dict[str, Tensor] = {}

    @contextmanager
    def recorded(self, name: str, counts: bool = True) -> Iterator[tuple[Passes, Tensor]]:
        """Call one closure; give the passes over its graph, and its losses; of them none, (0,), unless it counts.

        Raises, with the name of the micro-batch: ValueError where the losses are none of samples, or not those of the
        first call; what comes of working with them.
        """
        closure, first = self.named[name], name not in self.values
        with self.replay.drawn(name, first), self.closures.watch(name), self.running(), self.tape() as tape:
            losses = _called(closure, name, first)
        self.closures.check_unchanged()
        with _named(name, self.spread):
            if self.spread is None or not (isinstance(losses, Tensor) and losses.shape == (0,)):
                check_shape(losses)
            if first and len(losses) and not tape.recording.sites:
                self.check_made_inside(losses, closure, name)
            check_values(losses.tolist())
            self._compare(name, losses.detach())
            with torch.enable_grad():
                losses = self.prepare(losses if counts else losses[:0])
            yield tape.passes, losses

    def _compare(self, name: str, losses: Tensor) -> None:
        """Check that the losses are those of the first call, to the last bit."""
        before = self.values.setdefault(name, losses)
        if len(before) != len(losses):
            raise ValueError(
                f"returned {len(losses)} losses, and {len(before)} when it was first called in this step: a closure is "
                "called several times, and has to return the same losses each time"
            )
        if not torch.equal(before, losses):
            worst = float((before - losses).abs().max())
            raise ValueError(
                f"returned other losses than when it was first called in this step (by up to {worst:.1e}): it is "
                "called several times. Choose its batch before, draw random numbers from torch's default "
                "generator only, which is replayed, and on a GPU call torch.use_deterministic_algorithms(True)"
            )


def _called(closure: Closure, name: str, first: bool) -> Tensor:
    try:
        return closure()
    except StopIteration as error:
        when = "" if first else ", when it was called again"
        raise ValueError(f"{name}() ran out of data{when}: choose the batch of a closure before the step") from error


@contextmanager
def _named(name: str, spread: ReplicatedModel | None = None) -> Iterator[None]:
    """Put the name of a micro-batch before the message of an error, unless it is that of another process."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        if type(error) not in (ValueError, ArithmeticError, FloatingPointError):
            raise
        if spread is not None and spread.processes.told(error):
            raise
        raise type(error)(f"{name}: {error}") from error


def padded(names: Iterable[str], count: int) -> list[tuple[str, bool]]:
    """Return the names of `count` visits, and whether each counts: the last micro-batch fills up what is missing."""
    counting = [(name, True) for name in names]
    return counting + [(counting[-1][0], False)] * (count - len(counting))


def accumulate_forget(
    closures: Closures,
    named: Mapping[str, Closure],
    weight: float,
    reduction: str,
    scale: Callable[[Tensor], Tensor],
    spread: ReplicatedModel | None = None,
) -> Tensor:
    """Add weight times the gradient of the forget loss over all micro-batches to p.grad; return that loss, ().

    A micro-batch returns one scalar, or one loss per sample. reduction: "mean": of the scalars, or of all samples.
    "sum": of the same. spread: over processes, where the model is; weight is that of the mean over them.
    """
    params, total, count, shapes = list(closures.params.values()), 0.0, 0, set()
    each = weight / len(named) if reduction == "mean" else weight
    replay = Replay(params[0].device)
    for name, counts in padded(named, len(named) if spread is None else spread.visits(len(named))):
        with closures.watch(name), nullcontext() if counts else replay.drawn(name, False):
            losses = _called(named[name], name, counts)
        if not isinstance(losses, Tensor):
            raise ValueError(f"{name}() must return a loss; got {instead(losses, 'loss')}")
        if losses.ndim > 1 or not losses.numel():
            raise ValueError(f"{name}() must return one loss, or one per sample, (n,); got {tuple(losses.shape)}")
        if not losses.requires_grad:
            raise ValueError(f"{name}() returned a loss that does not depend on any trainable parameter")
        shapes.add(losses.ndim)
        if len(shapes) > 1:
            raise ValueError(
                f"{name}() returned a loss of shape {tuple(losses.shape)}: all closures of forget return "
                "one scalar each, or all of them one loss per sample"
            )
        with _named(name):
            check_values(losses.detach().reshape(-1).tolist())
        if counts:
            total, count = total + losses.detach().sum(), count + losses.numel()
        loss = scale(losses.sum())
        if spread is None:
            torch.autograd.backward(loss, torch.full_like(loss, each), inputs=params)
        else:
            spread.accumulate(loss, each if counts else 0.0)
    if reduction == "mean":  # only now is the number of samples known
        if spread is not None:
            spread.check_means(count, len(named))
        for p in params if count > len(named) else ():
            if p.grad is not None:
                p.grad.mul_(len(named) / count)
        total = total / count
    return total
