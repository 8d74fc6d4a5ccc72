"""Spans of the per-sample gradients of parameters with few elements, held in full: p x p for any number of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .consumers import explicit
from .gradient_access import Block
from .grouping import Use

SMALL = 512  # elements; more samples than that span everything or nearly so, where an iteration takes very long


class SmallSpan:
    """The span of the gradients of one block, from Σ_j ĝ_j ĝ_jᵀ [p, p] with rows of unit length.

    roots: √D [p] where the span of D g_j is taken out of a change, as near as D⁻¹ measures it: rows are √D ∘ g_j.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.count = block, 0
        device = next(iter(block.parameters.values())).device
        self.sums = torch.zeros(block.numel(), block.numel(), dtype=torch.float64, device=device)
        self.roots: Tensor | None = None

    def weigh(self, diagonals: Sequence[Tensor | float]) -> None:
        """Set D, of the tensors of the block in order; to be called before any row is added."""
        pairs = zip(diagonals, self.block.parameters.values(), strict=True)
        whole = [D if isinstance(D, Tensor) else p.new_full(p.shape, D) for D, p in pairs]
        self.roots = torch.cat([D.flatten() for D in whole]).double().sqrt()

    def rows(self, uses: Sequence[Use], n: int) -> Tensor:
        """Return the gradients of one micro-batch with unit length [n, p] in float64; zero and lost ones are zero."""
        pieces = {name: [(use.source, use.rule) for use in uses if use.name == name] for name in self.block.parameters}
        rows = [explicit(p, pieces[name], n).reshape(n, p.numel()) for name, p in self.block.parameters.items()]
        g = torch.cat([one.double() for one in rows], 1)
        largest = g.abs().amax(1, keepdim=True)
        least = torch.finfo(self.block.dtype).tiny / torch.finfo(self.block.dtype).eps
        g = g / largest.where(largest >= least, torch.inf)  # the largest element is 1, or all are 0
        if self.roots is not None:
            g = g * self.roots
        norms = g.norm(dim=1, keepdim=True)
        return g / norms.where(norms > 0, 1.0)

    def add(self, rows: Tensor) -> None:
        self.sums += rows.mT @ rows
        self.count += len(rows)

    def project_(self, r: Sequence[Tensor]) -> None:
        """Take the span out of r, the tensors of the block in order."""
        values, vectors = torch.linalg.eigh(self.sums)
        eps = torch.finfo(self.block.dtype).eps
        outside = values <= self.count * max((4 * eps) ** 2, 8 * torch.finfo(torch.float64).eps)
        flat = torch.cat([t.flatten() for t in r]).double()
        roots = torch.ones_like(flat) if self.roots is None else self.roots
        flat = torch.where(roots > 0, flat / roots, 0.0)
        flat = vectors @ ((vectors.mT @ flat) * outside) * roots
        for t, part in zip(r, flat.split([t.numel() for t in r]), strict=True):
            t.copy_(part.view_as(t))
