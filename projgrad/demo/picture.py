"""The demo in one picture."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from .methods import TITLES
from .steps import METHODS

COLORS = {
    "ascent": "#b07aa1",
    "finetune": "#4e79a7",
    "neggrad": "#f28e2b",
    "orthograd-qr": "#9c9c9c",
    "orthograd": "#2a8f4e",
    "retrained": "#222222",
}
FORGET = {"digits": "Wrong labels still repeated %", "faces": "Forgotten person still recognised %"}
CURVES = ("ascent", "finetune", "neggrad", "orthograd")  # OrthoGrad with QR is the same curve: the bars compare them


def draw(results: dict[str, Any], out: Path) -> Path:
    """Test and forget curves of each method, what n buys, time and memory of a step; returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 10,
    }
    with plt.rc_context(style):
        fig, axes = plt.subplots(2, 3, figsize=(14, 7.6), constrained_layout=True)
        _curves(axes[0, 0], results, "test", "Test accuracy %")
        _curves(axes[0, 1], results, "forget", FORGET[results["data"]])
        _final(axes[0, 2], results)
        _panel(axes[1, 0], results)
        _bars(axes[1, 1], results, "seconds", 1e3, "One step: ms")
        _bars(axes[1, 2], results, "bytes", 2**-20, "One step: peak MiB above the model")
        seeds = len(results["seeds"])
        fig.suptitle(f"projgrad demo: {results['data']}, mean of {seeds} seed(s)", fontsize=13, fontweight="bold")
        path = out / f"demo-{results['data']}.png"
        fig.savefig(path, dpi=130)
        plt.close(fig)
    return path


def _curves(ax: Any, results: dict[str, Any], key: str, title: str) -> None:
    for method in CURVES:
        points = defaultdict(list)
        for run in results["runs"]:
            if run["method"] == method and run["table"] == "main":
                for point in run["curve"]:
                    points[point["step"]].append(100 * point[key])
        last = max(points)  # methods take different numbers of steps
        ax.plot(
            [100 * step / last for step in points],
            [fmean(values) for values in points.values()],
            color=COLORS[method],
            linewidth=2.4 if method == "orthograd" else 1.6,
            label=f"{TITLES[method]} ({last} steps)",
        )
    level = 100 * results["summary"]["methods"]["retrained"][key]["mean"]
    ax.axhline(level, color=COLORS["retrained"], linestyle=":", linewidth=1.4, label="retrained")
    ax.set(title=title, xlabel="share of the steps, %")
    if key == "forget":  # the colours are the same in both
        ax.legend(fontsize=8, framealpha=0.9)


def _final(ax: Any, results: dict[str, Any]) -> None:
    """Where each method ends, near the corner where the retrained model is; what is far from it is named instead."""
    rows = {method: row for method, row in results["summary"]["methods"].items() if method in COLORS}
    goal = rows["retrained"]
    far = [
        m
        for m, row in rows.items()
        if row["forget"]["mean"] > 0.15 or row["test"]["mean"] < goal["test"]["mean"] - 0.15
    ]
    for method, row in rows.items():
        if method in far:
            continue
        ax.errorbar(
            *(100 * row[key]["mean"] for key in ("forget", "test")),
            xerr=100 * (row["forget"]["std"] or 0),
            yerr=100 * (row["test"]["std"] or 0),
            fmt={"retrained": "*", "orthograd-qr": "D"}.get(method, "o"),
            markersize={"retrained": 13, "orthograd-qr": 9}.get(method, 7),
            color=COLORS[method],
            elinewidth=1,
            capsize=2,
            label=TITLES[method],
        )
    for method in far:
        x, y = (100 * rows[method][key]["mean"] for key in ("forget", "test"))
        ax.plot([], [], "o", color=COLORS[method], label=f"{TITLES[method]}: outside, at ({x:.0f}, {y:.0f})")
    ax.set(title="At the end, ± spread over seeds", xlabel=FORGET[results["data"]].lower(), ylabel="test accuracy %")
    ax.set_xlim(min(-0.5, ax.get_xlim()[0]), max(4.0, 2.2 * ax.get_xlim()[1]))  # room for the legend
    ax.legend(fontsize=8, framealpha=0.9, loc="upper right")


def _panel(ax: Any, results: dict[str, Any]) -> None:
    rows = results["summary"]["panel"]
    ours = [row for row in rows if row["method"] == "orthograd"]
    n = [row["n"] for row in ours]
    for key, color, label in (("test", COLORS["orthograd"], "test accuracy"), ("forget", "#c0392b", "left to forget")):
        means, spreads = [100 * row[key]["mean"] for row in ours], [100 * (row[key]["std"] or 0) for row in ours]
        ax.errorbar(n, means, yerr=spreads, color=color, marker="o", capsize=3, label=label)
    for row in rows:
        if row["method"] == "neggrad":
            level = 100 * row["test"]["mean"]
            ax.axhline(level, color=COLORS["neggrad"], linestyle="--", label="test accuracy, no projection (NegGrad+)")
    if n:
        ax.set_xscale("log", base=2)
        ax.set_xticks(n, [str(value) for value in n])
        setting = results["panel_settings"][0]
        ax.set(title=f"More retain gradients a step (α = {setting['alpha']})", xlabel="n", ylabel="%", ylim=(-3, 103))
        ax.legend(fontsize=8, loc="center left")


def _bars(ax: Any, results: dict[str, Any], key: str, unit: float, title: str) -> None:
    rows = results["summary"]["steps"]
    known = [row for row in rows if None not in row[key].values()]
    for offset, method in enumerate(METHODS):
        values = [unit * row[key][method] for row in known]
        places = [i + 0.28 * (offset - 1) for i in range(len(known))]
        label = TITLES[method] + (", no projection" if method == "neggrad" else "")
        bars = ax.bar(places, values, 0.26, color=COLORS[method], label=label)
        ax.bar_label(bars, fmt="%.3g", fontsize=8)
    ax.set_yscale("log")
    ax.set_xticks(range(len(known)), [f"n = {row['n']}" for row in known])
    ax.set_title(title)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.12)
    ax.legend(fontsize=8, loc="upper left")
