"""Per-sample gradients in full: for reference projectors, and for whoever wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..ops.gram import gram
from ..recording.losses import check_shape, check_weights
from .consumers import CollectRules, Pieces, explicit
from .passes import Passes
from .records import Projection
from .verify import verify

Projector = Callable[[Tensor, Tensor], Tensor]


def rows(passes: Passes, losses: Tensor) -> dict[str, Tensor]:
    """Return the per-sample gradients [n, *p.shape] of every followed parameter; see `Tape.rows`."""
    verify(passes, losses)
    parameters, n = passes.recording.parameters, len(losses)
    G: dict[str, Tensor] = {}

    def complete(name: str, pieces: Pieces) -> None:
        G[name] = explicit(parameters[name], pieces, n)

    passes.run(losses, CollectRules(complete))
    return {name: G[name] if name in G else explicit(p, [], n) for name, p in parameters.items()}


def project_explicit(
    passes: Passes, losses: Tensor, projector: Projector, scope: str, add: Tensor | None, rates: Mapping[str, float]
) -> Projection:
    """Set p.grad to projector(p.grad, G) + Σ_j add_j g_j; the rank stays unknown.

    projector: called with u [p] and G [n, p], for all tensors together or, with scope="per_tensor", one at a time; with
    `rates` both are multiplied by their roots, see `Tape.project_`.
    """
    check_shape(losses)
    check_weights("add", add, losses)
    verify(passes, losses)
    parameters, n, per_tensor = passes.recording.parameters, len(losses), scope == "per_tensor"
    add = losses.new_zeros(n) if add is None else add
    G: dict[str, Tensor] = {}
    projected: list[tuple[float, float, float]] = []  # what `_project` returns, of every vector
    unused = {name for name, p in parameters.items() if p.grad is not None}

    def project(names: Sequence[str]) -> None:
        """Project p.grad of these parameters as one vector."""
        rows = torch.cat([G.pop(name).flatten(1) for name in names], 1)
        params = {name: parameters[name] for name in names}
        projected.append(_project(projector, params, rows, add, {} if per_tensor else rates))

    def complete(name: str, pieces: Pieces) -> None:
        G[name] = explicit(parameters[name], pieces, n)
        unused.discard(name)
        if per_tensor:
            project([name])

    passes.run(losses, CollectRules(complete))
    for name in [name for name in parameters if name in unused]:
        complete(name, [])
    if not per_tensor:
        project([name for name in parameters if name in G])
    before, after = (sum(numbers[k] for numbers in projected) for k in (0, 1))
    worst = max([0.0, *(cosine for *_, cosine in projected)])
    return Projection(None, (after / before) ** 0.5 if before else 1.0, worst, 0, 0.0, (before, after))


def _project(
    projector: Projector, params: Mapping[str, Tensor], G: Tensor, add: Tensor, rates: Mapping[str, float]
) -> tuple[float, float, float]:
    """Project p.grad of some parameters as one vector; return ‖u‖² and ‖result‖², and the largest cosine with a g_j."""
    u = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params.values()]).to(G.dtype)
    mean, sizes = add.to(G.dtype) @ G, [p.numel() for p in params.values()]
    given, roots = u, None
    if rates:
        weights = [rates.get(name, 1.0) ** 0.5 for name in params]
        roots = torch.cat([u.new_full((size,), root) for size, root in zip(sizes, weights, strict=True)])
        u, G = u * roots, G.mul_(roots)
    out = projector(u, G)
    K, r = gram(G, out[None])
    squares = torch.stack([u.double().square().sum(), out.double().square().sum()])[:, None]
    if not (squares.isfinite().all() and K.isfinite().all()):
        raise FloatingPointError(f"NaN or Inf in the gradients of {', '.join(params)[:80]}; nothing was changed")
    before, after = squares[:, 0].sqrt()
    # A result this short has no direction: what it has in common with a row is measured against ‖u‖.
    norm = torch.where(after > 16 * len(G) * torch.finfo(G.dtype).eps * before, after, before)
    lengths = K.diagonal().clamp_min(0).sqrt()
    cosine = (r[:, 0].abs() / lengths.where(lengths > 0, 1)).max() / norm.where(norm > 0, 1)
    if roots is not None:  # what a rate of zero keeps in place is not projected
        out = torch.where(roots > 0, out / roots, given)
    for p, grad in zip(params.values(), (out + mean).split(sizes), strict=True):
        p.grad = grad.view_as(p).to(p.dtype)
    return float(squares[0]), float(squares[1]), float(cosine)
