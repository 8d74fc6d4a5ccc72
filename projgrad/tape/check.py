"""The self-check: what the rules say is compared with what plain autograd does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.numerics import finfo
from ..recording.host_reads import HostReads, Script


class WeightStats(NamedTuple):
    """Numbers of weights w of the samples, as the rules have them.

    max_abs: max_j |w_j|. sum_abs: Σ_j |w_j|. weighted_norms: Σ_j |w_j| ‖g_j‖. squared_norm: ‖Gᵀ w‖² = wᵀ K w.
    product: ⟨u, Gᵀ w⟩ = ⟨w, v⟩.
    """

    max_abs: float
    sum_abs: float
    weighted_norms: float
    squared_norm: float
    product: float


def weight_stats(w: Tensor, Kw: Tensor, norms: Tensor, v: Tensor) -> Tensor:
    """Compute `WeightStats` of w [l, m, n] as [l, 5, m], for K w [l, m, n], ‖g_j‖ [l, n] and v [l, n]."""
    size = w.abs()
    weighted_norms, product = (torch.bmm(a, b[..., None])[..., 0] for a, b in ((size, norms), (w, v)))
    return torch.stack([size.amax(-1), size.sum(-1), weighted_norms, (Kw * w).sum(-1), product], 1)


def weight_stats_of(w: Tensor, K: Tensor) -> Tensor:
    """Compute `WeightStats` of w [n] alone [5], with v = 0."""
    norms = K.diagonal().clamp_min(0).sqrt()
    return weight_stats(w[None, None], (w @ K)[None, None], norms[None], torch.zeros_like(norms)[None]).flatten()


class Measured(NamedTuple):
    """A number that the host makes of some on the device."""

    numbers: Tensor
    value: Callable[[list[float]], float] = sum


class Outcome(NamedTuple):
    """Measured effect of u += Gᵀ w: ‖Gᵀ w‖², ⟨u, Gᵀ w⟩, and ‖u‖² afterwards; None where it was not measured."""

    squared_norm: Measured | None = None
    product: Measured | None = None
    square: Measured | None = None


class Precision(NamedTuple):
    """Types that limit what a check may ask for.

    products: in which inner products are computed. compared: the coarsest in which the two sides may differ.
    """

    products: torch.dtype
    compared: torch.dtype


class Checks(HostReads):
    """Self-checks of one projection, made together at its end. `worst`: the largest discrepancy, by parameter."""

    replayed = False  # a replay checks anew, against what it predicts itself

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(script)
        self.worst: dict[str, float] = defaultdict(float)
        self._tolerances: dict[tuple[torch.dtype, bool], float] = {}

    def _tolerance(self, dtype: torch.dtype, cuda: bool) -> float:
        """Return `tolerance_of`, asked for once."""
        key = dtype, cuda
        if key not in self._tolerances:
            self._tolerances[key] = tolerance_of(dtype, cuda)
        return self._tolerances[key]

    def check(
        self,
        outcome: Outcome,
        weights: WeightStats,
        u2: float,
        before: float,
        precision: Precision,
        name: str = "",
        blame: Callable[[], str] = str,
    ) -> None:
        """Check the measured outcome of u += Gᵀ w against what the rules predict.

        weights: of w. u2: ‖u‖² at the beginning, before: just before. name: of the parameter, "" for all. blame: what
        to add to a refusal's message.
        """
        for quantity, measured in zip(Outcome._fields, outcome, strict=True):
            if measured is None:
                continue
            limit = self._tolerance(precision.compared, measured.numbers.is_cuda)

            def compare(values: list[float], quantity=quantity, measured=measured, limit=limit) -> None:
                value = measured.value(values) - (before if quantity == "square" else 0.0)
                error = check_relative_error(quantity, value, weights, u2, limit, precision.products, blame)
                self.worst[name] = max(self.worst[name], error)

            self.defer(measured.numbers, compare)

    def check_parameter(self, name: str, numbers: Tensor, precision: Precision) -> None:
        """Check Σ_j w_j g_j of one parameter, from plain autograd, against its K; see `of_parameter`."""
        limit = self._tolerance(precision.compared, numbers.is_cuda)

        def compare(values: list[float]) -> None:
            *stats, squared_norm, total = values
            floor = 100 * finfo(precision.products).eps * total
            blame = lambda: f", in {name}"  # noqa: E731
            error = check_relative_error(
                "squared_norm", squared_norm, WeightStats(*stats), 0.0, limit, precision.products, blame, floor
            )
            self.worst[""] = max(self.worst[""], error)

        self.defer(numbers, compare)


def of_parameter(w: Tensor, K: Tensor, squared_norm: Tensor, total: Tensor) -> Tensor:
    """Return the numbers for `Checks.check_parameter`.

    K: of this parameter alone. squared_norm: of Σ_j w_j g_j. total: Σ_j |w_j| ‖g_j‖ over all parameters.
    """
    return torch.cat([weight_stats_of(w, K), torch.stack([squared_norm, total])])


def tolerance_of(dtype: torch.dtype, cuda: bool) -> float:
    """Return how far two ways to the same number may be apart, relative.

    dtype: the coarsest type that lies on one of them and not on the other. On a GPU torch may round float32 to ten
    bits; cuDNN does unless told.
    """
    if dtype != torch.float32:
        return 1e-9 if dtype == torch.float64 else 5e-2
    precisions = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return 1e-2 if cuda and not {*precisions} <= {"ieee", "none"} else 1e-3


@contextmanager
def exact_convolutions(cuda: bool) -> Iterator[None]:
    """Make float32 convolutions of cuDNN as exact as the rules; meanwhile the older `allow_tf32` cannot be read."""
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
    quantity: str,
    value: float,
    weights: WeightStats,
    u2: float,
    tolerance: float,
    dtype: torch.dtype,
    blame: Callable[[], str],
    floor: float = 0.0,
) -> float:
    """Return the relative error of a measured quantity, a field of `Outcome`.

    floor: norm of the rounding to expect where a gradient is the small difference of much larger terms: it is noise on
    both sides.

    Raises:
        FloatingPointError: the value is not a number.
        ArithmeticError: rules and autograd disagree.
    """
    scale, u = max(weights.weighted_norms, floor), u2**0.5
    expected, size = {
        "squared_norm": (weights.squared_norm, scale**2),
        "product": (weights.product, scale * u),
        "square": (weights.squared_norm + 2 * weights.product, (scale + u) ** 2),  # by how much it grew
    }[quantity]
    lost = weights.sum_abs * 1e3 * finfo(dtype).tiny  # near the smallest numbers digits are missing
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
    """Refuse NaN or Inf in the products of all samples; name those that have it."""
    if not (K.isfinite().all() and v.isfinite().all()):
        bad = (~K.diagonal().isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"NaN or Inf in the gradients of samples {bad[:8]}; nothing was changed")
