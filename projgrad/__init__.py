"""Gradient projection for machine unlearning: exact, on any model, without holding per-sample gradients."""

from .experiments import starting as starting  # of the command line: it does its work before torch is imported

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING

from . import baselines, functional, projectors
from . import kernels as kernels  # importing them registers them
from .methods.feasible_updates import FeasibleRecord, FeasibleUpdates
from .methods.micro_batches import micro_batches
from .methods.orthograd import OrthoGrad
from .methods.pgu.loss import unlearning_loss
from .methods.pgu.pgu import PGU, PGURecord
from .methods.probe.probe import probe
from .methods.probe.report import Probe, ProbeRow
from .methods.step_record import StepRecord
from .ops.basis_project import basis_project
from .ops.feasible import feasible
from .ops.gram import gram
from .ops.gram_solve import gram_solve
from .ops.linear import linear_combine, linear_dot, linear_gram, linear_moments
from .ops.project_out import ProjectionInfo, project_out
from .tape.per_sample import per_sample
from .tape.tape import Tape
from .version import __version__

if TYPE_CHECKING:
    from . import evaluate as evaluate

__all__ = [
    "PGU",
    "FeasibleRecord",
    "FeasibleUpdates",
    "OrthoGrad",
    "PGURecord",
    "Probe",
    "ProbeRow",
    "ProjectionInfo",
    "StepRecord",
    "Tape",
    "__version__",
    "baselines",
    "basis_project",
    "evaluate",
    "feasible",
    "functional",
    "gram",
    "gram_solve",
    "linear_combine",
    "linear_dot",
    "linear_gram",
    "linear_moments",
    "micro_batches",
    "per_sample",
    "probe",
    "project_out",
    "projectors",
    "unlearning_loss",
]


def __getattr__(name: str) -> object:
    """`projgrad.evaluate` is imported at its first use: it brings numpy, which nothing else needs."""
    if name == "evaluate":
        return import_module(".evaluate", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
