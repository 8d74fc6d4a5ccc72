"""The cost model: which route to the Gram matrix of a layer is faster, and how large a chunk may be."""

import functools
import math
from typing import Literal, NamedTuple

ALIGN = 16  # columns; one 64-byte line of float32
TOKENS = 128  # rows of a token product: what the CPU kernel of `gram` keeps in L1 and L2


class Rates(NamedTuple):
    """Times in nanoseconds, only whose ratios matter, and a size. A multiplication with an addition is two flops.

    call: one product with what surrounds it.
    product: a flop of the ordinary weight gradient.
    gram: a flop of the lower triangle of an explicit matrix, products added in float64.
    token_gram: the same with hundreds of rows, which no longer fit into the cache beside each other.
    element: an element of a per-sample gradient, written into the chunk and read again.
    pack: an element of a factor, laid out for one block product.
    pair: a pair of tokens, two products multiplied and summed.
    chunk: bytes of one chunk.
    """

    call: float
    product: float
    gram: float
    token_gram: float
    element: float
    pack: float
    pair: float
    chunk: int


# Measured on two Zen 4 cores in float32 (`python -m bench.routes`); a chunk stays in a common L3. Of 352 sizes timed
# twice the route is within 15 % of the faster one in 686 of 704 cases; constants fitted to all these times reach 683.
CPU = Rates(30_000.0, 1 / 190, 1 / 190, 1 / 60, 0.09, 0.25, 2.0, 8 << 20)
# Fitted to times of bfloat16 layers on an H100 (bench/results/layers_h100.csv): a product at 820 TFLOP/s with both
# triangles of the tokens, 7 picoseconds for every pair of tokens, 4 for an element of a chunk in float32 and 1.65 in
# 16 bits, 33 microseconds for what surrounds them. The rule finds the fastest route, or one within 20 %, at every size.
# float32 multiplies at 48 TFLOP/s there. `gram` is a prediction; so are the rates of float64.
HALF = Rates(33_000.0, 1 / 820e3, 1 / 80e3, 1 / 410e3, 0.004, 0.0, 0.014, 128 << 20)
NARROW = HALF._replace(element=0.00165)  # chunks in 16 bits too
FLOAT = HALF._replace(product=1 / 48e3, token_gram=1 / 24e3)
DOUBLE = FLOAT._replace(gram=1 / 30e3, token_gram=1 / 30e3, pair=0.02)


def rates(device: str = "cpu", itemsize: int = 4, narrow: bool = False) -> Rates:
    """Return the rates of a type of device, for factors with elements of `itemsize` bytes; narrow: chunks as well."""
    if device != "cuda":
        return CPU
    return (NARROW if narrow else HALF) if itemsize == 2 else FLOAT if itemsize == 4 else DOUBLE


def chunk_bytes(device: str) -> int:
    """Return the bytes of one chunk on a type of device."""
    return rates(device).chunk


def group_bytes(device: str) -> int:
    """Return the bytes that the stacked factors and the temporaries of a group of layers may take.

    A chunk. On a CPU a megabyte: in layers of more than half of it the calls are not what takes the time.
    """
    return chunk_bytes(device) if device == "cuda" else 1 << 20


class GramRoute(NamedTuple):
    """The way to compute the Gram matrix of a layer.

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


@functools.lru_cache(4096)
def linear_route(
    n: int,
    t: int,
    i: int,
    o: int,
    *,
    m: int = 0,
    itemsize: int = 4,
    budget: int | None = None,
    only: Literal["factors", "chunks"] | None = None,
    device: str = "cpu",
    narrow: bool = False,
) -> GramRoute:
    """Return the faster route to K [n, n] and v [n, m] of a linear layer, with the size of its pieces.

    factors: K = Σ_tt' (a aᵀ) ∘ (b bᵀ), lower triangle of n t tokens, and v by m products of the size of a backward pass
        flops    n t (n t + 1) (i + o) + 2 m n t i o
        time     token_gram or gram per flop of the first, product of the second, pair per pair of tokens, call per tile
    chunks: blocks of rows x columns of all per-sample gradients, in one buffer, then their Gram matrix
        flops    2 n t i o + n (n + 1) i o + 2 n m i o
        time     product per flop of the first, gram of the others, and per block of W
                 element n rows columns + pack n t (rows + columns) + call

    A token product on the CPU is `gram` on n t rows: at its best while they fit in the first-level cache together
    (`TOKENS`). On a GPU the products of a tile of samples with those after them are held whole, and v costs a pair for
    every entry of a uᵀ. Factors win for t = 1 and few tokens, chunks for long sequences; the rule known from clipping,
    2 t² ≤ i o, is for n norms and forgets that here n² pairs are needed.

    Args:
        n, t, i, o: samples, positions, inputs, outputs of the layer. m: directions of v.
        itemsize: bytes of a factor's element; 2 are multiplied as 4 on the CPU.
        budget: bytes of one chunk, or of one tile of the token product (which holds at least one sample against all
            others: where that exceeds the budget only chunks are considered). Default: that of the device.
        only: take this route, whatever it costs.
        device: "cpu" or "cuda".
        narrow: chunks have 16 bits.

    Returns:
        A `GramRoute`.

    Example:
        >>> from projgrad.ops.cost import linear_route
        >>> linear_route(64, 1, 784, 1024).name, linear_route(16, 128, 512, 2048).name
        ('factors', 'chunks')
    """
    on_cpu, rate = device != "cuda", rates(device, itemsize, narrow)
    multiplied = 2 if narrow else max(4, itemsize)  # bytes of a number in a chunk
    slower = max(4, itemsize) / 4 if on_cpu else 1.0
    budget = rate.chunk if budget is None else budget
    # Chunks: square blocks need the fewest passes over the factors.
    elements = max(1, budget // (multiplied * max(1, n)))
    columns = _even(i, elements // max(1, min(o, math.isqrt(elements))))
    rows = _even(o, elements // columns)
    blocks = -(-o // rows) * -(-i // columns)
    product, grams = 2 * n * t * i * o, n * (n + 1 + 2 * m) * i * o
    packed = n * t * (i * -(-o // rows) + o * -(-i // columns))
    work = rate.product * product + rate.gram * grams + rate.element * n * i * o + rate.pack * packed
    chunks_time = slower * work + rate.call * blocks
    chunks = GramRoute("chunks", rows, columns, product + grams, multiplied * n * rows * columns)
    # Factors.
    tokens, pair_bytes = n * t, 2 * (8 if on_cpu else max(4, itemsize))
    pairs = tokens * (tokens + 1)
    fit = budget // max(1, pair_bytes * t * tokens)
    samples = max(1, min(n, fit, TOKENS // max(1, t) if on_cpu else n))
    tiles, tile_bytes = -(-n // samples), pair_bytes * samples * t * tokens
    summed = pairs / 2 + (0 if on_cpu else m * tokens * min(i, o) / 2)  # what is multiplied once more, and added up
    each = rate.gram if on_cpu and tokens <= TOKENS else rate.token_gram
    work = each * pairs * (i + o) + m * rate.product * product
    factors_time = slower * work + rate.pair * summed + rate.call * (tiles + m)
    factors = GramRoute("factors", samples, 0, pairs * (i + o) + m * product, tile_bytes)
    if only is not None:
        return factors if only == "factors" else chunks
    return factors if factors_time <= chunks_time and tile_bytes <= budget else chunks


@functools.lru_cache(4096)
def layers_at_once(n: int, t: int, i: int, o: int, itemsize: int = 4, device: str = "cpu") -> int:
    """Return how many layers of these sizes may be stacked, within `group_bytes`: at least 1."""
    if device != "cuda":  # all in float64
        one = 8 * (n * t * (i + o) + o * i + (n * t * min(i, o) if t == 1 else n * o * i))
    else:
        one = itemsize * (n * t * (i + o) + 2 * o * i) + 4 * max(o * i, n * t * min(i, o))
        one += linear_route(n, t, i, o, m=1, itemsize=itemsize, device=device).bytes
    return max(1, group_bytes(device) // max(1, one))


def _even(size: int, limit: int) -> int:
    """Return the length of equal pieces of `size`: at most `limit`, and whole cache lines where they fit."""
    limit = max(1, limit - limit % ALIGN if limit >= ALIGN else limit)
    if size <= limit:
        return max(1, size)
    piece = -(-size // -(-size // limit))
    return min(limit, -(-piece // ALIGN) * ALIGN)
