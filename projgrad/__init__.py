"""Gradient projection for machine unlearning: exact, on any model, at about the cost of ordinary training."""

from . import kernels as kernels  # importing them registers them
from . import projectors
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
