"""Tables of at most 100 columns, and a line of progress, without a package."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO

WIDTH = 100
BAR = 20
LEGEND = {
    "step": "x plain: in units of the step without projection, the floor, timed in the same rounds. MB: peak above the "
    "loaded model, its first step. error: relative, from the step in float64 with explicit per-sample gradients.",
    "K": "x plain: in units of one forward and backward pass over the retain batch. MB: peak above the loaded model. "
    "error: relative, from K in float64.",
    "op": "% floor: of the time that reading the inputs or multiplying takes at the rates of this machine, measured in "
    "the same run. MB: peak beyond the inputs. error: from float64.",
}


class Progress:
    """A bar on a terminal; elsewhere a line for what is finished."""

    def __init__(self, count: int, stream: TextIO | None = None) -> None:
        self.count, self.done, self.stream = count, 0, stream or sys.stderr
        self.watched, self.width = self.stream.isatty(), 0

    def show(self, text: str, finished: bool = False) -> None:
        if not self.watched:
            if finished:
                self.stream.write(text + "\n")
                self.stream.flush()
            return
        filled = BAR * self.done // max(self.count, 1)
        width = min(WIDTH, shutil.get_terminal_size().columns) - 1  # a line that wraps cannot be written over
        line = f"[{'#' * filled}{'.' * (BAR - filled)}] {self.done}/{self.count} {text}"[:width]
        self.stream.write("\r" + line.ljust(self.width))
        self.stream.flush()
        self.width = len(line)

    def clear(self) -> None:
        if self.watched and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0


def number(value: object, digits: int = 3) -> str:
    """Return a number with about three digits, nothing of None."""
    if value is None or value == "":
        return ""
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def span(row: dict) -> str:
    return f"{number(row['ms_20'])} - {number(row['ms_80'])}" if row.get("ms_20") is not None else ""


def error(row: dict) -> str:
    value = row.get("error")
    return "" if value is None else f"{value:.0e}"


def step_table(rows: Sequence[dict], mark: str = "") -> str:
    """Return the table of one case of whole steps; mark: behind its title."""
    first = rows[0]
    what = "Step" if first["what"] == "step" else "K alone"
    title = (
        f"{what}: {first['case']}, n = {first['n']}, {first['p']:,} parameters, {first['dtype']}, {first['optimizer']}"
    )
    heads = ("contender", "ms", "20 - 80 %", "x plain", "MB", "x plain", "error")
    measured = [row for row in rows if row["ms"] or row["peak_mb"] is not None or row["error"] is not None]
    lines = [
        (
            row["contender"],
            number(row["ms"]),
            span(row),
            number(row["over_plain"]),
            number(row["peak_mb"]),
            number(row["memory_over_plain"]),
            error(row),
        )
        for row in measured
    ]
    return _table(title + mark, heads, lines, [(row["contender"], row["note"]) for row in rows])


def op_table(rows: Sequence[dict], mark: str = "") -> str:
    """Return the table of one op at one size."""
    title = f"{rows[0]['op']} {rows[0]['size']}, {rows[0]['dtype']}"
    heads = ("contender", "ms", "20 - 80 %", "x ours", "% floor", "MB", "error")
    names = ("times_ours", "percent_of_floor", "extra_mb")
    lines = [
        (row["contender"], number(row.get("ms")), span(row), *(number(row.get(name)) for name in names), error(row))
        for row in rows
    ]
    return _table(title + mark, heads, lines, [(row["contender"], row.get("note")) for row in rows])


def legend(name: str, rows: Iterable[dict]) -> str:
    """Return what the heads of a table mean; of "error" only where a row has one."""
    text = LEGEND[name]
    return text if any(error(row) for row in rows) else text.partition(" error:")[0]


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _table(
    title: str, heads: Sequence[str], lines: Iterable[Sequence[str]], notes: Iterable[tuple[str, str | None]]
) -> str:
    lines = [tuple(heads), *lines]
    if not any(line[-1] for line in lines[1:]):  # no errors
        lines = [line[:-1] for line in lines]
    heads = lines[0]
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(heads))
    text = [wrapped(title)]
    for name, *cells in lines:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        text.append(f"  {name[: widths[0]]:<{widths[0]}}{numbers}".rstrip())
    names: dict[str, list[str]] = {}
    for name, note in notes:
        if note:
            names.setdefault(note, []).append(name)
    text += [wrapped(f"{', '.join(same)}: {note}", "  ") for note, same in names.items()]
    return "\n".join(text)
