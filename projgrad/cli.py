"""Command line: projgrad demo | doctor."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

MISSING = "this command needs the package {}: pip install 'projgrad[demo]', or `make build` in the repository"


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
    from .data import CREDITS

    parser = argparse.ArgumentParser(prog="projgrad", description="Gradient projection for machine unlearning.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="unlearn on real data and compare with the baselines (a minute or two)")
    demo.add_argument(
        "--data", choices=list(CREDITS), default="digits", help="wrong labels of digits, or one person's face"
    )
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON and the picture [%(default)s]")
    demo.add_argument("--seeds", type=_positive, default=3, help="number of seeds [%(default)s]")
    commands.add_parser("doctor", help="versions, and which kernels are available")
    args = parser.parse_args(argv)
    return _doctor() if args.command == "doctor" else _demo(args.data, args.out, args.seeds)


def _restart_with_passive_waiting() -> None:
    """OpenMP reads the variable when torch loads it, which `import projgrad` has done before any line here can run.

    On two shared cores small training steps took 184 ms with idle threads spinning and 12 ms with them sleeping.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _demo(data: str, out: Path, seeds: int) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .data import MissingData
    from .demo.job import Demo, default_plan
    from .demo.picture import draw
    from .demo.tables import tables

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=False), console=console) as progress:
        bar = progress.add_task("preparing")
        plan = default_plan(data, seeds)
        job = Demo(plan, out, lambda cost, what: progress.update(bar, advance=cost, description=what))
        progress.update(bar, total=job.expected_seconds)
        try:
            job.run()
        except MissingData as error:
            problem, code = str(error), 2
        except KeyboardInterrupt:
            problem, code = f"Interrupted: {len(job.results['runs'])} finished runs are in {job.path}", 130
        else:
            problem, code = "", 0
            progress.update(bar, completed=job.expected_seconds, description="done")
    if problem:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
        return code
    for part in tables(job.results):
        console.print(part, highlight=False)
    console.print(f"Every number: {job.path}\nPicture:      {draw(job.results, out)}", highlight=False, soft_wrap=True)
    return 0


def _doctor() -> int:
    from rich.console import Console
    from rich.table import Table

    from .demo.environment import environment

    found = environment()
    table = Table(show_header=False)
    extension = found.pop("extension")
    if extension is None:
        table.add_row("C++ extension", "not built: the plain PyTorch code runs instead, slower")
    else:
        table.add_row("C++ extension", ", ".join(f"{key} {value}" for key, value in extension.items()))
    for name, value in found.items():
        table.add_row(name, "absent" if value is None else str(value))
    Console().print(table, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
