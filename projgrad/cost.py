"""What the routes to the Gram matrix of a layer cost, and how large a chunk may be."""

import math
from typing import Literal, NamedTuple

CHUNK_BYTES = 8 << 20  # one chunk of per-sample gradients: stays in a common L3
ALIGN = 16  # columns; one 64-byte line of float32
TOKENS = 128  # rows of a token product: what the kernel of `gram` keeps in L1 and L2

# Nanoseconds, float32, two Zen 4 cores; only their ratios matter.
CALL = 30_000.0  # one product with what surrounds it
PRODUCT = 1 / 190  # a multiplication and an addition count as two: the ordinary weight gradient
GRAM = 1 / 190  # in `gram`: lower triangle, products added in float64
TOKEN_GRAM = 1 / 60  # in `gram` with hundreds of rows, which no longer fit beside each other
ELEMENT = 0.09  # a per-sample gradient written into the chunk and read again
PACK = 0.25  # an element of a factor laid out for one block product
PAIR = 2.0  # a pair of tokens: two float64 products multiplied, and summed


class Route(NamedTuple):
    """How to compute the Gram matrix of a layer.

    name: "factors" (token products) or "chunks" (blocks of per-sample gradients).
    rows, columns: the block of W [o, i] that one chunk covers; for factors, samples in one tile of the token product,
        and 0.
    flops: of the whole layer, a multiplication and an addition counting as two.
    bytes: workspace at one time, besides K and v.
    """

    name: Literal["factors", "chunks"]
    rows: int
    columns: int
    flops: int
    bytes: int


def linear_route(
    n: int,
    t: int,
    i: int,
    o: int,
    *,
    m: int = 0,
    itemsize: int = 4,
    budget: int = CHUNK_BYTES,
    only: Literal["factors", "chunks"] | None = None,
) -> Route:
    """The faster route to K [n, n] and v [n, m] of a linear layer, and the size of its pieces.

    factors: K = Σ_tt' (a aᵀ) ∘ (b bᵀ), lower triangle of n t tokens, and v by m products of the size of a backward pass
        flops    n t (n t + 1) (i + o) + 2 m n t i o
        time     TOKEN_GRAM or GRAM per flop of the first, PRODUCT of the second, PAIR per pair of tokens, CALL per tile
    chunks: blocks of rows x columns of all per-sample gradients, in one buffer, then their Gram matrix
        flops    2 n t i o + n (n + 1) i o + 2 n m i o
        time     PRODUCT per flop of the first, GRAM of the others, and per block of W
                 ELEMENT n rows columns + PACK n t (rows + columns) + CALL

    A token product is `gram` on n t rows: at its best while they fit in the first-level cache together (`TOKENS`).
    Factors win for t = 1 and few tokens, chunks for long sequences; the rule known from clipping, 2 t² ≤ i o, is for n
    norms and forgets that here n² pairs are needed. The constants are measured (`python -m bench.cost`).

    Args:
        n, t, i, o: samples, positions, inputs, outputs of the layer. m: directions of v.
        itemsize: bytes of a multiplied number, 4 or 8.
        budget: bytes of one chunk, or of one tile of the token product (which holds at least one sample against all
            others: where that exceeds the budget only chunks are considered).
        only: take this route, whatever it costs.

    Returns:
        A `Route`.

    Example:
        >>> from projgrad.cost import linear_route
        >>> linear_route(64, 1, 784, 1024).name, linear_route(16, 128, 512, 2048).name
        ('factors', 'chunks')
    """
    # Chunks: square blocks need the fewest passes over the factors.
    elements = max(1, budget // (itemsize * max(1, n)))
    columns = _even(i, elements // max(1, min(o, math.isqrt(elements))))
    rows = _even(o, elements // columns)
    blocks = -(-o // rows) * -(-i // columns)
    product, grams = 2 * n * t * i * o, n * (n + 1 + 2 * m) * i * o
    packed = n * t * (i * -(-o // rows) + o * -(-i // columns))
    slower = itemsize / 4
    chunks_time = slower * (PRODUCT * product + GRAM * grams + ELEMENT * n * i * o + PACK * packed) + CALL * blocks
    chunks = Route("chunks", rows, columns, product + grams, itemsize * n * rows * columns)
    # Factors.
    tokens, pair_bytes = n * t, 2 * 8
    samples = max(1, min(n, TOKENS // max(1, t), budget // max(1, pair_bytes * t * tokens)))
    tiles, tile_bytes = -(-n // samples), pair_bytes * samples * t * tokens
    pairs = tokens * (tokens + 1)
    rate = GRAM if tokens <= TOKENS else TOKEN_GRAM
    factors_time = slower * (rate * pairs * (i + o) + m * PRODUCT * product) + PAIR * pairs / 2 + CALL * (tiles + m)
    factors = Route("factors", samples, 0, pairs * (i + o) + m * product, tile_bytes)
    if only is not None:
        return factors if only == "factors" else chunks
    return factors if factors_time <= chunks_time and tile_bytes <= budget else chunks


def _even(size: int, limit: int) -> int:
    """The length of equal pieces of `size`, at most `limit` and whole cache lines where they fit."""
    limit = max(1, limit - limit % ALIGN if limit >= ALIGN else limit)
    if size <= limit:
        return max(1, size)
    piece = -(-size // -(-size // limit))
    return min(limit, -(-piece // ALIGN) * ALIGN)
