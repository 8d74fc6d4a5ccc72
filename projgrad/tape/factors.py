"""The gradient to project as the factors that it is made of: of a linear layer, Σ_r p_r q_rᵀ."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recording.backward import recomputing
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
        """Return ⟨g_j, Σ_r p_r q_rᵀ⟩ [n, 1]: few operations where there are few positions.

        Multiplied in float64, for pairs of positions lose digits where these cancel; factors of 16 bits have none.
        """
        dtype = rule.dtype if rule.has_16bit_factor and not float64 else torch.float64
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

    def receive(site: Site, gradients: Sequence[Tensor | None]) -> None:
        p, (q,) = gradients[site.edge.output_nr], site.saved.take(keep=False)
        (name,) = site.sources[0].names
        if p is not None:
            factors[name] = FactoredGradient(p.flatten(0, -2), q.detach().flatten(0, -2))

    sites = [site for site in recording.sites if _is_short(site) and uses[next(iter(site.sources[0].names))] == 1]
    hooks = [site.edge.node.register_prehook(functools.partial(receive, site)) for site in sites]
    try:
        with recomputing(recording):
            inputs = list(recording.parameters.values())
            torch.autograd.backward(loss, torch.full_like(loss, weight), inputs=inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return factors


def _is_short(site: Site) -> bool:
    """Return whether a site is a linear layer whose factors are shorter than the gradient that they make."""
    weight = site.sources[0]
    if not (site.name == "linear" and site.factored and weight.whole and weight.tensor.grad is None):
        return False
    o, i = weight.tensor.shape
    return 4 * math.prod(site.shape[:-1]) * (o + i) < o * i
