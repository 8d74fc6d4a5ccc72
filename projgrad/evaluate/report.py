"""The whole comparison as one HTML file that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._atomic import replacing
from .pictures import PICTURES, overview
from .style import svg
from .summary import CONFIDENCE, NAMES, differences, known, orthograd_methods, spread, summarize, verdict
from .tables import caption, columns

TEMPLATE = Path(__file__).with_name("report.html.j2")
CAPTIONS = {
    "overview": "What each method leaves of the forget set and of the test accuracy, ± spread over seeds.",
    "tradeoff": "Forgetting against what stays known, at the end. As near as possible to the retrained model is best.",
    "curves": "On the way, mean over seeds. Preserved norm: share of the forget gradient that the projection leaves, "
    "near 1 it does nothing. Residual: largest cosine between the update and a retain gradient.",
    "confidences": "Probability given to the labels of forget and of test samples, all seeds together. Forget samples "
    "that look like the retrained model's give nothing away.",
    "study": "More retain samples in a step: accuracy and cost.",
}


def write_report(results: Mapping[str, Any], titles: Mapping[str, str], path: Path | str) -> Path:
    """Write the report, atomically; returns the path.

    results: the comparison as plain values; scenarios that were skipped, or are not finished, are shown as such.
    titles: {method: title}, in the order of the tables.
    """
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = page.from_string(TEMPLATE.read_text(encoding="utf-8"))
    scenarios = results["scenarios"]
    text = template.render(
        results=results,
        environment=_flat(results["environment"]),
        overview=_figure("overview", overview(results, titles), ""),
        scenarios={name: _scenario(name, s, titles) for name, s in scenarios.items() if not s["skipped"] and s["runs"]},
        skipped={name: s for name, s in scenarios.items() if s["skipped"]},
        waiting=[s["title"] for s in scenarios.values() if not s["skipped"] and not s["runs"]],
        level=round(100 * CONFIDENCE),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _scenario(name: str, scenario: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    names = known(scenario, titles)
    cells = columns(scenario, titles)
    return {
        "title": scenario["title"],
        "credit": scenario["credit"],
        "small": scenario["small"],
        "caption": caption(scenario),
        "verdict": verdict(scenario, titles),
        "header": [column.title for column in cells],
        "rows": list(zip(*(column.cells for column in cells), strict=True)),
        "ours": [method in orthograd_methods(scenario) for method in names if method in summarize(scenario)],
        "figures": [f for key, draw in PICTURES.items() if (f := _figure(key, draw(scenario, titles), name))],
        "differences": [
            (names[a], names[b], f"{d.mean:+.3f}", _interval(d), d.count, "yes" if d.significant else "no")
            for a, b, d in differences(scenario)
        ],
        "settings": [(names.get(method, method), _listed(setting)) for method, setting in scenario["settings"].items()],
        "scores": _scores(scenario, names),
        "stopped": [(names[r["method"]], r["seed"], r["stopped"]) for r in scenario["runs"] if r.get("stopped")],
    }


def _figure(key: str, figure: Any, name: str) -> dict[str, Any] | None:
    from markupsafe import Markup

    if figure is None:
        return None
    return {"svg": Markup(svg(figure, f"{name}-{key}")), "caption": CAPTIONS[key], "wide": figure.get_figwidth()}


def _scores(scenario: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that was measured, whether the table above has it or not."""
    rows = summarize(scenario)
    metrics = list(dict.fromkeys(key for row in rows.values() for key in row))
    return {
        "header": ["method", *(NAMES.get(metric, metric.replace("_", " ")) for metric in metrics)],
        "rows": [
            [names[method], *(spread(rows[method].get(metric), digits=_digits(metric)) for metric in metrics)]
            for method in names
            if method in rows
        ],
    }


def _digits(metric: str) -> int:
    return 0 if metric in ("steps", "peak_bytes") else 4


def _interval(difference: Any) -> str:
    return "unknown" if difference.low is None else f"{difference.low:+.3f} to {difference.high:+.3f}"


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: "not there" if value is None else _listed(value) if isinstance(value, Mapping) else str(value)
        for key, value in values.items()
    }


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
