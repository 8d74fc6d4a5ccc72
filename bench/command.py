"""What the commands share: options, deadlines, and rows that are measured until the time is up."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from projgrad.experiments.benchmark.harness import DEVICE, is_out_of_memory, release
from projgrad.experiments.benchmark.report import Rows

from .report import RESULTS

ROOT = Path(__file__).parent.parent


def chosen_device() -> str:
    """Return the --device of the command line, by default "cpu"; what else it says is for the parser of that device."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_device(parser, "cpu")
    return parser.parse_known_args()[0].device


def add_device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"what to measure on [{default}]")


def arguments(description: str, *more: tuple[str, dict], default: str = "cuda") -> argparse.Namespace:
    """Parse the command line of a part of bench/gpu.sh. Without a GPU only tiny sizes run."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add_device(parser, default)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=480.0, help="no case is begun after this")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU: for tests")
    for name, options in more:
        parser.add_argument(name, **options)
    args = parser.parse_args()
    if args.device == "cuda" and DEVICE != "cuda" and not args.tiny:
        raise SystemExit("no CUDA device; --tiny runs the logic on the CPU")
    return args


def started(main: Callable[[], object]) -> None:
    """Run a command so that SIGTERM, which a time limit sends, ends its worker processes too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()


class Deadline:
    """The end of a part's time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def passed(self, what: str) -> bool:
        if self.left() > 0:
            return False
        print(f"not measured, the time is up: {what}", flush=True)
        return True


def rows_of(part: str, args: argparse.Namespace, columns: tuple[str, ...], key: tuple[str, ...]) -> Rows:
    """Return the file of a part on a GPU.

    Rows measured before on this device stay, in the folder at hand or else in the repository's results.
    """
    name = f"gpu_{part}{'_tiny' if args.tiny else ''}.csv"
    return Rows(args.out / name, columns, key, DEVICE, () if args.tiny else (RESULTS / name,))


def run(plan: Iterable[tuple[dict, Callable[[], Iterable[dict]]]], rows: Rows, deadline: Deadline) -> int:
    """Add the rows of everything that is planned until the time is up; 1 if a result of ours is wrong or missing."""
    failed = 0
    for about, make_rows in plan:
        if deadline.passed(title(about)):
            continue
        try:
            for row in make_rows():
                rows.add(row)
                failed |= str(row["contender"]).startswith("projgrad") and bool(row.get("note"))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows.add({**about, "contender": "inputs and truth", "note": "out of memory"})
        release()
    return int(failed)


def title(about: dict) -> str:
    return " ".join(map(str, about.values()))
