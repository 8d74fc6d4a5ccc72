"""The gradient to project as the factors that it is made of: of a linear layer, Σ_r p_r q_rᵀ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recording.backward import receiving
from ..recording.recording import Recording
from ..recording.sites import Site
from ..rules.product import Product
from ..rules.rule import Rule


class FactoredGradient(NamedTuple):
    """A gradient of a linear layer Σ_r p_r q_rᵀ, p [rows, o] and q [rows, i]."""

    p: Tensor
    q: Tensor

    def squared_norm(self) -> Tensor:
        """Return ‖Σ_r p_r q_rᵀ‖² in float64, ()."""
        return ((self.p @ self.p.mT) * (self.q @ self.q.mT)).sum(dtype=torch.float64)

    def dot(self, rule: Product, float64: bool) -> Tensor:
        """Return ⟨g_j, Σ_r p_r q_rᵀ⟩ [n, 1]: few operations where there are few positions."""
        dtype = torch.float64 if float64 else rule.dtype
        pairs = [f.flatten(0, 1).flatten(1).to(dtype) @ o.to(dtype).mT for f, o in ((rule.p, self.p), (rule.q, self.q))]
        return (pairs[0] * pairs[1]).view(rule.n, -1).sum(1, keepdim=True, dtype=torch.float64)


class ForgetFactors(dict[str, FactoredGradient]):
    """Factors of p.grad by parameter, for as long as p.grad is their product.

    useful: whether a projection met a layer whose inner products they make cheaper.
    """

    useful = False


def few_positions(rule: Rule) -> bool:
    """Return whether inner products with the gradient of as many samples are cheaper from its factors."""
    if not (isinstance(rule, Product) and len(rule.left) == len(rule.right) == 1):
        return False
    (o,), (i,), tokens = rule.left, rule.right, rule.n * rule.p.shape[1]
    return 4 * tokens * (i + o) < i * o


def accumulate_(recording: Recording, loss: Tensor, weight: float) -> ForgetFactors:
    """Add weight * ∂loss/∂p to every p.grad by plain autograd; loss () of the recorded forward pass.

    Returns:
        The factors of the gradients of linear layers, where they are shorter than the gradients.
    """
    factors = ForgetFactors()
    uses = Counter(name for site in recording.sites for source in site.sources for name in source.names)
    uses.update(recording.unknown.keys())

    def receive(site: Site, b: Tensor, saved: Sequence[Tensor]) -> None:
        first = site.sources[0]
        if site.name != "linear" or not saved or not first.whole or first.tensor.grad is not None:
            return
        p, q = b.detach().flatten(0, -2), saved[0].detach().flatten(0, -2)
        (name,) = first.names
        if uses[name] == 1 and 4 * len(p) * (p.shape[1] + q.shape[1]) < first.tensor.numel():
            factors[name] = FactoredGradient(p, q)

    with receiving(recording, receive):
        inputs = [recording.anchor, *recording.parameters.values()]
        torch.autograd.backward(loss, torch.full_like(loss, weight), inputs=inputs)
    return factors
