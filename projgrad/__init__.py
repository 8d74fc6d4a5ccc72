"""Gradient projection for machine unlearning: exact, on any model, at about the cost of ordinary training."""

from . import kernels, projectors  # kernels: registers them
from .methods.orthograd import OrthoGrad, StepRecord
from .ops.flat import ProjectionInfo, gram, gram_solve, project_out
from .version import __version__

__all__ = [
    "OrthoGrad",
    "ProjectionInfo",
    "StepRecord",
    "__version__",
    "gram",
    "gram_solve",
    "project_out",
    "projectors",
]
