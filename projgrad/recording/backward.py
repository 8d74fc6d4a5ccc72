"""One backward pass over the sites of a recording."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from .._torch_private import without_torch_function
from .interception import Interception
from .recording import Recording
from .refusals import CHECKPOINTING, FREED
from .sites import Site

FEW = 1 << 18  # numbers: keeping these costs nothing, and a hook for each site some time
Receive = Callable[[Site, Tensor, Sequence[Tensor]], None]


@contextmanager
def recomputing(recording: Recording) -> Iterator[None]:
    """Intercept during a backward pass: what checkpointing runs again must save the same tensors.

    Raises:
        ValueError: checkpointing of a kind that cannot be followed.
        RuntimeError: the graph was freed.
    """
    before, recording.recomputing = recording.recomputing, True
    repeats = any(site.saved.unpacks for site in recording.sites)
    try:
        with Interception(recording) if repeats else nullcontext():
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


def backward(
    recording: Recording,
    losses: Tensor,
    weights: Tensor,
    receive: Receive,
    ends: Sequence[int],
    retain_graph: bool = True,
    watch: Sequence[Tensor] = (),
    collect: bool = False,
) -> tuple[Tensor | None, ...]:
    """Hand the gradient at every site to `receive(site, gradient, saved)`, in one backward pass of Σ_j w_j ℓ_j.

    Autograd makes no gradient of a weight. It goes down to the `ends`, from `ends_of`, and returns theirs; at the sites
    above them a hook hands over what passes.

    collect: get the gradients at sites that keep them anyway without hooks, all at the end; and those at all sites
        where that takes little more.
    watch: parameters whose gradients are returned.
    """

    mixed = torch.is_autocast_enabled(losses.device.type)

    def hook(site: Site, gradients: Sequence[Tensor | None]) -> None:
        b = gradients[site.edge.output_nr]
        if b is not None:
            saved = site.saved.take(retain_graph)  # unpacking may run a part of the forward pass: it is intercepted
            with exactly():
                receive(site, b, saved)

    @contextmanager
    def exactly() -> Iterator[None]:
        exact = torch.autocast(losses.device.type, enabled=False) if mixed else nullcontext()
        plain = without_torch_function()
        try:
            with plain, torch.no_grad(), exact:
                yield
        except BaseException:
            plain.__exit__(None, None, None)  # Ctrl-C may have come before; the step puts the other modes back
            raise

    # What is unpacked inside the pass is recomputed once, and hooks of others on a node change what comes to ours.
    hooked = [recording.hooked or site.saved.unpacks for site in recording.sites]
    few = collect and _little_else(recording)
    returned = [
        site
        for site in recording.sites
        if not hooked[site.index] and (site.index in ends or (collect and (site.factored or few)))
    ]
    edges = [site.edge for site in returned]
    beyond = [source.edge for k in ends if hooked[k] for source in recording.sites[k].sources]
    if not watch and not edges and not beyond:
        return ()
    rest = set(recording.sites).difference(returned)
    hooks = [site.edge.node.register_prehook(functools.partial(hook, site)) for site in recording.sites if site in rest]
    try:
        with recomputing(recording):
            grads = torch.autograd.grad(
                losses, [*watch, *edges, *beyond], weights, retain_graph=retain_graph, allow_unused=True
            )
    finally:
        for handle in hooks:
            handle.remove()
    grads_at = grads[len(watch) : len(watch) + len(returned)]
    with exactly():
        for site, b in zip(reversed(returned), reversed(grads_at), strict=True):  # in the order of a backward pass
            if b is not None:
                receive(site, b, site.saved.take(retain_graph))
    if not retain_graph:
        for site in recording.sites:
            site.saved.tensors = None
    return grads[: len(watch)]


def _little_else(recording: Recording) -> bool:
    """Return whether the outputs of sites that do not keep their gradients are few, or a fourth of those that do."""
    sizes = [0, 0]
    for site in recording.sites:
        sizes[site.factored] += math.prod(site.shape)
    return sizes[False] <= max(FEW, sizes[True] // 4)
