"""Gradient projection for machine unlearning: exact, on any model, at the memory of ordinary training."""

from . import functional, projectors
from . import kernels as kernels  # importing them registers them
from .methods.orthograd import OrthoGrad, StepRecord
from .ops.basis import basis_project
from .ops.factors import linear_combine, linear_dot, linear_gram, linear_moments
from .ops.flat import ProjectionInfo, gram, gram_solve, project_out
from .tape.tape import Tape, per_sample
from .version import __version__

__all__ = [
    "OrthoGrad",
    "ProjectionInfo",
    "StepRecord",
    "Tape",
    "__version__",
    "basis_project",
    "functional",
    "gram",
    "gram_solve",
    "linear_combine",
    "linear_dot",
    "linear_gram",
    "linear_moments",
    "per_sample",
    "project_out",
    "projectors",
]
