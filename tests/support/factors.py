"""The factors of one linear layer, their truth, and what may differ from it."""

import torch
from cases import make_factors

F32, F64 = torch.float32, torch.float64


def layer(name="random", dtypes=(F32, F32), device="cpu"):
    """a [n, t, i] and b [n, t, o], with the position dimension also where the case has none."""
    a, b = make_factors(name, dtypes, device)
    return (a, b) if a.ndim == 3 else (a[:, None], b[:, None])


def truth(a, b):
    """The per-sample gradients [n, o, i], one after the other."""
    a, b = a.double(), b.double()
    g = a.new_zeros(a.shape[0], b.shape[2], a.shape[2])
    for j in range(a.shape[0]):
        for t in range(a.shape[1]):
            g[j] += torch.outer(b[j, t], a[j, t])
    return g


def check(out, expected, scale, plain, dtype):
    """At most twice the error of plain PyTorch, and 4 eps: relative to the sum of the absolute terms of an entry."""
    assert out.shape == expected.shape

    def worst(x):
        error = (x.double() - expected).abs() / scale.clamp_min(1e-300)
        return error.max() if error.numel() else 0.0

    assert worst(out) <= 2 * worst(plain) + 4 * torch.finfo(dtype).eps


def check_gram(K, a, b, dtype):
    """Plain PyTorch multiplies samples of length one, as float32 cannot square those of length 1e-20."""
    g = truth(a, b).flatten(1)
    lengths = (a.double().norm(dim=2) * b.double().norm(dim=2)).sum(1)  # Σ_t ‖a_t‖ ‖b_t‖ [n]
    unit = b.double() / lengths.clamp_min(1e-300)[:, None, None]
    rows = (unit.to(dtype).mT @ a.to(dtype)).flatten(1)
    plain = (rows @ rows.mT).double() * lengths[:, None] * lengths
    check(K, g @ g.mT, lengths[:, None] * lengths, plain, dtype)


def products(a, b, wide=False):
    return F64 if wide or F64 in (a.dtype, b.dtype) else F32
