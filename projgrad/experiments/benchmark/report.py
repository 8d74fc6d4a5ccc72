"""Rows of measurements as CSV files, lines of text and pictures, each with where and on what they were measured."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..._atomic import replacing
from .machine import environment

ACROSS = 7  # panels of a picture side by side
SHOWN = {
    "ms": "ms",
    "host_ms": "host",
    "device_ms": "device",
    "extra_mb": "MB",
    "peak_mb": "MB",
    "total_mb": "with model",
    "times_ours": "x ours",
    "time_over_plain": "x plain time",
    "total_over_plain": "x plain memory",
    "percent_of_floor": "% of floor",
    "percent_of_rate": "% of rate",
    "error": "error",
}
NAMES = ("op", "case", "size", "dtype", "contender")


class Rows:
    """A file of rows that differ in the columns of `key`, written whenever a row is added.

    A new row replaces the one of the same key. Rows that the file holds already stay if they were measured on the same
    device; `others` are read where there is no file.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], key: Sequence[str], device: str, others: Sequence[Path] = ()
    ) -> None:
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)
        self.about = environment(device)
        self.rows: dict[tuple, dict] = {}
        for old in (path, *others):
            if old.exists():
                for row in read_csv(old):
                    if row.get("device") == self.about["device"]:
                        self.rows[self._key(row)] = row
                break
        path.parent.mkdir(parents=True, exist_ok=True)

    def _key(self, row: dict) -> tuple:
        return tuple(str(row.get(name, "")) for name in self.key)

    def add(self, row: dict) -> None:
        """Write the file with this row, and print it."""
        text = {name: as_text(row.get(name)) for name in self.columns} | self.about
        self.rows[self._key(text)] = text
        write_csv(self.path, self.rows.values(), [*self.columns, *self.about])
        print(line(text), flush=True)


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: as_text(row.get(name)) for name in columns} for row in rows)


def as_text(value: object) -> str:
    """Return what a CSV file holds: four digits of a float, nothing of None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line(row: dict) -> str:
    """Return a row of texts as one line for people."""
    name = "  ".join(row[column] for column in NAMES if row.get(column))
    values = [f"{row[column]} {unit}" for column, unit in SHOWN.items() if row.get(column)]
    values += [f"{row['rate']} {row['unit']}"] if row.get("rate") else []
    target = [f"[{row['target']}: {row['met']}]"] if row.get("target") else []
    return f"{name:<56} " + ", ".join([*values, *target, *([row["note"]] if row.get("note") else [])])


def about_case(op: str, size: Iterable[int], dtype: torch.dtype) -> dict[str, str]:
    """Return the columns that name a case."""
    return {"op": op, "size": "x".join(map(str, size)), "dtype": str(dtype).removeprefix("torch.")}


def meets(row: dict, targets: Sequence[tuple[str, str, float]]) -> dict[str, str]:
    """Return `target` and `met` for (column, "<=" or ">=", value); a missing value misses."""
    if not targets:
        return {"target": "", "met": ""}
    met = all(
        row.get(column) is not None and (row[column] <= value if sign == "<=" else row[column] >= value)
        for column, sign, value in targets
    )
    return {
        "target": " and ".join(f"{c} {sign} {value:g}" for c, sign, value in targets),
        "met": "yes" if met else "NO",
    }


def panels(rows: Iterable[dict], where: Mapping[str, str]) -> dict[tuple[str, ...], list[dict]]:
    """Return the timed rows by what was timed, in lines of text; where: what a row must hold, such as the device."""
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        if row["ms"] and all(row.get(name) == value for name, value in where.items()):
            size = f"{row.get('size', '')} {row.get('dtype', '')}".strip()
            if "op" in row:
                panel = row["op"], size
            else:
                case = f"K, {row['case']}" if row.get("what") == "K" else row["case"]
                panel = (case, f"n = {row['n']}, {size}") if row.get("n") else (case,)
            found.setdefault(panel, []).append(row)
    return found


def draw(path: Path, title: str = "", where: Mapping[str, str] | None = None) -> Path | None:
    """Draw the times in a CSV file, one of `panels` for what was timed; return the picture, None without times."""
    drawn = panels(read_csv(path), where or {})
    if not drawn:
        return None
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "projgrad"  # the same rows give the same file
    import matplotlib.pyplot as plt

    down, across = math.ceil(len(drawn) / ACROSS), min(ACROSS, len(drawn))
    figure, axes = plt.subplots(
        down, across, figsize=(max(4.6, 2.3 * across), 3.2 * down), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (name, rows) in zip(axes.flat, drawn.items(), strict=False):
        colors = ["C0" if row["contender"].startswith("projgrad") else "0.7" for row in rows]
        bars = axis.bar([row["contender"] for row in rows], [float(row["ms"]) for row in rows], color=colors)
        axis.bar_label(bars, [f"{float(row['ms']):.3g}" for row in rows], fontsize=7)
        axis.set_yscale("log")
        axis.set_title("\n".join(name), fontsize=8)
        axis.tick_params(axis="x", labelrotation=75, labelsize=6)
        axis.tick_params(axis="y", labelsize=7)
        about = rows[0]
    figure.supylabel("milliseconds (log scale)", fontsize=8)
    title = title or f"{about['device']}, torch {about['torch']}, projgrad {about['commit']}"
    figure.suptitle(title, fontsize=9)
    picture = path.with_suffix(".svg")
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)
    return picture
