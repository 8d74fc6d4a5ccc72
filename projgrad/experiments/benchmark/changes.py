"""What changed between two runs of `projgrad bench`, beyond noise."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from .report import read_csv
from .subjects import Refused

RULE = "changed: the 20-80 % ranges of the times do not overlap, and the medians differ by more than 5 %"
NOISE = 0.05
CIRCUMSTANCES = ("device", "threads", "driver", "cuda", "triton", "torch", "python", "projgrad", "commit", "source")
NEEDED = {"contender", "ms", "ms_20", "ms_80"}
Row = Mapping[str, str]


def read_older(path: Path) -> list[dict]:
    """Read a CSV file to compare with. Raises Refused where it is none of ours."""
    if not path.is_file():
        raise Refused(f"--compare {path}: there is no such file")
    try:
        rows = read_csv(path)
    except (ValueError, OSError, csv.Error) as error:
        raise Refused(f"--compare {path}: {error}") from error
    if not rows or not rows[0].keys() & {"case", "op"} or not rows[0].keys() >= NEEDED:
        raise Refused(f"--compare {path} is no steps.csv or ops.csv of projgrad bench")
    return rows


def changed(old: Row, new: Row) -> float | None:
    """Return new / old of the median times where that is more than noise, else None; rows of a CSV file."""
    if not (old.get("ms") and new.get("ms")):
        return None
    low, high = (tuple(float(row[name]) for name in ("ms_20", "ms", "ms_80")) for row in (old, new))
    ratio = high[1] / low[1]
    if max(low[0], high[0]) <= min(low[2], high[2]) or abs(ratio - 1) <= NOISE:
        return None
    return ratio


def report(old: Sequence[Row], new: Sequence[Row], key: Sequence[str]) -> list[str]:
    """Return lines of text: what was different around the runs, every change, and how much was compared."""
    before = {tuple(row.get(name, "") for name in key): row for row in old}
    pairs = [(name, before[name], row) for row in new if (name := tuple(row.get(k, "") for k in key)) in before]
    if not pairs:
        return ["compared: nothing, the file holds none of these cases"]
    lines = []
    for name in CIRCUMSTANCES:
        values = sorted({(a.get(name, ""), b.get(name, "")) for _, a, b in pairs if a.get(name, "") != b.get(name, "")})
        lines += [f"  not the same: {name} {a or 'none'} -> {b or 'none'}" for a, b in values[:3]]
    ratios = {name: changed(a, b) for name, a, b in pairs}
    moved = {name: ratio for name, ratio in ratios.items() if ratio}
    for name, ratio in sorted(moved.items(), key=lambda item: -item[1]):
        row = before[name]
        word = "slower" if ratio > 1 else "faster"
        floor = ratios.get((*name[:-1], "plain"))
        beside = f"; plain itself {floor:.2f} x" if floor and name[-1] != "plain" else ""
        after = next(b for other, _, b in pairs if other == name)
        lines.append(f"  {' '.join(name)}: {word}, {row['ms']} -> {after['ms']} ms ({ratio:.2f} x){beside}")
    notes = [(name, a, b) for name, a, b in pairs if a.get("note", "") != b.get("note", "")]
    lines += [f"  {' '.join(name)}: {a.get('note') or 'right'} -> {b.get('note') or 'right'}" for name, a, b in notes]
    timed = sum(bool(a.get("ms") and b.get("ms")) for _, a, b in pairs)
    lines.append(f"  {len(moved)} of {timed} times changed ({RULE})")
    return ["compared with the older file:", *lines]
