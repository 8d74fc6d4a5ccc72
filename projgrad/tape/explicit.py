"""Per-sample gradients in full: for reference projectors, and for whoever wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..ops.gram import gram
from ..ops.refinement import cosines
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
    passes: Passes,
    losses: Tensor,
    projector: Projector,
    scope: str,
    add: Tensor | None,
    rates: Mapping[str, float],
) -> Projection:
    """Set p.grad to projector(p.grad, G) + Σ_j add_j g_j; the rank stays unknown.

    Args:
        projector: called with u [p] and G [n, p], for all tensors together or, with scope="per_tensor", one at a time.
        add: [n], None for zero.
        rates: see `Tape.project_`; a projector then gets both multiplied by their roots.

    Raises:
        FloatingPointError: NaN or Inf in a gradient.
    """
    verify(passes, losses)
    parameters, n, per_tensor = passes.recording.parameters, len(losses), scope == "per_tensor"
    add = losses.new_zeros(n) if add is None else add
    projection = _Projected(projector, parameters, add, {} if per_tensor else rates)
    G: dict[str, Tensor] = {}

    def complete(name: str, pieces: Pieces) -> None:
        G[name] = explicit(parameters[name], pieces, n)
        if per_tensor:
            projection.project([name], [G.pop(name)])

    passes.run(losses, CollectRules(complete))
    unused = {name: explicit(p, [], n) for name, p in parameters.items() if p.grad is not None and name not in G}
    if per_tensor:
        for name in unused.keys() - projection.seen:
            projection.project([name], [unused[name]])
    else:
        G |= unused
        projection.project(names := [name for name in parameters if name in G], [G[name] for name in names])
    return projection.record()


class _Projected:
    """What a projector made of p.grad, group of tensors by group."""

    def __init__(
        self, projector: Projector, parameters: Mapping[str, Tensor], add: Tensor, rates: Mapping[str, float]
    ) -> None:
        self.projector, self.parameters, self.add, self.rates = projector, parameters, add, rates
        self.before = self.after = self.worst = 0.0
        self.seen: set[str] = set()

    def project(self, names: Sequence[str], rows: Sequence[Tensor]) -> None:
        """Project p.grad of these parameters, whose per-sample gradients are `rows`, as one vector."""
        params = [self.parameters[name] for name in names]
        G = torch.cat([g.flatten(1) for g in rows], 1)
        u = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]).to(G.dtype)
        mean = self.add.to(G.dtype) @ G
        roots, given = None, u
        if self.rates:
            sizes = zip(names, params, strict=True)
            roots = torch.cat([u.new_full((p.numel(),), self.rates.get(name, 1.0) ** 0.5) for name, p in sizes])
            u, G = u * roots, G.mul_(roots)
        out = self.projector(u, G)
        K, r = gram(G, out[None])
        squares = torch.stack([u.double().square().sum(), out.double().square().sum()])[:, None]
        if not (squares.isfinite().all() and K.isfinite().all()):
            raise FloatingPointError(f"NaN or Inf in the gradients of {', '.join(names)[:80]}; nothing was changed")
        self.worst = max(self.worst, float(cosines(K, r, squares, torch.zeros_like(r)).max()))
        self.before, self.after = self.before + float(squares[0]), self.after + float(squares[1])
        if roots is not None:  # what a rate of zero keeps in place is not projected
            out = torch.where(roots > 0, out / roots, given)
        for p, grad in zip(params, (out + mean).split([p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p).to(p.dtype)
        self.seen.update(names)

    def record(self) -> Projection:
        """Return what was done."""
        preserved = (self.after / self.before) ** 0.5 if self.before else 1.0
        return Projection(None, preserved, self.worst, 0, 0.0, (self.before, self.after))
