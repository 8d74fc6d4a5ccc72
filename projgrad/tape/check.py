"""The self-check: what the rules say is compared with what plain autograd does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..recording.host_reads import HostReads, length

if TYPE_CHECKING:
    from .gradient_access import GradientAccess


class WeightStats(NamedTuple):
    """Of weights w of the samples: the largest |w_j|, their sum, Σ_j |w_j| ‖g_j‖, wᵀ K w and ⟨w, b⟩."""

    top: float
    total: float
    scale: float
    length: float
    product: float


def weight_stats(w: Tensor, Kw: Tensor, rows: Tensor, b: Tensor) -> Tensor:
    """`WeightStats` of w [l, m, n] as [l, 5, m], for K w [l, m, n], ‖g_j‖ as rows [l, n] and b [l, n]."""
    size = w.abs()
    products = [torch.bmm(size, rows[..., None]), torch.bmm(w, b[..., None])]
    scale, product = (p[..., 0] for p in products)
    return torch.stack([size.amax(-1), size.sum(-1), scale, (Kw * w).sum(-1), product], 1)


def weight_stats_of(w: Tensor, K: Tensor) -> Tensor:
    """`WeightStats` of w [n] alone [5], with b = 0."""
    rows = K.diagonal().clamp_min(0).sqrt()
    return weight_stats(w[None, None], (w @ K)[None, None], rows[None], torch.zeros_like(rows)[None]).flatten()


class Measured(NamedTuple):
    numbers: Tensor
    value: Callable[[list[float]], float] = sum


class Outcome(NamedTuple):
    """What adding Gᵀ w to u did, measured: ‖Gᵀ w‖², ⟨u, Gᵀ w⟩ and the growth of ‖u‖²; None where not known.

    Each as numbers on the device and what to make of them on the host.
    """

    length: Measured | None = None
    product: Measured | None = None
    growth: Measured | None = None


class Checks(HostReads):
    """Self-checks of one projection, made together at its end. `worst`: the largest discrepancy, by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.worst: dict[str, float] = defaultdict(float)

    def check(
        self,
        method: GradientAccess,
        found: Outcome,
        weights: WeightStats,
        u2: float,
        name: str = "",
        blame: Callable[[], str] = str,
    ) -> None:
        """The self-check of adding Gᵀ w: K and v come from the rules, the correction from plain autograd."""
        dtype = method.dtype
        for place, measured in enumerate(found):
            if measured is None:
                continue

            limit = tolerance_of(method.compared, measured.numbers.is_cuda)

            def answer(values: list[float], place=place, measured=measured, limit=limit) -> None:
                error = check_relative_error(place, measured.value(values), weights, u2, limit, dtype, blame)
                self.worst[name] = max(self.worst[name], error)

            self.defer(measured.numbers, answer)

    def check_watched(
        self, method: GradientAccess, name: str, K: Tensor, grad: Tensor | None, total: Tensor, coarsest: torch.dtype
    ) -> None:
        """Σ_j g_j of one parameter from plain autograd against its K; `total`: Σ_j ‖g_j‖ over all parameters;
        `coarsest`: in what autograd may have summed over the samples."""
        dtype = method.dtype
        weights = weight_stats_of(torch.ones_like(K[0]), K)
        found = torch.zeros_like(total) if grad is None else length(grad).square()
        limit = tolerance_of(coarser(method.compared, coarsest), K.is_cuda)

        def answer(values: list[float]) -> None:
            *some, square, total = values
            floor = 100 * torch.finfo(dtype).eps * total
            error = check_relative_error(
                0, square, WeightStats(*some), 0.0, limit, dtype, lambda: f", in {name}", floor
            )
            self.worst[""] = max(self.worst[""], error)

        self.defer(torch.cat([weights, torch.stack([found, total])]), answer)


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The one with the fewest digits."""
    return max(dtypes, key=lambda d: torch.finfo(d).eps)


def tolerance_of(dtype: torch.dtype, cuda: bool) -> float:
    """How far two ways to the same number may be apart, if `dtype` is the coarsest that lies on one of them and not on
    the other; on a GPU torch may round float32 to ten bits, cuDNN does unless told."""
    if dtype != torch.float32:
        return 1e-9 if dtype == torch.float64 else 5e-2
    precisions = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return 1e-2 if cuda and not {*precisions} <= {"ieee", "none"} else 1e-3


@contextmanager
def exact_convolutions(cuda: bool) -> Iterator[None]:
    """Float32 convolutions of cuDNN as exact as the rules; while this lasts, the older `allow_tf32` cannot be read."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    if cuda:
        conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if cuda:
            conv.fp32_precision = before


def check_relative_error(
    place: int,
    value: float,
    weights: WeightStats,
    u2: float,
    tolerance: float,
    dtype: torch.dtype,
    blame: Callable[[], str],
    floor: float = 0.0,
) -> float:
    """The relative error of what was found, by its place in `Outcome`.

    A tensor whose gradient is the rounding of much larger terms is noise on both sides: `floor` is the length of that.

    Raises:
        FloatingPointError: what was found is not a number.
        ArithmeticError: rules and autograd disagree.
    """
    scale = max(weights.scale, floor)
    expected = (weights.length, weights.product, weights.length + 2 * weights.product)[place]
    size = (scale**2, scale * u2**0.5, (scale + u2**0.5) ** 2)[place]
    lost = weights.total * 1e3 * torch.finfo(dtype).tiny  # near the smallest numbers digits are missing
    error = abs(value - expected)
    if not math.isfinite(value):
        raise FloatingPointError(f"the projection overflowed{blame()}: gradients are too large, or differ too much")
    if not error <= tolerance * abs(expected) + 0.1 * tolerance * size + floor**2 + lost**2:
        digits = next((d for d in (6, 9, 12) if f"{value:.{d}e}" != f"{expected:.{d}e}"), 16)
        raise ArithmeticError(
            f"per-sample gradients and plain autograd disagree ({value:.{digits}e} against {expected:.{digits}e})"
            f"{blame()}. Please report the model"
        )
    return error / size if size else 0.0


def check_finite(K: Tensor, v: Tensor) -> None:
    if not (K.isfinite().all() and v.isfinite().all()):
        bad = (~K.diagonal().isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"NaN or Inf in the gradients of samples {bad[:8]}; nothing was changed")
