"""The rules of a graph, compared with plain autograd once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recording.host_reads import HostReads, to_host
from .check import WeightStats, check_finite, check_relative_error, exact_convolutions, tolerance_of, weight_stats_of
from .consumers import PerParameter
from .gradient_access import TwoPasses
from .passes import Passes


def verify(passes: Passes, losses: Tensor) -> None:
    """Compare the rules with plain autograd, unless that was done for the same graph.

    Raises:
        ArithmeticError: they disagree.
        FloatingPointError: NaN or Inf in a gradient.
    """
    compared = passes.structure(losses).compared
    if not compared.rules:
        _compare(passes, losses)
        compared.rules = True


def _compare(passes: Passes, losses: Tensor) -> None:
    """Compare ‖Gᵀ w‖² of every parameter, from two backward passes of which one makes weight gradients.

    w_j = ± 1 / ‖g_j‖, so that every sample counts alike, rounded to powers of two: both passes then round alike,
    however coarse the numbers on the way are.
    """
    n, access, consumer = len(losses), TwoPasses(passes, losses), PerParameter()
    with exact_convolutions(losses.is_cuda):
        passes.run(losses, consumer)
    K = sum(consumer.K.values(), torch.zeros(n, n, dtype=torch.float64, device=losses.device))
    check_finite(K, K)
    access.has_16bit_factor = access.has_16bit_factor or consumer.has_16bit_factor
    norms = K.diagonal().clamp_min(0).sqrt()
    signs = 1 - 2 * (torch.arange(n, device=K.device) * 0x9E3779B1 >> 16 & 1)
    w = signs * (norms.max() / norms.clamp_min(1e-6 * norms.max())).nan_to_num(1.0).log2().round().exp2()
    if passes.structure(losses).coarsest == torch.float16:  # larger ones may leave its range, in sums too
        w = 0.25 * signs.double()
    max_abs, scale = to_host(w.abs().max(), w.abs() @ norms)
    access.apply(w, max_abs, discard=True)
    precision = access.precision
    noise = 100 * torch.finfo(precision.products).eps * scale
    limit = tolerance_of(precision.compared, K.is_cuda)
    reads, nothing = HostReads(), torch.zeros_like(K)
    for name in passes.recording.parameters:
        stats = weight_stats_of(w, consumer.K.get(name, nothing))
        square = access.measured[name][0] if name in access.measured else nothing[0, 0]

        def compare(numbers: list[float], name: str = name) -> None:
            *stats, square = numbers
            blame = lambda: f", in {name}"  # noqa: E731
            check_relative_error(
                "squared_norm", square, WeightStats(*stats), 0.0, limit, precision.products, blame, noise
            )

        reads.defer(torch.cat([stats, square[None]]), compare)
    reads.flush()
