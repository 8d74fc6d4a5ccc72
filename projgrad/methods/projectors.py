"""Reference projectors: slow, known, in one place. For comparison, and to reproduce published behaviour.

Each takes u (p,) or (m, p) and G (n, p) and returns like u, in the dtype it is given. `OrthoGrad(projector=...)`
accepts `qr` and `lstsq`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._options import check_integer


def qr(u: Tensor, G: Tensor) -> Tensor:
    """Compute u - Q Qᵀ u with the thin QR of Gᵀ, as the published OrthoGrad does (arXiv 2503.02312).

    QR has no rank test: on duplicated or zero rows Q holds arbitrary directions, and they are removed from u too.
    Raises ValueError for shapes, dtypes or devices that do not match.
    """
    _check("qr", u, G)
    with torch.autocast(u.device.type, enabled=False):
        Q = torch.linalg.qr(G.mT).Q  # [p, min(n, p)]
        return u - (u @ Q) @ Q.mT


def qr_per_tensor(u: Tensor, G: Tensor, sizes: Sequence[int]) -> Tensor:
    """Apply `qr` to each parameter tensor on its own, as published; `sizes` are their lengths along p.

    A tensor of length ≤ n loses everything: its slice of the result is rounding noise.
    Raises as `qr`; ValueError where the sizes do not add up to p, TypeError where one is no integer.
    """
    _check("qr_per_tensor", u, G)
    sizes = [check_integer("qr_per_tensor: every size", size, 0) for size in sizes]
    if sum(sizes) != G.shape[1]:
        raise ValueError(f"qr_per_tensor: sizes must add up to p = {G.shape[1]}; got {sizes}, which are {sum(sizes)}")
    parts = zip(u.split(sizes, -1), G.split(sizes, -1), strict=True)
    return torch.cat([qr(u_part, G_part) for u_part, G_part in parts], -1)


def lstsq(u: Tensor, G: Tensor) -> Tensor:
    """Compute u - Gᵀ c in float64, with c of minimal norm from a rank-revealing SVD of unit-length rows: the truth.

    Slow. Singular values below 4 eps max(n, p) of the largest count as zero.
    Raises ValueError for shapes or devices that do not match.
    """
    _check("lstsq", u, G, ("device",))
    if not G.numel():
        return u.clone()
    tiny = torch.finfo(torch.float64).tiny
    rows = G.double()
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(tiny)  # squares stay in range
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(tiny)
    s, V = torch.linalg.svd(rows, full_matrices=False)[1:]
    V = V[s > 4 * max(G.shape) * torch.finfo(torch.float64).eps * s.max()]  # [rank, p]
    projected = u.double()
    for _ in range(2):
        projected = projected - (projected @ V.mT) @ V
    return projected.to(u.dtype)


def _check(projector: str, u: Tensor, G: Tensor, shared: Sequence[str] = ("dtype", "device")) -> None:
    """Check the shapes, and that the named attributes of u and G agree."""
    if G.ndim != 2 or u.ndim not in (1, 2) or u.shape[-1] != G.shape[1]:
        shapes = f"u {tuple(u.shape)} and G {tuple(G.shape)}"
        raise ValueError(f"{projector}: u must be (p,) or (m, p) and G (n, p); got {shapes}")
    for name in shared:
        if (of_u := getattr(u, name)) != (of_G := getattr(G, name)):
            raise ValueError(f"{projector}: u and G must have one {name}; got {of_u} and {of_G}")
