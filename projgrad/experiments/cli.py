"""Command line: projgrad demo | compare | plan | doctor."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from .comparison.comparison import ComparisonPlan

MOST_SEEDS = 95  # settings were searched on seeds from 100
DEMOS = {"digits": "digits-labels", "faces": "faces"}
WITHOUT_EXTENSION = "absent: everything works, slower; to have it install projgrad again where there is a C++ compiler"
MISSING = "this command needs the package {}: `make build`, or pip install '.[demo]', in the repository"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad arguments or missing data, 130 after Ctrl-C."""
    if argv is None:
        _restart_with_passive_waiting()
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        print(f"projgrad: {MISSING.format(error.name)}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="projgrad", description="Gradient projection for machine unlearning.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="unlearn on real data and compare with the baselines (a minute or two)")
    kinds = "wrong labels, a person's face, or facts in a language model (prints its answers; five minutes)"
    demo.add_argument("--data", choices=[*DEMOS, "facts"], default="digits", help=kinds)
    _common(demo, "out")
    compare = commands.add_parser("compare", help="every tuned method on real data; what is finished is not run again")
    compare.add_argument("--scenario", nargs="+", metavar="NAME", help="some of those that --list shows [all]")
    compare.add_argument("--fast", action="store_true", help="three small scenarios, below ten minutes on two cores")
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="some of those that --list shows [all]")
    compare.add_argument("--study", action="store_true", help="also vary the number of retain samples a step")
    compare.add_argument("--list", action="store_true", help="show scenarios and methods, and what is installed")
    _common(compare, "out/compare")
    _add_plan(commands.add_parser("plan", help="memory and work of a step, before anything is allocated"))
    commands.add_parser("doctor", help="versions, and which kernels are available")
    args = parser.parse_args(argv)
    if args.command == "doctor":
        return _doctor()
    if args.command == "plan":
        return _plan(args, parser)
    return _demo(args) if args.command == "demo" else _compare(args, parser)


def _common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for results and pictures [%(default)s]")
    parser.add_argument("--seeds", type=_seeds, default=3, help="number of seeds [%(default)s]")


def _restart_with_passive_waiting() -> None:
    """Start again with OMP_WAIT_POLICY set, which OpenMP read when torch was loaded, before any line here could run.

    On two shared cores small training steps took 184 ms with idle threads spinning and 12 ms with them sleeping.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _seeds(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"must be at least 1 and at most {MOST_SEEDS}; got {value}")
    return value


def _compare(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from .comparison.comparison import make_plan
    from .comparison.methods import METHODS
    from .scenarios import FAST, SCENARIOS

    if args.list:
        return _list()
    possible = [name for name, scenario in SCENARIOS.items() if not scenario.gpu or torch.cuda.is_available()]
    names = args.scenario or (FAST if args.fast else possible)
    for given, known, what in ((names, SCENARIOS, "scenario"), (args.methods or (), METHODS, "method")):
        if unknown := set(given) - set(known):
            parser.error(f"no {what} named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    methods = None if args.methods is None else tuple(args.methods)
    command = "projgrad " + shlex.join(sys.argv[1:])
    return _work(make_plan(command, tuple(names), args.seeds, methods, study=args.study), args.out)


def _demo(args: argparse.Namespace) -> int:
    if args.data == "facts":
        return _demo_facts()
    from .comparison.comparison import make_plan

    name, methods = DEMOS[args.data], ("ascent", "finetune", "neggrad", "orthograd", "orthograd-qr")
    return _work(make_plan("projgrad demo", (name,), args.seeds, methods), args.out / f"demo-{args.data}")


def _demo_facts() -> int:
    from .facts_demo import show

    with _progress() as progress:
        return show(progress.console, progress)


def _progress() -> Progress:
    """Make a progress bar with the time that has passed and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console() if sys.stdout.isatty() else Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
    return Progress(*columns, TimeRemainingColumn(elapsed_when_finished=False), console=console)


def _work(plan: ComparisonPlan, out: Path) -> int:
    """Run a plan with a progress bar; show tables, pictures and a report of whatever finished."""
    from ..evaluate import draw, table, verdict, write_report
    from .comparison.comparison import Comparison
    from .comparison.methods import TITLES

    with _progress() as progress:
        console = progress.console
        bar = progress.add_task("preparing")
        comparison = Comparison(plan, out, lambda cost, what: progress.update(bar, advance=cost, description=what))
        progress.update(bar, total=comparison.expected_seconds)
        try:
            comparison.run()
        except KeyboardInterrupt:
            console.print(f"Interrupted: what is finished is in {out}, and the same command goes on from there.")
            return 130
        progress.update(bar, completed=comparison.expected_seconds, description="done")
    scenarios = comparison.results["scenarios"].values()
    for scenario in scenarios:
        if scenario["skipped"]:
            console.print(f"{scenario['title']}: skipped. {scenario['skipped']}", markup=False, soft_wrap=True)
        else:
            console.print(table(scenario, TITLES, console.width), verdict(scenario, TITLES), highlight=False)
    if all(scenario["skipped"] for scenario in scenarios):
        return 2
    draw(comparison.results, TITLES, out)
    report = write_report(comparison.results, TITLES, out / "report.html")
    console.print(f"Every number: {comparison.path}\nReport:       {report}", highlight=False, soft_wrap=True)
    return 0


def _list() -> int:
    from .comparison.methods import METHODS
    from .scenarios import SCENARIOS

    for name, scenario in SCENARIOS.items():
        commands = "".join(f"\n    {command}" for command in scenario.missing())
        state = f"not installed; run:{commands}" if commands else "installed"
        print(f"{name}: {scenario.title}; {state}")
    print("Methods: " + ", ".join(METHODS))
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        help="a config.json of transformers, its folder, a name such as Llama-3.2-1B or gpt2, or module:function",
    )
    parser.add_argument("--n", type=_positive, required=True, help="retain samples a step, and as many to forget")
    parser.add_argument("--tokens", type=_positive, default=512, help="of a sample [%(default)s]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="[%(default)s]")
    optimizers = ("sgd", "momentum", "adam", "adamw", "rmsprop")
    parser.add_argument("--optimizer", choices=optimizers, default="adamw", help="[%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[%(default)s]")
    parser.add_argument("--lora", type=_positive, default=0, metavar="R", help="train adapters of this rank alone")
    parser.add_argument(
        "--loss",
        choices=("chunked", "float32"),
        default="chunked",
        help="float32: of all logits at once, as models of transformers compute it [%(default)s]",
    )
    parser.add_argument("--memory", type=_gigabytes, metavar="GB", help="also find the largest n that fits")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be positive and finite; got {text}")
    return value


def _plan(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what a step takes, in every way."""
    import json

    from .plan.plan import make_plan, rows, sentence
    from .plan.subjects import Unknown

    given = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    is_watched = sys.stderr.isatty() and not args.json

    def notify(what: str) -> None:
        if is_watched:
            print(f"\r{what:<78}", end="\r", file=sys.stderr, flush=True)

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a function of the user prints
            plan = make_plan(**given, notify=notify)
    except (Unknown, ImportError) as error:
        parser.error(str(error))
    finally:
        notify("")
    if args.json:
        print(json.dumps(plan))
        return 0
    heads = ["GB", "GB, first step", "x plain", "Tflop", "x plain", *(["largest n"] if args.memory else [])]
    for title, *cells in [("", *heads), *rows(plan)]:
        print(f"{title:<47}", *(f"{cell:>{max(9, len(head))}}" for cell, head in zip(cells, heads, strict=True)))
    print(sentence(plan))
    return 0


def _doctor() -> int:
    """Print versions and hardware; needs no package beyond those that projgrad requires."""
    from .comparison.environment import environment

    about = environment()
    extension = about.pop("extension")
    build = WITHOUT_EXTENSION if extension is None else ", ".join(f"{k} {v}" for k, v in extension.items())
    for name, value in {"C++ extension": build, **about}.items():
        print(f"{name:16}{'absent' if value is None else value}")
    return 0
