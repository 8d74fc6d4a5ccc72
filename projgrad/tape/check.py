"""The self-check: what the rules say is compared with what plain autograd does."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .routes import Route


class Outcome(NamedTuple):
    """What adding Gᵀ w to u did, measured: ‖Gᵀ w‖², ⟨u, Gᵀ w⟩ and the growth of ‖u‖²; None where not known."""

    length: float | None = None
    product: float | None = None
    growth: float | None = None


def check(
    method: Route,
    found: Outcome,
    w: Tensor,
    K: Tensor,
    v: Tensor,
    u2: float,
    where: str | None = None,
    floor: float = 0.0,
) -> float:
    """The self-check: K and v come from the rules, the correction from plain autograd.

    A tensor whose gradient is the rounding of much larger terms is noise on both sides: `floor` is the length of that.

    Raises:
        ArithmeticError: they disagree.
    """
    tolerance = 5e-2 if method.half else 1e-3 if method.dtype != torch.float64 else 1e-9
    scale = max(float(w.abs() @ K.diagonal().clamp_min(0).sqrt()), floor)
    length, product = float(w @ K @ w), float(w @ v)
    predicted = Outcome(length, product, length + 2 * product)
    sizes = Outcome(scale**2, scale * u2**0.5, (scale + u2**0.5) ** 2)
    lost = float(w.abs().sum()) * 1e3 * torch.finfo(method.dtype).tiny  # near the smallest numbers digits are missing
    worst = 0.0
    for value, expected, size in zip(found, predicted, sizes, strict=True):
        if value is None:
            continue
        error = abs(value - expected)
        worst = max(worst, error / size if size else 0.0)
        if not error <= tolerance * abs(expected) + 0.1 * tolerance * size + (floor if where else 0.0) ** 2 + lost**2:
            raise ArithmeticError(
                f"per-sample gradients and plain autograd disagree ({value:.6e} against {expected:.6e})"
                f"{method.blame(w) if where is None else where}. Please report the model"
            )
    return worst


def check_watched(method: Route, name: str, K: Tensor | float, grad: Tensor | None, lengths: float) -> float:
    """`lengths`: Σ_j ‖g_j‖ over all parameters."""
    if not name:
        return 0.0
    n, floor = method.n, 100 * torch.finfo(method.dtype).eps * lengths
    K = K if isinstance(K, Tensor) else torch.zeros(n, n, dtype=torch.float64)
    outcome = Outcome(length=0.0 if grad is None else squared(grad))
    ones = torch.ones(n, dtype=torch.float64, device=K.device)
    return check(method, outcome, ones, K, torch.zeros_like(ones), 0.0, f", in {name}", floor)


def check_finite(K: Tensor, v: Tensor, u2: float) -> None:
    if not torch.isfinite(torch.tensor(u2)):
        raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")
    if not (K.isfinite().all() and v.isfinite().all()):
        bad = (~K.diagonal().isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"NaN or Inf in the gradients of samples {bad[:8]}; nothing was changed")


def squared(t: Tensor) -> float:
    """‖t‖² in float64."""
    norm = float(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)))
    if not 1e-15 < norm < 1e15:  # squares may have left the range of float32
        norm = float(torch.linalg.vector_norm(t, dtype=torch.float64))
    return norm**2


def inner(a: Tensor, b: Tensor) -> float:
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.flatten().to(dtype), b.flatten().to(dtype)
    product = float(torch.dot(a, b))
    return product if 1e-30 < abs(product) < 1e30 else float(torch.dot(a.double(), b.double()))
