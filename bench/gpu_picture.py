"""A picture of every CSV file named, where matplotlib is installed: `python -m bench.gpu_picture FILE ...`."""

import csv
import math
import sys
from pathlib import Path

ACROSS = 6  # panels


def panels(rows: list[dict]) -> dict[tuple[str, ...], list[dict]]:
    """Rows with a time, by what was timed."""
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        if row["ms"]:
            title = (row["case"],) if "case" in row else (row["op"], f"{row['size']} {row['dtype']}")
            found.setdefault(title, []).append(row)
    return found


def draw(path: Path) -> Path | None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups = panels(rows)
    if not groups:
        return None
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "projgrad"  # the same rows give the same file
    import matplotlib.pyplot as plt

    down, across = math.ceil(len(groups) / ACROSS), min(ACROSS, len(groups))
    figure, axes = plt.subplots(down, across, figsize=(2.6 * across, 3 * down), layout="constrained", squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (title, mine) in zip(axes.flat, groups.items(), strict=False):
        colors = ["C0" if row["contender"].startswith("projgrad") else "0.7" for row in mine]
        bars = axis.bar([row["contender"] for row in mine], [float(row["ms"]) for row in mine], color=colors)
        axis.bar_label(bars, [f"{float(row['ms']):.3g}" for row in mine], fontsize=7)
        axis.set_yscale("log")
        axis.set_title("\n".join(title), fontsize=8)
        axis.tick_params(axis="x", labelrotation=75, labelsize=6)
        axis.tick_params(axis="y", labelsize=6)
    figure.supylabel("milliseconds (log scale)", fontsize=8)
    about = rows[0]
    figure.suptitle(f"{about['device']}, torch {about['torch']}, projgrad {about['commit']}", fontsize=9)
    picture = path.with_suffix(".svg")
    figure.savefig(picture, metadata={"Date": None})
    return picture


def main() -> None:
    for name in sys.argv[1:]:
        try:
            print(draw(Path(name)) or f"{name}: nothing to draw", flush=True)
        except ModuleNotFoundError as error:
            print(f"no picture of {name}: {error.name} is missing", flush=True)


if __name__ == "__main__":
    main()
