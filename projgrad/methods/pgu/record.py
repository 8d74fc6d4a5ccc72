"""What a step of PGU reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PGURecord:
    """The numbers of one step.

    rank, width: kept directions k and inputs i, summed over the projected layers (and groups): rank / width is the
        protected share of the input space. ranks: k by name.
    preserved_norm: norm of the projected over that of the unprojected gradient, projected layers only.
    residual: largest ‖D M‖ / ‖D‖ over layers, D the projected gradient; with soft, what is left on purpose.
    forget_loss: what was minimised or, with a scalar and ascend=True, maximised; before the step.
    seconds: wall time of the whole step.
    """

    rank: int
    width: int
    ranks: dict[str, int]
    preserved_norm: float
    residual: float
    forget_loss: float
    seconds: float
