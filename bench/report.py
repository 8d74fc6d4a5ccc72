"""Benchmark rows as a table, a CSV file and an SVG picture, each with where and on what they were measured."""

import csv
import os
import subprocess
from pathlib import Path

import torch

from projgrad.experiments.comparison import environment as machine

RESULTS = Path(__file__).parent / "results"


def environment(device: str = "cpu") -> dict[str, str]:
    """Return the columns that say where and on what rows were measured, of what `projgrad doctor` shows; COMMIT in the
    environment names the commit of a tree without .git."""
    about = machine.environment()
    common = {key: about[key] for key in ("torch", "python", "projgrad")}
    common["commit"] = os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty")
    if device != "cuda":
        return {"device": about["processor"], "threads": str(about["threads"]), **common}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    versions = {"driver": driver, "cuda": torch.version.cuda or "none", "triton": about["triton"] or "none"}
    return {"device": about["cuda"], **versions, **common}


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def report(rows: list[dict], name: str, title: str) -> None:
    """Print `rows` and write them to results/<name>.csv and .svg."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("op", "size", "contender", "ms (20-80 %)", "times ours", "target", "% of floor", "extra MB"):
        table.add_column(column, justify="left" if column in ("op", "contender") else "right")
    for row in rows:
        met = row["target"] is None or row["times_ours"] >= row["target"]
        extra = f"{row['extra_mb']:.1f}" + (f" (≤ {row['extra_mb_target']})" if row["extra_mb_target"] else "")
        table.add_row(
            row["op"],
            row["size"],
            row["contender"],
            f"{row['ms']:.2f} ({row['ms_20']:.2f}-{row['ms_80']:.2f})",
            f"{row['times_ours']:.2f}",
            "" if row["target"] is None else f"≥ {row['target']} {'met' if met else 'MISSED'}",
            f"{row['percent_of_floor']:.0f}",
            extra,
        )
    Console(width=130).print(table)
    RESULTS.mkdir(exist_ok=True)
    about = environment()
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} | about for row in rows)
    _picture(rows, RESULTS / f"{name}.svg", f"{title}\n{about['device']}, {about['threads']} threads, {about['torch']}")


def _picture(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "projgrad"  # the same rows give the same file
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((row["op"], row["size"]) for row in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(2.2 * len(cases), 3.4), layout="constrained")
    for axis, case in zip(axes if len(cases) > 1 else [axes], cases, strict=True):
        mine = [row for row in rows if (row["op"], row["size"]) == case]
        colors = ["C0" if row["contender"] == "projgrad" else "0.7" for row in mine]
        bars = axis.bar([row["contender"] for row in mine], [row["ms"] for row in mine], color=colors)
        axis.bar_label(bars, [f"{row['ms']:.3g}" for row in mine], fontsize=7)
        axis.set_yscale("log")
        axis.set_title("\n".join(case), fontsize=8)
        axis.tick_params(axis="x", labelrotation=60, labelsize=7)
        axis.tick_params(axis="y", labelsize=7)
    figure.supylabel("milliseconds (log scale)", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
