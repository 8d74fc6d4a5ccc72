"""Reference projectors: slow, known, in one place. For comparison, and to reproduce published behaviour.

Each takes u (p,) or (m, p) and G (n, p) and returns like u, in the dtype it is given. `OrthoGrad(projector=...)`
accepts `qr` and `lstsq`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def qr(u: Tensor, G: Tensor) -> Tensor:
    """u - Q Qᵀ u with the thin QR of Gᵀ, as the published OrthoGrad computes it (arXiv 2503.02312).

    QR has no rank test: on duplicated or zero rows Q holds arbitrary directions, and they are removed from u too.
    """
    with torch.autocast(u.device.type, enabled=False):
        Q = torch.linalg.qr(G.mT).Q  # [p, min(n, p)]
        return u - (u @ Q) @ Q.mT


def qr_per_tensor(u: Tensor, G: Tensor, sizes: Sequence[int]) -> Tensor:
    """`qr` for each parameter tensor on its own, as published; `sizes` are their lengths along p.

    A tensor of length ≤ n loses everything: its slice of the result is rounding noise.
    """
    parts = zip(u.split(list(sizes), -1), G.split(list(sizes), -1), strict=True)
    return torch.cat([qr(w, g) for w, g in parts], -1)


def lstsq(u: Tensor, G: Tensor) -> Tensor:
    """u - Gᵀ c with c of minimal norm from a rank-revealing SVD of unit-length rows, in float64: the slow truth.

    Singular values below 4 eps max(n, p) of the largest count as zero.
    """
    if not G.numel():
        return u.clone()
    rows = G.double()
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)  # squares stay in range
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    s, V = torch.linalg.svd(rows, full_matrices=False)[1:]
    V = V[s > 4 * max(G.shape) * torch.finfo(torch.float64).eps * s.max()]
    w = u.double()
    for _ in range(2):
        w = w - (w @ V.mT) @ V
    return w.to(u.dtype)
