"""A scenario's results as a table: for the console, and as plain cells for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .._options import check_integer
from .summary import known, orthograd_methods, spread, summarize

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 120
# Left out, in this order, where the table is too wide.
OPTIONAL = ("seconds", "usable", "steps", "peak MiB", "ms/step", "retain %")


class Column(NamedTuple):
    """title: may have two lines; cells: one per method."""

    title: str
    cells: list[str]


def columns(scenario: Mapping[str, Any], titles: Mapping[str, str]) -> list[Column]:
    """Return method, accuracies, attack, ToW, word error rates if any, and costs, as mean ± standard deviation."""
    rows, names = summarize(scenario), known(scenario, titles)
    rows = {method: rows[method] for method in names if method in rows}
    rates = dict.fromkeys(key for row in rows.values() for key in row if key.startswith("wer"))

    def column(title: str, key: str, factor: float = 1.0, digits: int = 1, alone: bool = False) -> Column:
        values = [row.get(key) for row in rows.values()]
        if alone:  # costs: their spread says more about the machine than about the method
            values = [value and {**value, "std": None} for value in values]
        return Column(title, [spread(value, factor, digits, "±") for value in values])

    all_columns = [
        Column("method", [names[method] for method in rows]),
        column("forget %", "forget", 100),
        column("retain %", "retain", 100),
        column("test %", "test", 100),
        column("MIA AUC", "mia_auc", digits=2),
        column("ToW", "tow", digits=3),
        *(column(f"{rate.replace('wer', 'WER', 1).replace('_', ' ')} %", rate, 100) for rate in rates),
        column("steps", "steps", digits=0, alone=True),
        column("ms/step", "step_seconds", 1e3, alone=True),
        column("seconds", "seconds", alone=True),
        column("peak MiB", "peak_bytes", 2**-20, alone=True),
        Column("usable", [_usable(scenario["settings"].get(method, {})) for method in rows]),
    ]
    return [column for column in all_columns if any(column.cells)]


def table(scenario: Mapping[str, Any], titles: Mapping[str, str], width: int = WIDTH) -> Table:
    """Make a rich table of a scenario, one row per method in the order of titles ({method: title}).

    At most `width` columns wide: where there is less room some costs, which the JSON and the report have, are left out.
    Raises ValueError for a width below 1 and as `summarize` does, TypeError for one that is no integer.
    """
    from rich.console import Console

    width = check_integer("width", width, 1)
    shown = columns(scenario, titles)
    rows = summarize(scenario)  # a method may be known from the study alone
    bold = [method in orthograd_methods(scenario) for method in known(scenario, titles) if method in rows]
    console = Console(width=10 * width)  # does not wrap what is measured on it
    drop = iter(OPTIONAL)
    while console.measure(drawn := _draw(scenario, shown, bold)).maximum > width:
        title = next(drop, None)
        if title is None:
            break
        shown = [column for column in shown if column.title != title]
    return drawn


def caption(scenario: Mapping[str, Any]) -> str:
    """Say what the numbers are made of, in a sentence or two."""
    sizes = ", ".join(f"{count:,} {part}" for part, count in scenario["sizes"].items())
    text = f"{sizes} samples; {scenario['parameters']:,} parameters"
    if scenario["trainable"] != scenario["parameters"]:
        text += f", {scenario['trainable']:,} trainable"
    seeds = len(scenario["seeds"])
    text += f"; mean ± standard deviation over {seeds} seeds." if seeds > 1 else "; one seed, so no spread is known."
    text += f" Forget: {scenario['forget_title']}."
    return f"{text} Small: few samples or one seed." if scenario["small"] else text


def _draw(scenario: Mapping[str, Any], shown: list[Column], bold: list[bool]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    drawn = Table(
        title=scenario["title"],
        caption=caption(scenario),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    for i, column in enumerate(shown):
        drawn.add_column(column.title.replace("WER ", "WER\n"), justify="right" if i else "left", no_wrap=True)
    for cells, style in zip(zip(*(column.cells for column in shown), strict=True), bold, strict=True):
        drawn.add_row(*cells, style="bold" if style else "")
    return drawn


def _usable(setting: Mapping[str, Any]) -> str:
    """Write how many settings of the search worked: a method that needs luck shows it."""
    return f"{setting['usable']}/{setting['candidates']}" if {"usable", "candidates"} <= setting.keys() else ""
