"""Multiplies tiles on tensor cores: half types as they are, float32 as sums of bfloat16 parts.

x = h + m + l with 8 bits in each part is exact, so that hh' + (hm' + mh') + (hl' + lh' + mm') has the error of a
float32 product at six times the work of a bfloat16 one: on tensor cores less than float32 arithmetic takes. Below 1e-34
the last parts leave bfloat16, and digits are lost.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def parts(x):
    """Return three bfloat16 tiles whose sum is the float32 tile x."""
    h = x.to(tl.bfloat16)
    rest = x - h.to(tl.float32)
    m = rest.to(tl.bfloat16)
    return h, m, (rest - m.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(x, y, acc):
    """Return acc + x y in float32 for tiles of one half type."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter would multiply the bits
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc)


@triton.jit
def product(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x y in float32 for x [M, K], y [K, N] of any dtypes up to float32.

    PRECISION, for tiles that are not both of one half type: "parts" (as exact as float32), "tf32x3" or "tf32".
    """
    if x.dtype == y.dtype and x.dtype.primitive_bitwidth == 16:
        acc = dot(x, y, acc)
    elif PRECISION != "parts":
        acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision=PRECISION)
    elif x.dtype == tl.bfloat16:
        h, m, l = parts(y.to(tl.float32))
        acc = dot(x, h, dot(x, m, dot(x, l, acc)))
    elif y.dtype == tl.bfloat16:
        h, m, l = parts(x.to(tl.float32))
        acc = dot(h, y, dot(m, y, dot(l, y, acc)))
    else:
        h, m, l = parts(x.to(tl.float32))
        h2, m2, l2 = parts(y.to(tl.float32))
        acc = dot(m, m2, dot(l, h2, dot(h, l2, acc)))
        acc = dot(h, h2, dot(m, h2, dot(h, m2, acc)))
    return acc


def precision() -> str:
    """Return how float32 tiles are multiplied: as the user told torch to, by either of its settings."""
    try:
        return {"highest": "parts", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    except RuntimeError:  # the newer setting is in use, and the older one cannot be read
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "parts"
