"""One visual language for all pictures: a method has the same colour and marker everywhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .summary import ORTHOGRAD_METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
INK = "#1f2328"  # of text and axes; inside a page it becomes the colour of the page's text
OURS = (("#0072b2", "o"), ("#56b4e9", "D"), ("#5b5bd6", "p"), ("#1f9fd0", "H"))  # OrthoGrad and variants: blues
OTHERS = ("#d55e00", "#e69f00", "#009e73", "#cc79a7", "#8c8c00", "#aa4499", "#44aa99", "#a6761d", "#7f7f7f")
MARKERS = "s^vPX<>dh8"  # nobody needs to tell colours apart
MARKER_SIZE = 6.5
DASHES = ("--", "-.", (0, (4, 1, 1, 1)))
REFERENCE = {
    "original": {"color": INK, "marker": "x", "linestyle": ":"},
    "retrained": {"color": INK, "marker": "*", "linestyle": ":"},
}
PARTS = {"forget": "#d55e00", "test": "#0072b2"}
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "projgrad",  # the same picture, the same file
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def styled(function: Callable) -> Callable:
    """Run the function with STYLE, and change nobody else's."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return run


def canvas(rows: int, columns: int, width: float, height: float, **shared: bool) -> tuple[Figure, Any]:
    """Make a figure in inches and its axes [rows, columns], without pyplot: nothing global, nothing to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def styles(methods: Collection[str], orthograd: Collection[str] = ORTHOGRAD_METHODS) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line of every method, by its place among all of them; orthograd: which are blue."""
    others = [method for method in methods if method not in orthograd and method not in REFERENCE]
    looks: dict[str, dict[str, Any]] = dict(REFERENCE)
    for i, method in enumerate(method for method in methods if method in orthograd):
        color, marker = OURS[i % len(OURS)]
        looks[method] = {"color": color, "marker": marker, "linestyle": "-"}
    for i, method in enumerate(others):
        looks[method] = {
            "color": OTHERS[i % len(OTHERS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
        }
    return looks


def marker_size(method: str, orthograd: Collection[str]) -> float:
    return 12 if method == "retrained" else 8 if method in orthograd else MARKER_SIZE


def legend_entry(label: str, style: Mapping[str, Any], size: float = MARKER_SIZE) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, markersize=size, **style)


def legend_cell(ax: Axes, handles: list) -> None:
    """Put a legend in a cell of its own, where it covers nothing."""
    ax.axis("off")
    ax.legend(handles=handles, loc="upper left", handlelength=3, borderaxespad=0)


def plain_log(axis: Any) -> None:
    """Write numbers on a logarithmic axis as 1, 20 or 5e-07."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@styled
def png(figure: Figure, path: Path) -> Path:
    """Save the figure on white; returns the path."""
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path


@styled
def svg(figure: Figure, name: str) -> str:
    """Return the figure as SVG for a page: transparent, in the page's text colour; name keeps its ids apart."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r' (id="|href="#|[-a-z]*="url\(#)', rf" \1{name}-", text)
    head, body = text.split(">", 1)
    return re.sub(r' (width|height|version)="[^"]*"', "", head) + ">" + body
