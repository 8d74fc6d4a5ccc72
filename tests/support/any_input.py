"""Inputs of any shape, layout, type and value: hypothesis draws a few words, a generator of torch makes the numbers.

PROJGRAD_EXAMPLES=100 tries a hundred times as many, others in every run.
"""

import os

import numpy as np
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
MORE = float(os.environ.get("PROJGRAD_EXAMPLES", 1))
SMALL = (1, 2, 3, 4, 5, 6, 7, 8, 9, 0)  # simplest first, which is where hypothesis shrinks to
MANY = (*SMALL, 16, 17, 33, 66)
COLUMNS = (
    1,
    2,
    3,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    127,
    129,
    0,
    511,
    513,
    1023,
    1025,
    2047,
    2049,
    4097,
    8200,
)
# By type: factors of a row, and single elements; with their squares outside of the type, denormal, at its end.
SCALES = {
    F32: (1.0, 1e-30, 1e30, 1e-20, 1e15, 1e-10, 1e-41),
    F64: (1.0, 1e-30, 1e30, 1e-20, 1e15, 1e-140, 1e140),
    BF16: (1.0, 1e-30, 1e30, 1e-20, 1e15, 1e-10),
    F16: (1.0, 1e-3, 1e3, 1e-5),
}
ELEMENTS = {
    F32: (0.0, 1.0, -1e-30, 1e30, 1e-45, 3e38, -0.0),
    F64: (0.0, 1.0, -1e-30, 1e30, 1e-140, 1e140, -0.0),
    BF16: (0.0, 1.0, -1e-30, 1e30, 3e38, -0.0),
    F16: (0.0, 1.0, 6e-8, -65504.0, -0.0),
}
SMALLEST = np.longdouble("1e-4000")
LAYOUTS = ("contiguous", "transposed", "every_other", "offset", "rows_alike", "columns_alike", "windows", "negated")


def examples(count):
    """The settings of a test: the same examples in every run, unless more are wanted."""
    phases = Phase.generate, Phase.shrink
    return settings(
        max_examples=max(1, int(count * MORE)), derandomize=MORE <= 1, database=None, deadline=None, phases=phases
    )


def seeds():
    return st.integers(0, 2**32 - 1)


def lay_out(t, layout):
    """The numbers of a tensor in other strides; the numbers of one row, column or sequence where all are alike."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "every_other":
        whole = t.new_full([2 * s for s in t.shape], torch.nan)
        whole[tuple(slice(1, None, 2) for _ in t.shape)] = t
        return whole[tuple(slice(1, None, 2) for _ in t.shape)]
    if layout == "offset":  # not where vectors begin
        return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)
    if not t.numel():
        return t
    if layout == "rows_alike":
        return t[:1].expand_as(t)
    if layout == "columns_alike":
        return t[..., :1].expand_as(t)
    if layout == "windows" and t.ndim == 2:
        return torch.cat([t[0], t[:, -1]]).as_strided(t.shape, (1, 1))
    if layout == "negated" and t.dtype in (F32, F64):  # the sign is a bit of the tensor, not of its numbers
        return torch.complex(torch.zeros_like(t), -t).conj().imag
    return t.contiguous()


def rounded(t, dtype):
    """The nearest numbers of a type, without infinities."""
    top = torch.finfo(dtype).max
    return t.clamp(-top, top).to(dtype)


@st.composite
def rows(draw, n, p, dtype, generator):
    """n rows [n, p] of some kinds: random, zero, a single element, one number, whole numbers, a multiple of another."""
    kinds = st.sampled_from(("random", "random", "integers", "copy", "zero", "unit", "constant", "elements"))
    X = torch.zeros(n, p, dtype=dtype)
    for j in range(n):
        kind = draw(kinds) if j < 9 else "random"
        scale = draw(st.sampled_from(SCALES[dtype])) if j < 9 else 1.0
        x = torch.randn(p, dtype=F64, generator=generator)
        if kind == "copy" and j:
            k = draw(st.integers(0, j - 1))
            factor = 2.0 ** draw(st.integers(-3, 3)) * draw(st.sampled_from((1, -1)))
            scaled = X[k].double() * factor
            X[j] = scaled if torch.equal(scaled.to(dtype).double(), scaled) else -X[k]  # no rounding
            continue
        if kind == "zero":
            continue
        if kind == "integers":
            x = torch.randint(-3, 4, (p,), generator=generator).double()
        elif kind == "unit" and p:
            x = torch.zeros(p, dtype=F64).index_fill_(0, torch.tensor(draw(st.integers(0, p - 1))), 1.0)
        elif kind == "constant":
            x = torch.ones(p, dtype=F64) * (1 + draw(st.integers(0, 7)) / 7)
        elif kind == "elements" and p:
            some = torch.tensor([draw(st.sampled_from(ELEMENTS[dtype])) for _ in range(4)], dtype=F64)
            x, scale = some[torch.randint(4, (p,), generator=generator)], 1.0
        X[j] = rounded(scale * x, dtype)
    return X


@st.composite
def flat(draw, dtypes=DTYPES, most=1 << 16):
    """u (m, p) and G (n, p)."""
    dtype, n, m = draw(st.sampled_from(dtypes)), draw(st.sampled_from(MANY)), draw(st.sampled_from((1, 2, 3, 9, 0)))
    p = draw(st.sampled_from([c for c in COLUMNS if c * (n + m) <= most]))
    generator = torch.Generator().manual_seed(draw(seeds()))
    G = lay_out(draw(rows(n, p, dtype, generator)), draw(st.sampled_from(LAYOUTS)))
    if n and m and draw(st.booleans()):  # in the span, up to rounding
        u = rounded(torch.randint(-2, 3, (m, n), generator=generator).double() @ (G.double() / n), dtype)
    else:
        u = draw(rows(m, p, dtype, generator))
    return lay_out(u, draw(st.sampled_from(LAYOUTS))), G


@st.composite
def factors(draw, dtypes=DTYPES, samples=None, widths=None):
    """a (n, t, i) and b (n, t, o), each with rows of some length; g and its square are within float32."""
    n, t = samples or draw(st.sampled_from(MANY)), draw(st.sampled_from((1, 2, 3, 5, 17, 40, 0)))
    i, o = widths or (draw(st.sampled_from((1, 2, 3, 8, 17, 33, 64, 0))) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(seeds()))
    out = []
    for width, dtype in zip((i, o), (draw(st.sampled_from(dtypes)) for _ in range(2)), strict=True):
        x = torch.randn(n, t, width, dtype=F64, generator=generator)
        largest = 2.0 if dtype == F16 else 8.0
        x *= 10.0 ** (largest * (2 * torch.rand(n, 1, 1, dtype=F64, generator=generator) - 1)).round()
        x[torch.rand(n, t, generator=generator) < draw(st.sampled_from((0.0, 0.3)))] = 0  # padding
        if n > 1 and draw(st.booleans()):
            x[-1] = x[0]
        out.append(lay_out(rounded(x, dtype), draw(st.sampled_from(LAYOUTS))))
    return tuple(out)


def exact(t):
    """A tensor as a numpy array of 80 bits."""
    return t.detach().resolve_neg().contiguous().double().numpy().astype(np.longdouble)


def span(G):
    """An orthonormal basis of the rows of G (r, p), the least sine of a row that was taken to those before it, and the
    largest of one that was not; in 80 bits."""
    X = exact(G)
    X = X / np.maximum(np.abs(X).max(axis=1, initial=0, keepdims=True), SMALLEST)
    X = X / np.maximum(np.sqrt((X * X).sum(1, keepdims=True)), SMALLEST)
    left, basis, least = X.copy(), [], 1.0
    while len(basis) < min(X.shape):
        norms = np.sqrt((left * left).sum(1))
        k = int(norms.argmax())
        if norms[k] < 1e-12:
            break
        least = min(least, float(norms[k]))
        q = left[k] / norms[k]
        for other in basis:
            q = q - (other @ q) * other
        q = q / np.sqrt((q * q).sum())
        basis.append(q)
        left = left - np.outer(left @ q, q)
        left = left - np.outer(left @ q, q)
    most = float(np.sqrt((left * left).sum(1)).max(initial=0))
    return np.array(basis).reshape(len(basis), X.shape[1]), least, most
