"""The rule of table lookups: embeddings, indexing. Only rows that occur are ever touched."""

import torch
from torch import Tensor

from ..cost import Route
from .rules import Rule, gram, working


class Lookup(Rule):
    """Position t of sample j read row ids[j, t] of a table and got b[j, t] back; ids < 0 read nothing.

    Args:
        ids: [n, t].
        b: [n, t, *cols].
        shape: of the table.
    """

    name = "lookup"

    def __init__(self, ids: Tensor, b: Tensor, shape: torch.Size) -> None:
        self.n, self.shape, self.dtype = len(ids), shape, working(b.dtype, False)
        self.half = b.dtype.itemsize == 2
        self.ids, self.b = ids, b.reshape(*ids.shape, self.cols)

    def _scattered(self, slots: Tensor, size: int, tokens: Tensor, wide: bool) -> Tensor:
        """The rows of the given tokens (indices into n t) summed into their slots, [n, size, cols]."""
        dtype = torch.float64 if wide else self.dtype
        g = self.b.new_zeros((self.n * size, self.b.shape[2]), dtype=dtype)
        sample = tokens // max(1, self.ids.shape[1])
        g.index_add_(0, sample * size + slots, self.b.reshape(-1, self.b.shape[2])[tokens].to(dtype))
        return g.view(self.n, size, -1)

    def chunk(self, rows: slice, wide: bool = False) -> Tensor:
        ids = self.ids.reshape(-1)
        tokens = ((ids >= rows.start) & (ids < rows.stop)).nonzero()[:, 0]
        return self._scattered(ids[tokens] - rows.start, rows.stop - rows.start, tokens, wide)

    def gram(self, u: Tensor | None, wide: bool = False) -> tuple[Tensor, Tensor]:
        ids = self.ids.reshape(-1)
        order = ids.argsort()
        order = order[(ids < 0).sum() :]
        used, inverse, counts = ids[order].unique_consecutive(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).tolist()
        step = self._step(wide)
        u = None if u is None else u.reshape(len(u), self.shape[0], -1)
        K = torch.zeros(self.n, self.n, dtype=torch.float64, device=ids.device)
        v = K.new_zeros((self.n, 0 if u is None else len(u)))
        for start in range(0, len(used), step):
            some = used[start : start + step]
            span = slice(ends[start - 1] if start else 0, ends[start + len(some) - 1])
            g = self._scattered(inverse[span] - start, len(some), order[span], wide)
            k, w = gram(g, None if u is None else u[:, some], wide)
            K, v = K + k, v + w
        return K, v

    def cost(self) -> Route:
        used = self.ids[self.ids >= 0].unique().numel()
        step = min(used, self._step(False))
        bytes = self.n * step * self.cols * self.dtype.itemsize
        return Route("chunks", step, self.cols, self.n * (self.n + 1) * used * self.cols, bytes)

    def combine_(self, out: Tensor, c: Tensor, wide: bool = False) -> None:
        if wide:
            return super().combine_(out, c, wide)
        keep = self.ids >= 0
        scaled = self.b * c.to(self.b.dtype)[:, None, None]
        out.index_add_(0, self.ids[keep], scaled[keep].reshape(-1, *self.shape[1:]).to(out.dtype))
