"""The rule of table lookups: embeddings, indexing."""

import torch
from torch import Tensor

from ..ops.cost import GramRoute, chunk_bytes, rates
from ..ops.linear_cuda import powers, product
from ..ops.numerics import product_dtype
from .rule import Rule, gram, weighted


class Lookup(Rule):
    """Position t of sample j read row ids[j, t] of a table and got b[j, t] back; ids < 0 read nothing.

    ids [n, t], b [n, t, *cols]; shape: of the table. On a CPU only rows that occur are touched. On a GPU the host never
    asks which these are: K comes from pairs of tokens, or from chunks of the whole table where that is less.
    """

    name = "lookup"

    def __init__(self, ids: Tensor, b: Tensor, shape: torch.Size) -> None:
        self.n, self.shape, self.dtype, self.device = len(ids), shape, product_dtype(b.dtype), b.device
        self.has_16bit_factor = b.dtype.itemsize == 2
        self.ids, self.b = ids, b.reshape(*ids.shape, self.cols)
        self._known: tuple[Tensor, Tensor] | None = None

    def _ordered(self) -> tuple[Tensor, Tensor]:
        """Return all tokens (indices into n t) by their ids, and the ids in that order [n t]."""
        if self._known is None:
            ids, order = self.ids.reshape(-1).sort(stable=True)
            self._known = order, ids
        return self._known

    def _scattered(self, b: Tensor, tokens: Tensor, slots: Tensor, size: int, float64: bool) -> Tensor:
        """Return rows b of the given tokens, summed into their slots [n, size, cols]."""
        dtype = torch.float64 if float64 else self.dtype
        g = self.b.new_zeros((self.n * size, self.b.shape[2]), dtype=dtype)
        sample = tokens // max(1, self.ids.shape[1])
        _add_rows_(g, sample * size + slots, b.to(dtype))
        return g.view(self.n, size, -1)

    def chunk(self, rows: slice, float64: bool = False) -> Tensor:
        if self.b.is_cuda:
            return self._chunk_of_all(rows, float64)
        order, known = self._ordered()
        first, end = torch.searchsorted(known, torch.tensor([rows.start, rows.stop])).tolist()
        tokens = order[first:end]
        slots, b = self.ids.reshape(-1)[tokens] - rows.start, self.b.flatten(0, 1)[tokens]
        return self._scattered(b, tokens, slots, rows.stop - rows.start, float64)

    def _chunk_of_all(self, rows: slice, float64: bool) -> Tensor:
        """Return a chunk to which every token is added; those of other rows are zeros, spread over all slots."""
        size, slots = rows.stop - rows.start, self.ids.reshape(-1) - rows.start
        tokens = torch.arange(len(slots), device=slots.device)
        inside = (slots >= 0) & (slots < size)
        b = self.b.flatten(0, 1).masked_fill(~inside[:, None], 0)
        return self._scattered(b, tokens, slots.where(inside, tokens % size), size, float64)

    def gram(self, u: Tensor | None, float64: bool = False) -> tuple[Tensor, Tensor]:
        if not self.b.is_cuda:
            return self._gram_of_used(u, float64)
        if self.cost().name == "chunks":
            return super().gram(u, float64)
        ids, b = self.tokens(float64)
        K = equal_tokens(ids, b)
        return K, K.new_empty((self.n, 0)) if u is None else self.dot(u, float64)

    def tokens(self, float64: bool) -> tuple[Tensor, Tensor]:
        """Return ids [n, t] and b [n, t, cols], zero where nothing was read; in float64 if asked for."""
        b = self.b.masked_fill((self.ids < 0)[..., None], 0)
        return self.ids, b.double() if float64 else b

    def dot(self, u: Tensor, float64: bool = False) -> Tensor:
        """Return v_jm = Σ_t b_jt · u_m[ids_jt] [n, m], all in float64."""
        ids, b = self.tokens(False)
        v = b.new_zeros((self.n, len(u)), dtype=torch.float64)
        if 0 in (*b.shape, *u.shape):
            return v
        samples = max(1, chunk_bytes(self.device.type) // (16 * b[0].numel()))
        for s in range(0, self.n, samples):
            read, some = ids[s : s + samples].clamp_min(0), b[s : s + samples]
            for k, table in enumerate(u.reshape(len(u), self.rows, self.cols)):
                v[s : s + samples, k] = table[read].double().mul_(some).sum((1, 2))
        return v

    def weighted_gram(self, d: Tensor, u: Tensor, float64: bool = False) -> tuple[Tensor, Tensor]:
        if self.b.is_cuda:
            return super().weighted_gram(d, u, float64)
        roots, scaled = weighted(d, u, float64)
        K, v = self._gram_of_used(scaled[None], float64, roots.reshape(self.rows, self.cols))
        return K, v[:, 0]

    def _gram_of_used(self, u: Tensor | None, float64: bool, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute K and v from chunks of the rows that occur; scales [rows, cols] multiply every gradient."""
        order, known = self._ordered()
        first = int(torch.searchsorted(known, 0))
        ends = (first + known[first:].unique_consecutive(return_counts=True)[1].cumsum(0)).tolist()
        order = order[first:]
        ids = self.ids.reshape(-1)[order]
        slots = (ids[1:] != ids[:-1]).cumsum(0)  # of all tokens but the first, whose slot is 0
        slots = torch.cat([slots.new_zeros(len(ids[:1])), slots])
        used = ids[torch.searchsorted(slots, torch.arange(len(ends), device=ids.device))]
        step = self.chunk_rows(float64) if scales is None else max(1, self.chunk_rows(float64) // 4)
        u = None if u is None else u.reshape(len(u), self.shape[0], -1)
        K = torch.zeros(self.n, self.n, dtype=torch.float64, device=ids.device)
        v = K.new_zeros((self.n, 0 if u is None else len(u)))
        for start in range(0, len(ends), step):
            ids_now = used[start : start + step]
            span = slice(ends[start - 1] - first if start else 0, ends[start + len(ids_now) - 1] - first)
            b = self.b.flatten(0, 1)[order[span]]
            g = self._scattered(b, order[span], slots[span] - start, len(ids_now), float64)
            if scales is not None:
                g.mul_(scales[ids_now])
            k, w = gram(g, None if u is None else u[:, ids_now], float64)
            K, v = K + k, v + w
        return K, v

    def cost(self) -> GramRoute:
        if self.b.is_cuda:
            return self._route()
        used = self.ids[self.ids >= 0].unique().numel()
        step = min(used, self.chunk_rows(False))
        bytes = self.n * step * self.cols * self.dtype.itemsize
        return GramRoute("chunks", step, self.cols, self.n * (self.n + 1) * used * self.cols, bytes)

    def _route(self) -> GramRoute:
        """Return the faster route on a GPU, from sizes alone, by the rates of `cost`."""
        rate, (n, t) = rates("cuda", self.b.dtype.itemsize), self.ids.shape
        pairs = (n * t) ** 2
        chunks = super().cost()
        if pairs * (2 * self.cols * rate.product + rate.pair / 2) > n * self.rows * self.cols * rate.element:
            return chunks
        step = tile_tokens(n * t, self.dtype)
        return GramRoute("factors", step, 0, 2 * pairs * self.cols, 3 * self.dtype.itemsize * step * n * t)

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


# Pairs of tokens: K_jk = Σ_ts [ids_jt = ids_ks] b_jt · b_ks, in tiles of some tokens against the others.


def tile_tokens(others: int, dtype: torch.dtype) -> int:
    """Return how many tokens make one tile against `others`: two factors of every pair, and a term of a sum."""
    return max(1, chunk_bytes("cuda") // max(1, 3 * dtype.itemsize * others))


def near_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [n, t, k] with the largest element of every sample in [1, 2), exactly, and the powers of two [n].

    Products of tiny numbers leave float32 where none of them does. Those of float64 do not, and are left alone.
    """
    if x.dtype == torch.float64:
        return x, x.new_ones(len(x))
    p = powers(x, (1, 2))
    return x / p, p[:, 0, 0].double()


def token_products(x: Tensor, y: Tensor) -> Tensor:
    """Return x yᵀ [r, c] in float32 for x [r, k] and y [c, k], in float64 where one is."""
    if torch.float64 in (x.dtype, y.dtype):
        return x.double() @ y.double().mT
    return product(x[None], y.mT[None])[0]


def equal_tokens(ids: Tensor, b: Tensor) -> Tensor:
    """Return K [n, n] in float64: tiles meet their own samples and those after them."""
    (n, t, cols), K = b.shape, b.new_zeros((len(b), len(b)), dtype=torch.float64)
    if 0 in (n, t, cols):
        return K
    b, power = near_one(b)
    tokens, ids = b.flatten(0, 1), ids.reshape(-1)
    sums = K.new_zeros((n * t, n))  # of every token with each sample
    step = tile_tokens(n * t, product_dtype(b.dtype))
    for s in range(0, n * t, step):
        part, j = slice(s, s + step), s // t
        pairs = token_products(tokens[part], tokens[j * t :]).mul_(ids[part, None] == ids[j * t :])
        sums[part, j:] = pairs.view(-1, n - j, t).sum(2, dtype=torch.float64)
    K = sums.view(n, t, n).sum(1).triu()
    return (K + K.triu(1).mT) * power * power[:, None]
