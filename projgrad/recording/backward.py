"""One backward pass over the sites of a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .interception import Interception
from .recording import Recording
from .refusals import CHECKPOINTING, FREED
from .sites import Site

Receive = Callable[[Site, Tensor, Sequence[Tensor]], None]


@contextmanager
def recomputing(recording: Recording) -> Iterator[None]:
    """Intercept during a backward pass: what checkpointing runs again must save the same tensors.

    Raises:
        ValueError: checkpointing of a kind that cannot be followed.
        RuntimeError: the graph was freed.
    """
    before, recording.recomputing = recording.recomputing, True
    try:
        with Interception(recording):
            yield
    except RuntimeError as error:
        for words, meaning in CHECKPOINTING.items():
            if words in str(error):
                raise ValueError(meaning) from error
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(FREED) from error
        raise
    finally:
        recording.recomputing = before


@contextmanager
def receiving(recording: Recording, receive: Receive) -> Iterator[None]:
    """Hand the gradient at every site that a backward pass in here reaches to `receive(site, gradient, saved)`."""
    recording.receive = receive
    try:
        with recomputing(recording):
            yield
    finally:
        recording.receive = None


def backward(
    recording: Recording,
    losses: Tensor,
    weights: Tensor,
    receive: Receive,
    retain_graph: bool = True,
    watch: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:
    """Visit the sites in one backward pass of Σ_j w_j ℓ_j; return the gradients of `watch`, and make no others."""
    inputs = [recording.anchor, *watch]
    with receiving(recording, receive):
        return torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)[1:]
