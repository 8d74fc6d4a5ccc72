"""Results of `projgrad bench` on disk: JSON that `pytest-benchmark compare` reads, with a CSV file beside it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median, stdev

from ..._atomic import replacing
from ..comparison.store import read_or_set_aside
from .report import as_text, write_csv


class Store:
    """The rows of one kind of benchmark, `steps` or `ops`, written whenever some are added.

    columns, key: of the rows; a new row replaces the one of the same key. about: where they are measured. A row that a
    file holds is of use again if everything in `about` is the same.
    """

    def __init__(
        self, folder: Path, kind: str, columns: Sequence[str], key: Sequence[str], about: Mapping[str, str]
    ) -> None:
        self.json, self.csv = folder / f"{kind}.json", folder / f"{kind}.csv"
        self.kind, self.columns, self.key, self.about = kind, tuple(columns), tuple(key), dict(about)
        folder.mkdir(parents=True, exist_ok=True)
        content = read_or_set_aside(self.json, _is_whole)
        self.rows: dict[tuple, dict] = {self._key(row): row for row in (_rows(content) if content else ())}

    def _key(self, row: Mapping[str, object]) -> tuple:
        return tuple(as_text(row.get(name)) for name in self.key)

    def find(self, wanted: Mapping[str, object]) -> list[dict]:
        """Return the rows that have these values, measured under the same circumstances as now."""
        wanted = {**wanted, **self.about}
        return [row for row in self.rows.values() if all(as_text(row.get(k)) == as_text(v) for k, v in wanted.items())]

    def held(self, rows: Sequence[Mapping[str, object]]) -> list[dict]:
        """Return the rows with the keys of these."""
        return [self.rows[self._key(row)] for row in rows]

    def add(self, rows: Sequence[dict]) -> None:
        for row in rows:
            row = {**row, **self.about}
            self.rows[self._key(row)] = row
        more = {name: None for row in self.rows.values() for name in row}  # where each was measured
        write_csv(
            self.csv, self.rows.values(), [name for name in {**dict.fromkeys(self.columns), **more} if name != "times"]
        )
        with replacing(self.json) as partial:
            partial.write_text(json.dumps(self._content(), indent=1) + "\n")

    def _content(self) -> dict:
        benchmarks = [self._entry(row) for row in self.rows.values()]
        now = datetime.now(timezone.utc).isoformat()
        commit = {"id": self.about.get("commit", "unknown"), "dirty": "dirty" in self.about.get("commit", "")}
        return {
            "machine_info": self.about,
            "commit_info": commit,
            "benchmarks": [entry for entry in benchmarks if "stats" in entry],
            "without_times": [entry for entry in benchmarks if "stats" not in entry],
            "datetime": now,
            "version": self.about.get("projgrad", ""),
        }

    def _entry(self, row: Mapping[str, object]) -> dict:
        """Return a row as pytest-benchmark stores it."""
        *group, contender = self._key(row)
        entry = {
            "group": f"{self.kind} {' '.join(group)}",
            "name": f"{' '.join(group)} {contender}",
            "fullname": f"{self.kind}::{' '.join(group)}[{contender}]",
            "params": None,
            "param": contender,
            "extra_info": {name: value for name, value in row.items() if name != "times"},
            "options": {},
        }
        times = row.get("times")
        return entry | ({"stats": statistics([1e-3 * ms for ms in times])} if times else {})


def _rows(content: dict) -> list[dict]:
    """Return the rows in the content of a file, with their times in milliseconds."""
    entries = [*content["benchmarks"], *content.get("without_times", [])]
    times = [[1e3 * s for s in entry.get("stats", {}).get("data", [])] for entry in entries]
    return [entry["extra_info"] | {"times": some} for entry, some in zip(entries, times, strict=True)]


def _is_whole(content: object) -> bool:
    try:
        _rows(content)
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def statistics(seconds: Sequence[float]) -> dict[str, object]:
    """Return what pytest-benchmark stores of times: quartiles are the medians of the two halves."""
    data, count = sorted(seconds), len(seconds)
    q1, q3 = median(data[: (count + 1) // 2]), median(data[count // 2 :])
    mean, deviation, iqr = fmean(data), stdev(data) if count > 1 else 0.0, q3 - q1
    inside = [s for s in data if q1 - 1.5 * iqr <= s <= q3 + 1.5 * iqr] or data
    far = sum(abs(s - mean) > deviation for s in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": count,
        "median": median(data),
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": count - len(inside),
        "stddev_outliers": far,
        "outliers": f"{far};{count - len(inside)}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": 1 / mean if mean else 0.0,
        "total": sum(data),
        "data": list(seconds),
        "iterations": 1,
    }
