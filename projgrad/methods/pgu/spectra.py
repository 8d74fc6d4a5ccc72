"""Eigendecompositions of second moments, how many directions of each are kept, and the projection off them."""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._options import within
from ...ops.basis_project import basis_project
from ...recording.host_reads import to_host
from .input_moments import View

BATCH_BYTES = 256 << 20  # of matrices that are decomposed together: many small ones in one call, large ones alone
BATCH_SIZE = 1 << 14  # matrices in one call: cuSOLVER refuses twice as many
RULES = ("singular", "energy")


class Spectrum(NamedTuple):
    """C = U diag(λ) Uᵀ: U (g, i, i), λ (g, i) descending and not negative, both float64."""

    vectors: Tensor
    values: Tensor


class Basis(NamedTuple):
    """The kept directions of one weight.

    M: (g, i, k), with zero columns where a group keeps fewer. ranks: k of every group.
    soft: the weight (g, k) of every column in a soft projection, or None.
    """

    M: Tensor
    ranks: list[int]
    soft: Tensor | None

    @property
    def rank(self) -> int:
        """Kept directions of all groups."""
        return sum(self.ranks)

    @property
    def applied(self) -> Tensor:
        """M with columns scaled so that `M Mᵀ` takes the soft weights in."""
        return self.M if self.soft is None else self.M * self.soft.sqrt()[:, None]


def decompose(moments: Mapping[str, Tensor]) -> tuple[dict[str, Spectrum], dict[str, float]]:
    """Decompose second moments (g, i, i), which are overwritten.

    Returns the spectra, with negative eigenvalues clamped at 0; and the lowest eigenvalue of each before that.
    """
    by_width: dict[tuple[torch.device, int], list[tuple[str, int]]] = {}
    for name, C in moments.items():
        by_width.setdefault((C.device, C.shape[2]), []).extend((name, g) for g in range(len(C)))
    values = {name: C.new_empty(C.shape[:2]) for name, C in moments.items()}
    for (_, i), matrices in by_width.items():
        count = max(1, min(BATCH_SIZE, BATCH_BYTES // (8 * i * i)))
        for start in range(0, len(matrices), count):
            batch = matrices[start : start + count]
            eigenvalues, vectors = torch.linalg.eigh(torch.stack([moments[name][g] for name, g in batch]))
            for (name, g), value, vector in zip(batch, eigenvalues, vectors, strict=True):
                values[name][g] = value.flip(0)  # descending
                moments[name][g] = vector.flip(1)
    lowest = {name: float(v.min()) for name, v in values.items()}
    return {name: Spectrum(moments[name], v.clamp_min_(0)) for name, v in values.items()}, lowest


def check_gamma(gamma: float | Mapping[str, float], weights: Collection[str]) -> dict[str, float]:
    """Return γ by name, with "default" for the weights that it does not name.

    Raises TypeError for what is no number; ValueError outside (0, 1], for an unknown name, or a weight without one.
    """
    given = gamma if isinstance(gamma, Mapping) else {"default": gamma}
    unknown = [name for name in given if name != "default" and name not in weights]
    if unknown:
        raise ValueError(f"PGU: gamma names {unknown[0]}, which is no weight that the optimizer holds")
    missing = [name for name in weights if name not in given and "default" not in given]
    if missing:
        raise ValueError(f'PGU: gamma must have "default" or name every weight; it lacks {", ".join(missing)}')
    return {name: within(f"PGU: gamma for {name}, a share of the spectrum,", v, "(0, 1]") for name, v in given.items()}


def rank(values: Tensor, gamma: float, rule: str = "singular") -> Tensor:
    """Return how many of the eigenvalues λ (..., i), descending, are kept, as (...,).

    k = #{ j : cumsum(s)_j / sum(s) ≤ γ },  s = √λ with rule="singular", as published, λ with rule="energy"

    A spectrum of zeros keeps none, and neither does one whose first direction alone holds more than γ.
    """
    s = values.sqrt() if rule == "singular" else values
    total = s.sum(-1, keepdim=True)
    return ((s.cumsum(-1) <= gamma * total) & (total > 0)).sum(-1)


def basis(spectrum: Spectrum, gamma: float, rule: str, soft: float, dtype: torch.dtype) -> Basis:
    """Choose the leading directions, in the dtype that the gradient is multiplied in.

    Raises ArithmeticError where their columns are not orthonormal.
    """
    U, values = spectrum
    ranks = rank(values, gamma, rule)
    k = int(ranks.max()) if len(ranks) else 0
    kept = torch.arange(k, device=U.device) < ranks[:, None]  # [g, k]
    M = (U[:, :, :k] * kept[:, None]).to(dtype)
    error = (M.mT.double() @ M.double() - torch.diag_embed(kept.double())).abs()
    bound = 4 * torch.finfo(dtype).eps + U.shape[1] * torch.finfo(torch.float64).eps
    if error.numel() and not error.max() <= bound:
        raise ArithmeticError(f"kept directions are orthonormal only to {float(error.max()):.1e}, not to {bound:.1e}")
    weights = None
    if soft:
        mean = values.mean(1, keepdim=True)
        shares = values[:, :k] / (values[:, :k] + soft * mean)  # 0 / 0 in a group of zeros, which keeps none
        weights = torch.where(kept, shares, 0.0).to(dtype)
    return Basis(M, ranks.tolist(), weights)


def exposed(spectrum: Spectrum, kept: Basis) -> float:
    """Return the share of Σ ‖x‖² = trace C that updates act on: Σ λ outside the kept directions; 0 without inputs."""
    values = spectrum.values.clone()
    total = float(values.sum())
    for g, k in enumerate(kept.ranks):
        values[g, :k] *= 0.0 if kept.soft is None else (1 - kept.soft[g, :k].double()).square()
    return float(values.sum()) / total if total else 0.0


class Projected(NamedTuple):
    """What a projection of gradients did; the fields are those of `PGURecord`."""

    preserved_norm: float
    residual: float
    gradient_norm: float


@torch.no_grad()
def project_(params: Mapping[str, nn.Parameter], bases: Mapping[str, Basis], views: Mapping[str, View]) -> Projected:
    """Replace every `p.grad` by D - D M Mᵀ; all of them have a gradient.

    Raises FloatingPointError for NaN or Inf in a gradient; nothing was changed.
    """
    before = to_host(*(_norm(p.grad) for p in params.values()))
    for name, norm in zip(params, before, strict=True):
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient of {name} holds NaN or Inf; nothing was changed")
    after, inside = [], []  # ‖D‖ of the projected gradient, and ‖D M‖
    for name, p in params.items():
        view, kept = views[name], bases[name]
        with torch.autocast(p.device.type, enabled=False):
            D = basis_project(view.matrix(p.grad), kept.applied)
            along = D.to(kept.M.dtype) @ kept.M
        p.grad.copy_(view.weight(D, p.shape))
        after.append(_norm(D))
        inside.append(_norm(along))
    after, inside = to_host(*after), to_host(*inside)
    noise = [16 * torch.finfo(p.grad.dtype).eps * norm for p, norm in zip(params.values(), before, strict=True)]
    residuals = [b / a for a, b, small in zip(after, inside, noise, strict=True) if a > small]  # else nothing is left
    total, rest = math.hypot(*before), math.hypot(*after)
    return Projected(rest / total if total else 1.0, max(residuals, default=0.0), rest)


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dtype=torch.float64)
