"""What unlearning did to a model: metrics, means over seeds, tables, pictures and a report.

Metrics and summaries need numpy, and `language.forget_quality` scipy: pip install "projgrad[evaluate]". Tables need
rich, pictures matplotlib, and the report matplotlib and Jinja2: pip install "projgrad[demo]".
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
