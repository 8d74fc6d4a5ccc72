"""Means, spreads and an honest verdict from the runs of a demo."""

import math
from collections.abc import Iterable
from statistics import fmean, median, stdev
from typing import Any

from .methods import TITLES

METRICS = ("forget", "retain", "test")
BREAKDOWN = 0.1  # a spread over seeds this large means that some run was destroyed


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """All that tables and pictures show, computed from the finished runs only."""
    runs = results["runs"]
    rows = {}
    for method in TITLES:
        some = [run for run in runs if run["method"] == method and run["table"] == "main"]
        if some:
            rows[method] = _row(some)
    keys = dict.fromkeys((run["n"], run["method"]) for run in runs if run["table"] == "panel")
    panel = [
        {
            "method": method,
            "n": n,
            **_row([r for r in runs if (r["table"], r.get("n"), r["method"]) == ("panel", n, method)]),
        }
        for n, method in sorted(keys, key=lambda key: (key[1], key[0]))
    ]
    limit = results["chosen_by"].get("limit", 0.05)
    steps = _steps(results)
    text = f"{verdict(rows, limit)} {saving(steps)}".strip()
    return {"methods": rows, "panel": panel, "steps": steps, "verdict": text}


def _row(runs: list[dict]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len(runs)}
    for key in METRICS:
        values = [run[key] for run in runs]
        row[key] = {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}
    for key in ("step_seconds", "preserved_norm"):
        values = [run[key] for run in runs if run[key] is not None]
        row[key] = median(values) if values else None
    return row


def _steps(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for n in dict.fromkeys(entry["n"] for entry in results["steps"]):
        some = [entry for entry in results["steps"] if entry["n"] == n]
        memory = next((entry["bytes"] for entry in results["memory"] if entry["n"] == n), {})
        rows.append(
            {
                "n": n,
                "seconds": {k: median(entry["seconds"][k] for entry in some) for k in some[0]["seconds"]},
                "bytes": {k: memory.get(k) for k in some[0]["seconds"]},
                "relative_difference": max(entry["relative_difference"] for entry in some),
            }
        )
    return rows


def verdict(rows: dict[str, dict], limit: float) -> str:
    """OrthoGrad against the best baseline that forgets, with the spread over seeds. Generated, whatever it says."""
    if "orthograd" not in rows or "retrained" not in rows:
        return "Not enough finished runs to compare."
    ours = rows["orthograd"]
    baselines = {m: row for m, row in rows.items() if m in ("ascent", "finetune", "neggrad")}
    forgetting = {m: row for m, row in baselines.items() if row["forget"]["mean"] <= limit}
    text = f"OrthoGrad leaves {_percent(ours['forget'])} to forget at a test accuracy of {_percent(ours['test'])}"
    gap = 100 * (rows["retrained"]["test"]["mean"] - ours["test"]["mean"])
    text += f", {abs(gap):.1f} points {'below' if gap >= 0 else 'above'} retraining"
    if ours["forget"]["mean"] > limit:
        return f"{text}. That is not forgetting by the limit of {limit:.0%}."
    if not forgetting:
        return f"{text}; no baseline gets below {limit:.0%} to forget."
    best = max(forgetting, key=lambda m: forgetting[m]["test"]["mean"])
    theirs = forgetting[best]
    difference = 100 * (ours["test"]["mean"] - theirs["test"]["mean"])
    text += f". The best baseline, {TITLES[best]}, reaches {_percent(theirs['test'])}"
    text += f" and leaves {_percent(theirs['forget'])}"
    if ours["test"]["std"] is None:
        return f"{text}: {difference:+.1f} points for OrthoGrad, on one seed, so without a spread to judge it by."
    spread = 100 * math.hypot(ours["test"]["std"], theirs["test"]["std"])
    if difference > spread:
        judgement = "OrthoGrad wins on this data"
    elif difference < -spread:
        judgement = "OrthoGrad does not win on this data"
    else:
        judgement = "OrthoGrad does not win on this data: the two cannot be told apart"
    broken = [
        f"{TITLES[m]} ({_percent(row['test'])})" for m, row in baselines.items() if row["test"]["std"] > BREAKDOWN
    ]
    note = f" {' and '.join(broken)} broke down on some seeds and is not seen at its best." if broken else ""
    return f"{text}. {judgement} ({difference:+.1f} points; spread over seeds {spread:.1f}).{note}"


def saving(steps: list[dict[str, Any]]) -> str:
    """What a step on the tape needs beside the reference projector and beside no projection, over all n."""

    def beside(other: str) -> str:
        parts = []
        for key, unit in (("seconds", "time"), ("bytes", "memory")):
            if all(all(row[key].values()) for row in steps):  # no system but Linux tells the memory
                ratios = [row[key]["orthograd"] / row[key][other] for row in steps]
                ends = dict.fromkeys(f"{end(ratios):.2g}" for end in (min, max))
                parts.append(f"{' to '.join(ends)} times the {unit}")
        return " and ".join(parts)

    if not steps:
        return ""
    return (
        f"With {_listed(row['n'] for row in steps)} retain samples a step on the tape takes {beside('orthograd-qr')} "
        f"of a step with the reference projector, and {beside('neggrad')} of a step without projection."
    )


def _listed(values: Iterable[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _percent(value: dict[str, float | None]) -> str:
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{spread} %"
