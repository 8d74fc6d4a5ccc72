"""What a step of OrthoGrad tells."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tape.records import Projection


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step.

    rank: independent retain gradients that were projected out, summed over tensors with scope="per_tensor"; None with a
        custom projector.
    preserved_norm: ‖u_perp‖ / ‖u‖ over all parameters: near 1 the projection did nothing, near 0 nothing is left to
        forget with.
    residual: max_j |cos(g_j, u_perp)|, the largest over tensors with scope="per_tensor"; of what is written to `.grad`,
        not of what the optimizer makes of it. With metric="optimizer" u_perp is the forgetting part of the change that
        the parameters really made, here and in preserved_norm.
    refinements: times the result was projected again because the first answer left more than rounding.
    discrepancy: of the self-check: how far the per-sample gradients and plain autograd are apart, relative.
    forget_loss, retain_loss: before the step; the retain loss is the mean over samples.
    seconds: wall time of the whole step.
    iterations, micro_batches, estimated_error: of a retain set in micro-batches: iterations of conjugate gradients, and
        ‖u_perp - exact‖ / ‖u_perp‖ as far as they tell, where gradients that differ by less than about
        union_tolerance, relative, may count as one; the rank is None then.
    skipped: a gradient scaler found NaN or Inf: nothing was updated but its scale.
    tensors: the same for every parameter, with scope="per_tensor"; empty otherwise.
    """

    rank: int | None
    preserved_norm: float
    residual: float
    refinements: int
    discrepancy: float
    forget_loss: float
    retain_loss: float
    seconds: float
    skipped: bool = False
    tensors: dict[str, Projection] = field(default_factory=dict)
    iterations: int = 0
    micro_batches: int = 1
    estimated_error: float = 0.0


SKIPPED = {"rank": None, "refinements": 0, "discrepancy": 0.0, "skipped": True}
SKIPPED |= dict.fromkeys(("preserved_norm", "residual", "forget_loss", "retain_loss"), float("nan"))

PENDING = {**SKIPPED, "skipped": False}  # until the optimizer has stepped


def record_fields(projection: Projection, losses: Sequence[float]) -> dict[str, Any]:
    """Return the fields of a record; losses: of the forget batch, and of every retain sample."""
    fields = {name: value for name, value in vars(projection).items() if name != "squares"}
    return fields | {"forget_loss": losses[0], "retain_loss": sum(losses[1:]) / (len(losses) - 1)}
