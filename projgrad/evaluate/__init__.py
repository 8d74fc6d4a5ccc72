"""What unlearning did to a model: metrics, means over seeds, tables, pictures and a report.

The metrics need only torch and scikit-learn; tables need rich, pictures and the report matplotlib.
"""

from .classification import Classification
from .metrics import distance, gap, histogram, membership_auc, scores, tow, uis
from .pictures import draw
from .report import write_report
from .summary import Difference, differences, paired, summarize, summarize_study, verdict
from .tables import table

__all__ = [
    "Classification",
    "Difference",
    "differences",
    "distance",
    "draw",
    "gap",
    "histogram",
    "membership_auc",
    "paired",
    "scores",
    "summarize",
    "summarize_study",
    "table",
    "tow",
    "uis",
    "verdict",
    "write_report",
]
