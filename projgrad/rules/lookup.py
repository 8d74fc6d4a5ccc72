"""The rule of table lookups: embeddings, indexing. Only rows that occur are ever touched."""

import torch
from torch import Tensor

from ..ops.cost import GramRoute
from ..ops.numerics import product_dtype
from .rule import Rule, gram


class Lookup(Rule):
    """Position t of sample j read row ids[j, t] of a table and got b[j, t] back; ids < 0 read nothing.

    ids [n, t], b [n, t, *cols]; shape: of the table. Which rows occur decides how much there is to do: the ids come to
    the host, once.
    """

    name = "lookup"

    def __init__(self, ids: Tensor, b: Tensor, shape: torch.Size) -> None:
        self.n, self.shape, self.dtype, self.device = len(ids), shape, product_dtype(b.dtype), b.device
        self.has_16bit_factor = b.dtype.itemsize == 2
        self.ids, self.b = ids, b.reshape(*ids.shape, self.cols)
        self._known: tuple[Tensor, Tensor] | None = None

    def _ordered(self) -> tuple[Tensor, Tensor]:
        """Return all tokens (indices into n t) by their ids, and the ids in that order on the host [n t]."""
        if self._known is None:
            ids, order = self.ids.reshape(-1).sort(stable=True)
            self._known = order, ids.cpu()
        return self._known

    def _scattered(self, slots: Tensor, size: int, tokens: Tensor, float64: bool) -> Tensor:
        """Return the rows of the given tokens, summed into their slots [n, size, cols]."""
        dtype = torch.float64 if float64 else self.dtype
        g = self.b.new_zeros((self.n * size, self.b.shape[2]), dtype=dtype)
        sample = tokens // max(1, self.ids.shape[1])
        _add_rows_(g, sample * size + slots, self.b.reshape(-1, self.b.shape[2])[tokens].to(dtype))
        return g.view(self.n, size, -1)

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        order, known = self._ordered()
        first, end = torch.searchsorted(known, torch.tensor([rows.start, rows.stop])).tolist()
        tokens = order[first:end]
        return self._scattered(self.ids.reshape(-1)[tokens] - rows.start, rows.stop - rows.start, tokens, float64)

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        order, known = self._ordered()
        first = int(torch.searchsorted(known, 0))
        ends = (first + known[first:].unique_consecutive(return_counts=True)[1].cumsum(0)).tolist()
        order = order[first:]
        ids = self.ids.reshape(-1)[order]
        slots = (ids[1:] != ids[:-1]).cumsum(0)  # of all tokens but the first, whose slot is 0
        slots = torch.cat([slots.new_zeros(len(ids[:1])), slots])
        used = ids[torch.searchsorted(slots, torch.arange(len(ends), device=ids.device))]
        step = self.chunk_rows(float64)
        u = None if u is None else u.reshape(len(u), self.shape[0], -1)
        K = torch.zeros(self.n, self.n, dtype=torch.float64, device=ids.device)
        v = K.new_zeros((self.n, 0 if u is None else len(u)))
        for start in range(0, len(ends), step):
            ids_now = used[start : start + step]
            span = slice(ends[start - 1] - first if start else 0, ends[start + len(ids_now) - 1] - first)
            g = self._scattered(slots[span] - start, len(ids_now), order[span], float64)
            k, w = gram(g, None if u is None else u[:, ids_now], float64)
            K, v = K + k, v + w
        return K, v

    def cost(self) -> GramRoute:
        used = self.ids[self.ids >= 0].unique().numel()
        step = min(used, self.chunk_rows(False))
        bytes = self.n * step * self.cols * self.dtype.itemsize
        return GramRoute("chunks", step, self.cols, self.n * (self.n + 1) * used * self.cols, bytes)

    def combine_(self, out: Tensor, c: Tensor, float64: bool = False) -> None:
        if float64:
            return super().combine_(out, c, float64)
        ids = self.ids.reshape(-1)
        scaled = self.b * c.to(self.b.dtype)[:, None, None]
        scaled = scaled.reshape(len(ids), *self.shape[1:]).to(out.dtype)
        nothing = ids < 0  # such tokens add zeros, anywhere: picking the others would have to wait for their number
        scaled = scaled.masked_fill(nothing.view(-1, *[1] * (scaled.ndim - 1)), 0.0)
        _add_rows_(out, ids.where(~nothing, torch.arange(len(ids), device=ids.device) % len(out)), scaled)


def _add_rows_(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows to out[index], in the same order in every run: on a GPU `index_add_` adds atomically."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)
