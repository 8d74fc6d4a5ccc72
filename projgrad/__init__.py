"""Gradient projection for machine unlearning: exact to rounding, and several times faster than QR."""

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
