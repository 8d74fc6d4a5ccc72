"""The committed results of `projgrad compare`: python -m bench.compare_results take OUT ... | check OUT

take: merge the scenarios of finished comparisons into bench/results/compare.json, without curves and histograms, and
draw what compares methods and numbers of retain samples. check: are the means of a new run within the spread of the
committed ones? Exits with 1 if not, or if a committed method or scenario is missing.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from projgrad.evaluate import draw, summarize
from projgrad.experiments.comparison.methods import TITLES
from projgrad.experiments.comparison.store import read_json, write_json

from .report import RESULTS

COMMITTED = RESULTS / "compare.json"
METRICS = ("forget", "retain", "test", "tow")
ROUNDING = 0.005  # half a point: one sample of a small part more or less


def results_in(folder: Path) -> dict[str, Any]:
    results = read_json(folder / "compare.json")
    if results is None:
        sys.exit(f"{folder} holds no compare.json: give the folder after --out of `projgrad compare`")
    return results


def take(folders: list[Path]) -> None:
    merged = read_json(COMMITTED) or {"scenarios": {}}
    for folder in folders:
        results = results_in(folder)
        if not results["finished"]:
            sys.exit(f"{folder}: the comparison is not finished; the same command goes on with it")
        for name, scenario in results["scenarios"].items():
            if scenario["skipped"]:
                continue
            for run in (*scenario["runs"], *scenario["study"]):
                run.pop("curve", None), run.pop("confidence", None)
            command = re.sub(r" --out(=| )\S+", "", results["command"])
            merged["scenarios"][name] = scenario | {"command": command, "environment": results["environment"]}
    write_json(COMMITTED, merged)
    with tempfile.TemporaryDirectory() as folder:
        for path in draw(merged, TITLES, Path(folder)):
            if path.stem == "overview" or path.stem.endswith("-study"):
                shutil.copy(path, RESULTS)


def differences(committed: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, float, float, float, bool]]:
    """Return (method, metric, committed mean, its spread, new mean, whether they agree) for all that both have."""
    before, after = summarize(committed), summarize(new)
    rows = []
    for method in before.keys() & after.keys():
        for metric in METRICS:
            a, b = before[method].get(metric), after[method].get(metric)
            if a and b:
                limit = max(a["std"] or 0.0, ROUNDING)
                rows.append((method, metric, a["mean"], limit, b["mean"], abs(a["mean"] - b["mean"]) <= limit))
    return sorted(rows)


def check(folder: Path) -> int:
    committed, new = read_json(COMMITTED), results_in(folder)
    table = Table("scenario", "method", "metric", "committed", "spread", "found", title="Outside the committed spread")
    console, count, wrong = Console(), 0, 0
    for name, scenario in new["scenarios"].items():
        if name not in committed["scenarios"] or scenario["skipped"]:
            console.print(f"{name}: not compared, {'skipped' if scenario['skipped'] else 'nothing is committed'}.")
            continue
        missing = sorted(summarize(committed["scenarios"][name]).keys() - summarize(scenario).keys())
        if missing:
            wrong, count = wrong + len(missing), count + len(missing)
            console.print(f"{name}: committed, and not found: {', '.join(missing)}.")
        for method, metric, before, limit, after, agrees in differences(committed["scenarios"][name], scenario):
            count += 1
            if not agrees:
                wrong += 1
                table.add_row(name, TITLES[method], metric, f"{before:.4f}", f"{limit:.4f}", f"{after:.4f}")
    if table.row_count:
        console.print(table)
    console.print(f"{count - wrong} of {count} means are within the spread of the committed ones.")
    return 1 if wrong or not count else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("take", "check"))
    parser.add_argument("out", type=Path, nargs="+", help="folders of `projgrad compare --out`")
    args = parser.parse_args()
    if args.what == "check":
        return max(check(folder) for folder in args.out)
    take(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
