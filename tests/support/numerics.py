"""The float64 truth and what may differ from it."""

import torch

from projgrad import projectors

# Promised for each dtype of the input: the part of a retain gradient left in the result, and the error of the result.
RESIDUAL = {torch.float32: 1e-6, torch.float64: 1e-13}
ERROR = {torch.float32: 1e-5, torch.float64: 1e-12}
CORRELATED = 1e-4  # float32 rows with a common part 30 times the rest: the data is 1000 times worse conditioned


def truth(u, G):
    return projectors.lstsq(u.double(), G.double())


def _matrix(t):
    return t.double() if t.ndim == 2 else t.double()[None]


def cosines(out, G):
    """|cos(g_j, out)| in float64 for out (p,) or (m, p), and its norm."""
    rows, out = G.double(), _matrix(out)
    rows = rows / rows.norm(dim=1, p=torch.inf, keepdim=True).clamp_min(1e-300) if rows.numel() else rows
    lengths = rows.norm(dim=1).clamp_min(1e-300)
    norms = out.norm(dim=1)
    return (out @ rows.mT).abs() / lengths / norms.clamp_min(1e-300)[:, None], norms


def check_projection(name, u, G, out, dtype):
    """`out` is orthogonal to every row of G and close to the truth; half types may be off by their own rounding."""
    expected = truth(u, G)
    half = torch.finfo(dtype).eps if dtype not in RESIDUAL else 0.0
    residual, error = RESIDUAL.get(dtype, 0.0) + half, ERROR.get(dtype, 0.0) + half
    if name == "correlated" and dtype == torch.float32:
        error = CORRELATED
    size = _matrix(u).norm(dim=1)
    found, norms = cosines(out, G)
    inside = norms <= error * size  # nothing is left of u: its noise has no direction
    assert (found[~inside] <= residual).all(), found[~inside].max()
    reference = torch.where(inside, size, _matrix(expected).norm(dim=1))
    difference = (_matrix(out) - _matrix(expected)).norm(dim=1)
    assert (difference <= error * reference).all(), difference / reference
