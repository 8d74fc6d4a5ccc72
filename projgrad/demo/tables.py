"""The demo's console: tables and the notes under them."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .methods import TITLES
from .steps import METHODS

FORGET = {"digits": "wrong\nlabels %", "faces": "forgotten\nperson %"}  # short names of the forget share


def tables(results: dict[str, Any]) -> Iterator[Table | str]:
    """What to print, in order."""
    summary, sizes = results["summary"], results["sizes"]
    yield (
        f"{results['credit']}. {sizes['retain']} retain, {sizes['forget']} forget, {sizes['validation']} validation, "
        f"{sizes['test']} test samples; {sizes['parameters']:,} parameters; mean ± standard deviation over "
        f"{len(results['seeds'])} seed(s)."
    )
    yield _methods(results)
    yield summary["verdict"]
    if summary["panel"]:
        yield _panel(results)
    if summary["steps"]:
        yield _steps(summary["steps"])


def _methods(results: dict[str, Any]) -> Table:
    usable, count = results["chosen_by"].get("usable", {}), results["chosen_by"].get("candidates", {})
    table = _table(
        f"Unlearning, {results['settings']['orthograd']['n']} retain samples a step",
        ("method", FORGET[results["data"]], "retain %", "test %", "steps", "ms/step", "usable"),
    )
    for method, row in results["summary"]["methods"].items():
        steps = results["settings"].get(method, {}).get("steps", "")
        seconds = row["step_seconds"]
        cells = [_share(row[key]) for key in ("forget", "retain", "test")]
        tried = f"{usable[method]}/{count[method]}" if method in usable else ""
        style = "bold" if method == "orthograd" else ""
        table.add_row(TITLES[method], *cells, str(steps), f"{1e3 * seconds:.1f}" if seconds else "", tried, style=style)
    if usable:
        table.caption = (
            f"Settings: chosen on validation data, one search for every method ({results['chosen_by']['command']}). "
            f"Usable: settings of that search where it {results['chosen_by']['usable_means']}."
        )
    return table


def _panel(results: dict[str, Any]) -> Table:
    setting = results["panel_settings"][0]
    table = _table(
        f"What more retain gradients buy: α = {setting['alpha']}, lr {setting['lr']}, {setting['steps']} steps",
        ("n", FORGET[results["data"]], "retain %", "test %", "preserved\nnorm", "ms/step"),
    )
    for row in results["summary"]["panel"]:
        label = f"no projection, {row['n']}" if row["method"] == "neggrad" else str(row["n"])
        kept = "" if row["preserved_norm"] is None else f"{row['preserved_norm']:.2f}"
        cells = [_share(row[key]) for key in ("forget", "retain", "test")]
        table.add_row(label, *cells, kept, f"{1e3 * row['step_seconds']:.1f}")
    table.caption = "No projection: NegGrad+ with the same settings. Preserved norm: share of the ascent left to use."
    return table


def _steps(rows: list[dict[str, Any]]) -> Table:
    short = {"neggrad": "no proj.", "orthograd": "projgrad", "orthograd-qr": "QR"}
    units = {"seconds": ("ms", 1e3), "bytes": ("MiB", 2**-20)}
    columns = [f"{short[method]}\n{unit}" for unit, _ in units.values() for method in METHODS]
    table = _table("One whole step, the same batch and weights", ("n", *columns, "difference"))
    for row in rows:
        cells = [_number(row[key][method], factor) for key, (_, factor) in units.items() for method in METHODS]
        table.add_row(str(row["n"]), *cells, f"{row['relative_difference']:.1e}")
    table.caption = (
        "No projection: NegGrad+; projgrad: OrthoGrad on the tape; QR: OrthoGrad with the reference projector.\n"
        "MiB: peak memory above the loaded model. Difference: relative, between the two projected updates, worst seed."
    )
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _share(value: dict[str, float | None]) -> str:
    spread = "" if value["std"] is None else f"±{100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{spread}"


def _number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{factor * value:.1f}"
