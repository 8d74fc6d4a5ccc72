"""Rows of a CSV file, written as soon as each is known, with where and on what they were measured."""

import csv
from collections.abc import Sequence
from pathlib import Path

from projgrad._atomic import replacing

from .report import environment


class Rows:
    """A file of rows that differ in the columns of `key`; a new row replaces the one of the same key.

    What is there already stays where it was measured on the same device; `others` are looked at where there is no file.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], key: Sequence[str], device: str, others: Sequence[Path] = ()
    ) -> None:
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)
        self.about = environment(device)
        self.rows: dict[tuple, dict] = {}
        for old in (path, *others):
            if old.exists():
                with old.open(newline="") as file:
                    for row in csv.DictReader(file):
                        if row.get("device") == self.about["device"]:
                            self.rows[self._key(row)] = row
                break
        path.parent.mkdir(parents=True, exist_ok=True)

    def _key(self, row: dict) -> tuple:
        return tuple(str(row.get(name, "")) for name in self.key)

    def add(self, row: dict) -> None:
        text = {name: _text(row.get(name)) for name in self.columns} | self.about
        self.rows[self._key(text)] = text
        with replacing(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*self.columns, *self.about], lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows.values())
        print(line(text), flush=True)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


SHOWN = {
    "ms": "ms",
    "host_ms": "host",
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


def line(row: dict) -> str:
    """A row for people."""
    name = "  ".join(row[column] for column in NAMES if row.get(column))
    values = [f"{row[column]} {unit}" for column, unit in SHOWN.items() if row.get(column)]
    values += [f"{row['rate']} {row['unit']}"] if row.get("rate") else []
    target = [f"[{row['target']}: {row['met']}]"] if row.get("target") else []
    return f"{name:<56} " + ", ".join([*values, *target, *([row["note"]] if row.get("note") else [])])


def meets(row: dict, targets: Sequence[tuple[str, str, float]]) -> dict[str, str]:
    """`target` and `met` for (column, "<=" or ">=", value); a missing value misses."""
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
