"""Means and spreads over seeds, and what may be concluded from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean, stdev
from typing import Any, NamedTuple

from .._options import number
from ..ops.t_test import quantile

REFERENCES = ("original", "retrained")  # not contenders
# Of results that name none.
ORTHOGRAD_METHODS = ("orthograd", "orthograd-tensor", "orthograd-feasible", "orthograd-qr", "orthograd-metric")
COSTS = ("steps", "seconds", "step_seconds", "peak_bytes")
NAMES = {"tow": "ToW", "mia_auc": "MIA AUC", "uis": "UIS", "gap": "gap"}
CONFIDENCE = 0.95
BREAKDOWN = 0.1  # a spread of test accuracy this large means that some run was destroyed

Stats = dict[str, float | int | None]


class Difference(NamedTuple):
    """A paired difference over seeds; low and high: its 95 % t interval, None on one seed."""

    mean: float
    error: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def significant(self) -> bool:
        """True if zero is outside the interval; never on one seed."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def summarize(scenario: Mapping[str, Any]) -> dict[str, dict[str, Stats]]:
    """Return {method: {metric: {"mean", "std", "count"}}} over the seeds of a scenario's finished runs.

    Metrics are those of the runs' scores and steps, seconds, step_seconds, peak_bytes; what is None in a run does not
    count, std is the sample standard deviation, None for one seed.
    Raises ValueError where a number is NaN or Inf, or a scenario or a run lacks something.

    Example:
        >>> from projgrad.evaluate import summarize
        >>> runs = [{"method": "finetune", "seed": seed, "scores": {"test": 0.5 + seed}} for seed in (0, 1)]
        >>> summarize({"runs": runs})["finetune"]["test"]["mean"]
        1.0
    """
    return {method: _row(runs) for method, runs in _grouped(_runs(scenario), "method").items()}


def summarize_study(scenario: Mapping[str, Any]) -> dict[str, dict[int, dict[str, Stats]]]:
    """Return {method: {n: {metric: {"mean", "std", "count"}}}} of the n-study; n, retain samples a step, rises.

    Raises ValueError as `summarize` does.
    """
    methods = _grouped(_runs({"runs": (), **scenario}, "study", "n"), "method")
    return {
        method: {n: _row(group) for n, group in sorted(_grouped(runs, "n").items())} for method, runs in methods.items()
    }


def paired(scenario: Mapping[str, Any], first: str, second: str, metric: str = "tow") -> Difference | None:
    """Compare two methods seed by seed; None without a common seed.

    d = first - second in the metric, one for each seed; interval: d̄ ± t(0.975, seeds - 1) · sd(d) / √seeds

    Raises ValueError as `summarize` does.

    Example:
        >>> from projgrad.evaluate import paired
        >>> values = {"a": (0.8, 0.9, 0.7), "b": (0.7, 0.7, 0.7)}
        >>> runs = [
        ...     {"method": method, "seed": seed, "scores": {"tow": value}}
        ...     for method, column in values.items()
        ...     for seed, value in enumerate(column)
        ... ]
        >>> paired({"runs": runs}, "a", "b").significant  # 0.1 ± 0.25
        False
    """
    seeds = {
        method: {run["seed"]: value for run in runs if (value := _value(run, metric, run["scores"])) is not None}
        for method, runs in _grouped(_runs(scenario, "runs", "seed"), "method").items()
    }
    ours, theirs = seeds.get(first, {}), seeds.get(second, {})
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    mean, count = fmean(differences), len(differences)
    if count == 1:
        return Difference(mean, None, None, None, count)
    error = stdev(differences) / math.sqrt(count)
    half = quantile((1 - CONFIDENCE) / 2, count - 1) * error
    return Difference(mean, error, mean - half, mean + half, count)


def ranked(scenario: Mapping[str, Any], metric: str = "tow") -> list[str]:
    """Return the methods by their mean of a metric, best first, without references and those it is unknown for."""
    rows = summarize(scenario)
    known = [method for method, row in rows.items() if method not in REFERENCES and metric in row]
    return sorted(known, key=lambda method: rows[method][metric]["mean"], reverse=not lower_is_better(metric))


def lower_is_better(metric: str) -> bool:
    return metric in ("gap", "uis") or metric.startswith("wer")


def orthograd_methods(scenario: Mapping[str, Any]) -> Collection[str]:
    """Return the names of OrthoGrad and its variants; older results do not give them, and have `ORTHOGRAD_METHODS`."""
    return scenario.get("orthograd_methods", ORTHOGRAD_METHODS)


def differences(scenario: Mapping[str, Any], metric: str = "tow") -> list[tuple[str, str, Difference]]:
    """Return (variant, best other method, difference) for every OrthoGrad variant."""
    order, variants = ranked(scenario, metric), orthograd_methods(scenario)
    best = next((method for method in order if method not in variants), None)
    pairs = [(method, best) for method in order if best and method in variants]
    rows = [(*pair, paired(scenario, *pair, metric)) for pair in pairs]
    return [row for row in rows if row[2] is not None]


def verdict(scenario: Mapping[str, Any], titles: Mapping[str, str], metric: str = "tow") -> str:
    """Say who is best by a metric, and whether that is beyond the spread over seeds. Generated, whatever it says."""
    order, name, variants = ranked(scenario, metric), NAMES.get(metric, metric), orthograd_methods(scenario)
    ours = next((method for method in order if method in variants), None)
    other = next((method for method in order if method not in variants), None)
    if ours is None or other is None:
        return f"Not enough finished runs to compare by {name}."
    rows, titles = summarize(scenario), known(scenario, titles)
    first, second = sorted((ours, other), key=order.index)
    role = "the best other method" if first == ours else "the best OrthoGrad variant"
    text = f"By {name}, {titles[first]} is best with {spread(rows[first][metric])}; {role} ({titles[second]}) "
    text += f"reaches {spread(rows[second][metric])}. {_judgement(paired(scenario, ours, other, metric))}"
    return " ".join([text, *_cautions(scenario, rows, titles)])


def _judgement(difference: Difference | None) -> str:
    if difference is None:
        return "They share no seed, so nothing can be said about the difference."
    text = f"OrthoGrad's paired difference is {difference.mean:+.3f}"
    if difference.low is None:
        return f"{text} on one seed, so without a spread to judge it by."
    text += f" over {difference.count} seeds, 95 % interval {difference.low:+.3f} to {difference.high:+.3f}"
    if difference.significant:
        return f"{text}: beyond the spread over seeds."
    return f"{text}: not significant, the two cannot be told apart."


def _cautions(scenario: Mapping[str, Any], rows: dict[str, dict], titles: Mapping[str, str]) -> Iterable[str]:
    broken = [
        titles[method]
        for method, row in rows.items()
        if method not in REFERENCES and (row.get("test", {}).get("std") or 0) > BREAKDOWN
    ]
    if broken:
        yield f"Broke down on some seeds and not seen at its best: {', '.join(broken)}."
    stopped = _grouped((run for run in scenario["runs"] if run.get("stopped")), "method")
    if stopped:
        tried = _grouped(scenario["runs"], "method")
        counts = (f"{titles[method]} ({len(runs)} of {len(tried[method])})" for method, runs in stopped.items())
        yield f"Stopped early, last good model scored: {', '.join(counts)}."
    if scenario.get("small"):
        yield "Small: few samples or one seed."


def known(scenario: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, str]:
    """Return titles of the methods that have runs, in display order; a method without a title keeps its name."""
    runs = [*scenario["runs"], *(scenario.get("study") or ())]
    present = dict.fromkeys(run["method"] for run in runs)
    return {method: title for method, title in titles.items() if method in present} | {
        method: method for method in present if method not in titles
    }


def spread(value: Stats | None, factor: float = 1.0, digits: int = 3, joint: str = " ± ") -> str:
    """Write mean ± standard deviation; empty where there is nothing."""
    if value is None:
        return ""
    after = "" if value["std"] is None else f"{joint}{factor * value['std']:.{digits}f}"
    return f"{factor * value['mean']:.{digits}f}{after}"


def _grouped(runs: Iterable[dict], key: str) -> dict[Any, list[dict]]:
    groups: dict[Any, list[dict]] = {}
    for run in runs:
        groups.setdefault(run[key], []).append(run)
    return groups


def _runs(scenario: Mapping[str, Any], key: str = "runs", *wanted: str) -> Iterable[Mapping[str, Any]]:
    """Check that a scenario's runs have what they are grouped and averaged by, and return them."""
    if not isinstance(scenario, Mapping) or "runs" not in scenario:
        raise ValueError(f'a scenario should be a dictionary with its runs under "runs"; got {type(scenario).__name__}')
    runs = scenario.get(key) or ()
    for run in runs:
        missing = [name for name in ("method", "scores", *wanted) if name not in run]
        if missing:
            raise ValueError(f"a run should have {' and '.join(missing)}; it has {', '.join(run)}")
    return runs


def _value(run: Mapping[str, Any], metric: str, values: Mapping[str, Any]) -> float | int | None:
    """Return a metric of a run; None where it is unknown, or no number such as a histogram."""
    value = number(values.get(metric))
    if value is not None and not math.isfinite(value):
        raise ValueError(
            f"{metric} of {run['method']}, seed {run.get('seed')}, is {value}, and so would be its mean. Write None "
            "for what is not known"
        )
    return value


def _row(runs: list[dict]) -> dict[str, Stats]:
    row: dict[str, Stats] = {}
    merged = [(run, {**run["scores"], **{key: run.get(key) for key in COSTS}}) for run in runs]
    for metric in dict.fromkeys(key for _, values in merged for key in values):
        values = [value for run, scores in merged if (value := _value(run, metric, scores)) is not None]
        if values:
            std = stdev(values) if len(values) > 1 else None
            row[metric] = {"mean": fmean(values), "std": std, "count": len(values)}
    return row
