"""The record of a projection."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Projection:
    """What a projection did.

    rank: independent per-sample gradients projected out, summed over tensors with scope="per_tensor"; None with a
        projector of the caller's.
    preserved_norm: ‖result‖ / ‖p.grad‖ over all parameters, before anything is added.
    residual: max_j |cos(g_j, result)|, the largest over tensors: what solving left, and the rounding to expect;
        measured with another pass where the result had to be refined.
    refinements: times the result was projected again.
    discrepancy: largest relative difference between ‖Gᵀ w‖², ⟨u, Gᵀ w⟩ as the rules predict them and as they came out.
    squares: ‖p.grad‖² and ‖result‖².
    tensors: the same for every tensor, with scope="per_tensor".
    """

    rank: int | None
    preserved_norm: float
    residual: float
    refinements: int
    discrepancy: float
    squares: tuple[float, float]
    tensors: dict[str, Projection] = field(default_factory=dict)
