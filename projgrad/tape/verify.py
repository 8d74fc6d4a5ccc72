"""The rules of a graph, compared with plain autograd: all of them once, then a parameter a step."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import Checks, check_finite, exact_convolutions, of_parameter
from .consumers import PerParameter
from .gradient_access import Block, TwoPasses
from .passes import Passes


def verify(passes: Passes, losses: Tensor) -> None:
    """Compare the rules with plain autograd, unless that was done for the same graph; refuse if they disagree."""
    compared = passes.structure(losses).compared
    if not compared.rules:
        _compare(passes, losses)
        compared.rules = True


def next_watched(passes: Passes, losses: Tensor) -> str:
    """Return the parameter whose turn it is: with one backward pass, plain autograd checks one tensor a step."""
    structure = passes.structure(losses)
    names = [name for name in passes.recording.parameters if name not in structure.loops]
    structure.compared.turns += 1
    return names[structure.compared.turns % len(names)] if names else ""


def _compare(passes: Passes, losses: Tensor) -> None:
    """Compare ‖Gᵀ w‖² of every parameter, from two backward passes of which one makes weight gradients.

    w_j = ± 1 / ‖g_j‖, so that every sample counts alike, rounded to powers of two: both passes then round alike,
    however coarse the numbers on the way are.
    """
    n, access, consumer = len(losses), TwoPasses(passes, losses, {}), PerParameter()
    block = Block("", passes.recording.parameters)
    with exact_convolutions(losses.is_cuda):
        passes.run(losses, consumer)
    K = sum(consumer.K.values(), torch.zeros(n, n, dtype=torch.float64, device=losses.device))
    check_finite(K, K)
    block.has_16bit_factor = block.has_16bit_factor or consumer.has_16bit_factor
    norms = K.diagonal().clamp_min(0).sqrt()
    signs = 1 - 2 * (torch.arange(n, device=K.device) * 0x9E3779B1 >> 16 & 1)
    w = signs * (norms.max() / norms.clamp_min(1e-6 * norms.max())).nan_to_num(1.0).log2().round().exp2()
    if passes.structure(losses).coarsest == torch.float16:  # larger ones may leave its range, in sums too
        w = 0.25 * signs.double()
    access.apply([block], w[None], float(w.abs().max()), discard=True)
    checks, nothing, total = Checks(), torch.zeros_like(K), w.abs() @ norms
    for name in passes.recording.parameters:
        squared_norm, _ = access.measured.get(name, (nothing[0, 0], None))
        numbers = of_parameter(w, consumer.K.get(name, nothing), squared_norm, total)
        checks.check_parameter(name, numbers, access.precision(block))
    checks.flush()
