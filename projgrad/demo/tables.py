"""The demo's console: tables and the notes under them."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .methods import TITLES

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
    if summary["projection"]:
        yield _projection(summary["projection"])


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


def _projection(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        f"The projection alone, on the same gradients: p = {rows[0]['p']:,}",
        ("n", "QR ms", "projgrad\nms", "faster", "QR MiB", "projgrad\nMiB", "smaller", "difference"),
    )
    for row in rows:
        seconds, memory = row["seconds"], row["bytes"]
        cells = [f"{1e3 * seconds['qr']:.1f}", f"{1e3 * seconds['projgrad']:.1f}"]
        cells.append(f"{seconds['qr'] / seconds['projgrad']:.1f} x")
        cells += [_mebibytes(memory["qr"]), _mebibytes(memory["projgrad"])]
        cells.append(f"{memory['qr'] / memory['projgrad']:.0f} x" if memory["qr"] and memory["projgrad"] else "")
        table.add_row(str(row["n"]), *cells, f"{row['relative_difference']:.1e}")
    table.caption = "MiB: peak memory beyond the gradients. Difference: relative, between the two updates, worst seed."
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _share(value: dict[str, float | None]) -> str:
    spread = "" if value["std"] is None else f"±{100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{spread}"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"
