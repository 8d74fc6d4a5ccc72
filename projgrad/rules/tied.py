"""The rule of a table that is looked up and multiplied with: tied embedding and output head."""

import torch
from torch import Tensor

from ..ops.cost import GramRoute
from ..ops.numerics import product_dtype
from .lookup import Lookup, near_one, tile_tokens, token_products
from .rule import Rule, Sum


class Tied(Sum):
    """g_j = Σ_t e_(ids_jt) b_jtᵀ + Σ_s p_js q_jsᵀ for a table [V, d].

    On a GPU K is that of the lookup, that of the product, and what they have in common, from pairs of tokens: nothing
    is as large as the table. Where chunks are faster for the lookup they are for both.
    """

    def __init__(self, table: Lookup, head: Rule) -> None:
        super().__init__([table, head])

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        table, head = self.rules
        if not table.b.is_cuda or table.cost().name == "chunks":
            return super().gram(u, float64)
        (K, v), (K2, v2) = (rule.gram(u, float64) for rule in self.rules)
        C = across(*table.tokens(float64), *head_factors(head), float64)
        return K + K2 + (C + C.mT), v + v2

    def cost(self) -> GramRoute:
        table, head = (rule.cost() for rule in self.rules)
        if table.name == "chunks":
            return super().cost()
        pairs = self.rules[0].ids.numel() * self.rules[1].p[..., 0].numel()
        flops = table.flops + head.flops + 2 * pairs * self.cols
        return table._replace(flops=flops, bytes=max(table.bytes, head.bytes))


def head_factors(head: Rule) -> tuple[Tensor, Tensor]:
    """Return p [n, t, V] and q [n, t, d] of a `Product`; one with the transposed table has them exchanged."""
    factors = head.p.flatten(2), head.q.flatten(2)
    return factors if head.order == (0, 1) else factors[::-1]


def across(ids: Tensor, b: Tensor, p: Tensor, q: Tensor, float64: bool = False) -> Tensor:
    """Return <lookup of sample j, product of sample k> = Σ_ts p_ks[ids_jt] (b_jt · q_ks) [n, n] in float64.

    ids [n, t], b [n, t, d] are zero where nothing was read; p [n, s, V], q [n, s, d].
    """
    (n, t, _), positions = b.shape, q.shape[1]
    if 0 in (*b.shape, *p.shape):
        return b.new_zeros((n, n), dtype=torch.float64)
    dtype = product_dtype(b.dtype, p.dtype, q.dtype, float64=float64)
    if dtype == torch.float64:
        b, q = b.double(), q.double()
    (b, power), (q, power2) = near_one(b), near_one(q)
    tokens, others, ids = b.flatten(0, 1), q.flatten(0, 1), ids.reshape(-1).clamp_min(0)
    sums = torch.empty((n, n * t), dtype=torch.float64, device=b.device)  # of each product with every token
    step = tile_tokens(n * positions, dtype)
    for s in range(0, n * t, step):
        part = slice(s, s + step)
        read, scale = near_one(p.index_select(2, ids[part]))  # [n, positions, tokens]
        pairs = token_products(others, tokens[part]).view(read.shape).mul_(read)
        sums[:, part] = pairs.sum(1, dtype=torch.float64).mul_(scale[:, None])
    return sums.view(n, n, t).sum(2).mT * power[:, None] * power2
