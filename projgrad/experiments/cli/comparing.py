"""projgrad demo and projgrad compare."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from ...evaluate import draw, summarize, table, verdict, write_report
from ...evaluate.problem import MissingData
from ..comparison.comparison import Comparison, ComparisonPlan, make_plan
from ..comparison.methods import METHODS, TITLES
from ..scenarios import FAST, SCENARIOS
from ..starting import working
from .arguments import DEMOS, unknown
from .problems import Unusable, check_folder, check_packages
from .terminal import bar, console, print_json


def compare(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args.json)
    possible = [name for name, scenario in SCENARIOS.items() if not scenario.gpu or torch.cuda.is_available()]
    names = args.scenario or (FAST if args.fast else possible)
    for given, known, what in ((names, SCENARIOS, "scenario"), (args.methods or (), METHODS, "method")):
        if wrong := sorted(set(given) - set(known)):
            args.error(unknown(what, wrong, list(known)))
    methods = None if args.methods is None else tuple(args.methods)
    command = "projgrad " + shlex.join(sys.argv[1:])
    return _work(make_plan(command, tuple(names), args.seeds, methods, study=args.study), args.out, args.json)


def demo(args: argparse.Namespace) -> int:
    if args.data == "facts":
        from ..facts_demo import show

        working()
        try:
            with bar() as progress:
                return show(console(sys.stdout), progress, print_json if args.json else None)
        except MissingData as missing:
            raise Unusable(f"the demo of a language model lacks packages: {missing}") from None
    name, methods = DEMOS[args.data], ("ascent", "finetune", "neggrad", "orthograd", "orthograd-qr")
    return _work(make_plan("projgrad demo", (name,), args.seeds, methods), args.out / f"demo-{args.data}", args.json)


def _work(plan: ComparisonPlan, out: Path, as_json: bool) -> int:
    """Run a plan with a progress bar; show tables, pictures and a report of whatever finished."""
    check_packages("rich", "matplotlib", "jinja2")
    check_folder(out)
    working()
    with bar() as progress:
        task = progress.add_task("preparing")
        comparison = Comparison(plan, out, lambda cost, what: progress.update(task, advance=cost, description=what))
        progress.update(task, total=comparison.expected_seconds)
        try:
            comparison.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: what is finished is in {out}, and the same command goes on from there"
            ) from None
        progress.update(task, completed=comparison.expected_seconds, description="done")
    scenarios = comparison.results["scenarios"]
    output = console(sys.stdout)
    for scenario in () if as_json else scenarios.values():
        if scenario["skipped"]:
            output.print(f"{scenario['title']}: skipped. {scenario['skipped']}", markup=False, soft_wrap=True)
        else:
            output.print(table(scenario, TITLES, output.width), verdict(scenario, TITLES), highlight=False)
    report = None
    if not all(scenario["skipped"] for scenario in scenarios.values()):
        draw(comparison.results, TITLES, out)
        report = write_report(comparison.results, TITLES, out / "report.html")
    if as_json:
        about = {name: _summary(scenario) for name, scenario in scenarios.items()}
        print_json({"results": str(comparison.path), "report": report and str(report), "scenarios": about})
    elif report:
        output.print(f"Every number: {comparison.path}\nReport:       {report}", highlight=False, soft_wrap=True)
    return 0 if report else 2


def _summary(scenario: dict[str, Any]) -> dict[str, Any]:
    """Return what the table and the line below it say; of every number mean, std and count."""
    about = {key: scenario[key] for key in ("title", "skipped", "seeds")}
    if not scenario["skipped"]:
        about |= {"methods": summarize(scenario), "verdict": verdict(scenario, TITLES)}
    return about


def _list(as_json: bool) -> int:
    missing = {name: scenario.missing() for name, scenario in SCENARIOS.items()}
    if as_json:
        about = {
            name: {"title": SCENARIOS[name].title, "installed": not commands, "install": commands}
            for name, commands in missing.items()
        }
        print_json({"scenarios": about, "methods": {method: TITLES[method] for method in METHODS}})
        return 0
    for name, commands in missing.items():
        lines = "".join(f"\n    {command}" for command in commands)
        print(f"{name}: {SCENARIOS[name].title}; {f'not installed; run:{lines}' if commands else 'installed'}")
    print("Methods: " + ", ".join(METHODS))
    return 0
