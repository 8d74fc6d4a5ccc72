"""The pictures: each takes results as plain values and returns a matplotlib figure, or None where nothing is known."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .style import INK, PARTS, canvas, legend_cell, legend_entry, marker_size, plain_log, png, styled, styles
from .summary import known, orthograd_methods, ranked, summarize, summarize_study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Picture = Callable[[Mapping[str, Any], Mapping[str, str]], Figure | None]

NEAR = 0.15  # to the retrained model, as shares: what the close-up of the trade-off shows
CURVES = {
    "test": "test accuracy %",
    "forget": "forget accuracy %",
    "forget_loss": "forget loss",
    "retain_loss": "retain loss",
    "rank": "rank of the retain gradients",
    "preserved_norm": "preserved norm",
    "residual": "residual",
}
STUDY = {  # title and unit
    "test": ("test accuracy %", 100),
    "forget": ("forget accuracy %", 100),
    "tow": ("ToW", 1.0),
    "step_seconds": ("ms per step", 1e3),
    "peak_bytes": ("peak memory, MiB", 2**-20),
}
ENDS = {
    "forget": {"color": PARTS["forget"], "marker": "o", "markerfacecolor": "white"},
    "test": {"color": PARTS["test"], "marker": "D"},
}


@styled
def tradeoff(scenario: Mapping[str, Any], titles: Mapping[str, str]) -> Figure | None:
    """Draw where each method ends: test against forget accuracy, all of it and close to the retrained model."""
    names, rows = known(scenario, titles), summarize(scenario)
    rows = {m: rows[m] for m in names if m in rows and rows[m].keys() >= PARTS.keys()}
    if not rows:
        return None
    orthograd = orthograd_methods(scenario)
    looks = {m: {**style, "linestyle": ""} for m, style in styles(titles | names, orthograd).items()}
    goal, near = next(_close(rows, [m for m in ("retrained", *ranked(scenario)) if m in rows]), (None, ()))
    panels = [rows, near] if goal else [rows]
    figure, axes = canvas(1, len(panels), 4.2 * len(panels) + 2.2, 4)
    for ax, methods in zip(axes[0], panels, strict=True):
        for method in methods:
            size, front = marker_size(method, orthograd), method in orthograd
            _point(ax, rows[method], markersize=size, zorder=3 if front else 2, **looks[method])
        ax.set(xlabel=f"forget accuracy %: {scenario['forget_title']}")
        ax.margins(0.08)
    axes[0, 0].set(ylabel="test accuracy %", title="All methods, ± spread over seeds")
    if len(panels) > 1:
        axes[0, 1].set_title(f"Close to {names[goal]}")
    figure.legend(handles=[_entry(m, names[m], looks, orthograd) for m in rows], loc="outside right upper")
    return figure


@styled
def curves(scenario: Mapping[str, Any], titles: Mapping[str, str]) -> Figure | None:
    """Draw what happened on the way, mean over seeds: accuracies, losses, and what the projection did."""
    names, orthograd = known(scenario, titles), orthograd_methods(scenario)
    looks = styles(titles | names, orthograd)
    drawn = {what: lines for what in CURVES if (lines := {m: c for m in names if (c := _curve(scenario, m, what))})}
    if not drawn:
        return None
    last = {m: max(lines[m]) for lines in drawn.values() for m in lines}
    rows = -(-(1 + len(drawn)) // 4)
    figure, axes = canvas(rows, 4, 12.5, 2.9 * rows)
    for ax, (what, lines) in zip(axes.flat, drawn.items(), strict=False):
        for method, curve in lines.items():
            x = [100 * step / max(1, last[method]) for step in curve]
            y = [value * (100 if what in PARTS else 1) for value in curve.values()]
            width = 2.2 if method in orthograd else 1.3
            ax.plot(x, y, markevery=0.24, markersize=4.5, linewidth=width, **looks[method])
        if what == "residual" and any(value > 0 for curve in lines.values() for value in curve.values()):
            ax.set_yscale("log")
            _whole_decades(ax)
        elif what.endswith("loss"):
            ax.set_yscale("symlog", linthresh=1)
            plain_log(ax.yaxis)
        ax.set(title=CURVES[what], xlabel="share of the steps, %")
    cells = list(axes.flat[len(drawn) :])
    handles = [_entry(m, f"{names[m]} ({last[m]} steps)", looks, orthograd) for m in names if m in last]
    legend_cell(cells[0], handles)
    for ax in cells[1:]:
        ax.remove()
    return figure


@styled
def confidences(scenario: Mapping[str, Any], titles: Mapping[str, str]) -> Figure | None:
    """Draw how sure each model is of the labels of forget and of test samples, all seeds together."""
    names = known(scenario, titles)
    counts: dict[str, dict[str, list[int]]] = {}
    for run in scenario["runs"]:
        for part, bins in (run.get("confidence") or {}).items():
            sums = counts.setdefault(run["method"], {})
            sums[part] = [a + b for a, b in zip(sums.get(part, [0] * len(bins)), bins, strict=True)]
    shown = [method for method in names if method in counts]
    if not shown:
        return None
    rows = -(-len(shown) // 5)
    figure, axes = canvas(rows, 5, 12.5, 0.7 + 1.75 * rows, sharex=True, sharey=True)
    for ax, method in zip(axes.flat, shown, strict=False):
        for part, bins in counts[method].items():
            edges = [i / len(bins) for i in range(len(bins) + 1)]
            shares = [100 * count / max(1, sum(bins)) for count in bins]
            line = "-" if part == "forget" else "--"
            ax.stairs(shares, edges, fill=True, color=PARTS[part], alpha=0.22)
            ax.stairs(shares, edges, color=PARTS[part], linewidth=1.6, label=part, linestyle=line)
        ax.set_title(names[method], fontsize=10)
        ax.tick_params(labelbottom=True, labelsize=8)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    figure.supxlabel("probability that the model gives to the label", fontsize=10)
    figure.supylabel("samples %", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


@styled
def study(scenario: Mapping[str, Any], titles: Mapping[str, str]) -> Figure | None:
    """Draw what more retain samples in a step buy, and what they cost."""
    rows = summarize_study(scenario)
    names = {method: title for method, title in known(scenario, titles).items() if method in rows}
    if not names:
        return None
    orthograd = orthograd_methods(scenario)
    looks = styles(titles | known(scenario, titles), orthograd)
    sizes = sorted({n for by_n in rows.values() for n in by_n})
    measured = {key for by_n in rows.values() for row in by_n.values() for key in row}
    panels = {key: about for key, about in STUDY.items() if key in measured}
    down = -(-len(panels) // 2)
    figure, axes = canvas(down, 2, 9, 0.5 + 2.6 * down)
    for ax, (what, (title, factor)) in zip(axes.flat, panels.items(), strict=False):
        for method in names:
            points = {n: row[what] for n, row in rows[method].items() if what in row}
            means = [factor * value["mean"] for value in points.values()]
            spreads = [factor * (value["std"] or 0) for value in points.values()]
            ax.errorbar(list(points), means, yerr=spreads, capsize=2, elinewidth=1, markersize=5, **looks[method])
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.minorticks_off()
        ax.set(title=title, xlabel="n, retain samples in a step")
        if what not in PARTS:
            ax.set_ylim(bottom=0)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    handles = [_entry(m, names[m], looks, orthograd) for m in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, handlelength=3)
    return figure


@styled
def overview(results: Mapping[str, Any], titles: Mapping[str, str]) -> Figure | None:
    """Draw a panel per scenario and a line per method: accuracy on the forget set and on the test set."""
    scenarios = [scenario for scenario in results["scenarios"].values() if scenario["runs"]]
    if not scenarios:
        return None
    names = {m: t for scenario in scenarios for m, t in known({"runs": scenario["runs"]}, titles).items()}
    order = [m for m in {**titles, **names} if m in names]
    orthograd = {m for scenario in scenarios for m in orthograd_methods(scenario)}
    across = min(3, len(scenarios))
    down = -(-len(scenarios) // across)
    figure, axes = canvas(down, across, 1.9 + 2.7 * across, 0.4 + down * (0.6 + 0.25 * len(order)), sharey=True)
    for i, (ax, scenario) in enumerate(zip(axes.flat, scenarios, strict=False)):
        _line_up(ax, summarize(scenario), order, orthograd)
        title = scenario["title"] + (" (small)" if scenario["small"] else "")
        ax.set_title(fill(title, 27), fontsize=10, loc="left")
        if i % across == 0:
            ax.set_yticks(range(len(order)), [names[m] for m in order])
            for label, method in zip(ax.get_yticklabels(), order, strict=True):
                label.set_fontweight("bold" if method in orthograd else "normal")
    axes[0, 0].set_ylim(len(order) - 0.5, -0.5)
    for ax in axes.flat[len(scenarios) :]:
        ax.remove()
    handles = [legend_entry(f"{part} accuracy %", {**look, "linestyle": ""}) for part, look in ENDS.items()]
    handles.append(legend_entry("of the retrained model", {"color": INK, "linestyle": ":"}))
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if across > 1 else 1)
    return figure


PICTURES: dict[str, Picture] = {
    "tradeoff": tradeoff,
    "curves": curves,
    "confidences": confidences,
    "study": study,
}


def draw(results: Mapping[str, Any], titles: Mapping[str, str], out: Path | str) -> list[Path]:
    """Write all pictures as <scenario>-<picture>.png and overview.png; returns the files."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = {"overview": overview(results, titles)}
    for name, scenario in results["scenarios"].items():
        if not scenario["skipped"]:
            figures |= {f"{name}-{key}": picture(scenario, titles) for key, picture in PICTURES.items()}
    return [png(figure, out / f"{name}.png") for name, figure in figures.items() if figure]


def _entry(method: str, label: str, looks: Mapping[str, dict], orthograd: Collection[str]) -> Any:
    return legend_entry(label, looks[method], marker_size(method, orthograd))


def _line_up(ax: Axes, rows: Mapping[str, Any], order: Sequence[str], orthograd: Collection[str]) -> None:
    for y, method in enumerate(order):
        row = rows.get(method, {})
        if not row.keys() >= PARTS.keys():
            continue
        ax.plot([100 * row[part]["mean"] for part in PARTS], [y, y], color=INK, alpha=0.25, zorder=1)
        for part, look in ENDS.items():
            spread = 100 * (row[part]["std"] or 0)
            ax.errorbar(100 * row[part]["mean"], y, xerr=spread, capsize=2, markersize=6, **look)
        if "tow" in row:
            weight = "bold" if method in orthograd else "normal"
            _beside(ax, f"{row['tow']['mean']:.2f}", y, weight=weight)
    _beside(ax, "ToW", -0.75)
    for part, color in PARTS.items():
        if part in rows.get("retrained", {}):
            ax.axvline(100 * rows["retrained"][part]["mean"], color=color, linestyle=":", linewidth=1.1)
    ax.set_xlim(-4, 104)


def _beside(ax: Axes, text: str, y: float, **look: Any) -> None:
    ax.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), fontsize=8.5, va="center", **look)


def _whole_decades(ax: Axes) -> None:
    low, high = (math.log10(value) for value in ax.get_ylim())
    ax.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
    plain_log(ax.yaxis)


def _close(rows: Mapping[str, Any], goals: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield goals that have company worth a closer look, each with those near it."""
    for goal in goals:
        near = [m for m in rows if all(abs(rows[m][p]["mean"] - rows[goal][p]["mean"]) <= NEAR for p in PARTS)]
        if 2 < len(near) < len(rows):
            yield goal, near


def _point(ax: Axes, row: Mapping[str, Any], **look: Any) -> None:
    ax.errorbar(
        *(100 * row[part]["mean"] for part in PARTS),
        xerr=100 * (row["forget"]["std"] or 0),
        yerr=100 * (row["test"]["std"] or 0),
        elinewidth=1,
        capsize=2,
        **look,
    )


def _curve(scenario: Mapping[str, Any], method: str, key: str) -> dict[int, float]:
    """Return the mean over seeds by step, at the steps that as many seeds reached as any."""
    points = defaultdict(list)
    for run in scenario["runs"]:
        if run["method"] == method:
            for point in run.get("curve") or ():
                if point.get(key) is not None:
                    points[point["step"]].append(point[key])
    most = max(map(len, points.values()), default=0)
    return {step: fmean(values) for step, values in sorted(points.items()) if len(values) == most}
