"""`projgrad bench`: how long a step takes here, how much memory, and beside whom."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ops import OpCase
    from .steps import Task
    from .store import Store

MODELS = ("mlp", "conv", "decoder", "encoder")  # of `subjects`, which imports torch
OPS = ("project_out", "gram_solve", "feasible", "linear_gram", "linear_dot", "linear_combine", "linear_moments")
OPS += ("basis_project", "gram", "subtract")
LETTERS = {"t": "positions", "i": "inputs of a layer", "o": "its outputs", "p": "parameters", "k": "basis vectors"}
EPILOG = """\
examples:
  projgrad bench                          the built-in models, every contender
  projgrad bench mine:make --threads 4    your model and batch: make() returns (model, forget, retain)
                                          or these and an optimizer; closures as for OrthoGrad.step
  projgrad bench mlp --n 8 32 128         one model, by the number of retain samples
  projgrad bench ops --op linear_gram --n 8 64 --t 128
  projgrad bench mlp --compare out/before/steps.csv

Results go to steps.csv, steps.json and steps.svg (ops.* of ops) in the folder --out. What is there
already, measured on the same machine and versions, is not measured again. The JSON file is one that
`pytest-benchmark compare` reads. Exit code 1: a result of projgrad is wrong or missing.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `projgrad bench` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    listed = f"ops, {', '.join(MODELS)}, module:function or file.py:function [{' '.join(MODELS)}]"
    parser.add_argument("what", nargs="*", metavar="WHAT", help=listed)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="your own model is there [%(default)s]"
    )
    dtypes = ("float32", "bfloat16", "float16", "float64")
    about = f"some of {', '.join(dtypes)} [float32; of your own model: what it has]"
    parser.add_argument("--dtype", nargs="+", choices=dtypes, metavar="TYPE", help=about)
    own = "retain samples [64 or 32; of your own model what it says, else it gets n]"
    parser.add_argument("--n", nargs="+", type=_positive, metavar="N", help=own)
    for letter, name in LETTERS.items():
        parser.add_argument(f"--{letter}", nargs="+", type=_positive, metavar="N", help=f"of ops: {name}")
    parser.add_argument("--op", nargs="+", choices=OPS, metavar="NAME", help=f"of ops: some of {', '.join(OPS)} [all]")
    parser.add_argument("--gram", action="store_true", help="K of the retain batch alone instead of the whole step")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="some of those that a first run shows [all]")
    parser.add_argument("--threads", type=_positive, help="of the CPU [what torch would take]")
    parser.add_argument("--rounds", type=_positive, default=15, help="times of every contender, at most [%(default)s]")
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="about, of every contender [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results [%(default)s]")
    parser.add_argument("--again", action="store_true", help="measure what is there already once more")
    parser.add_argument("--compare", type=Path, metavar="CSV", help="an older steps.csv or ops.csv: what has changed?")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and nothing else")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be positive and finite; got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; return the exit code: 1 for a wrong result of projgrad, 2 for what cannot be done."""
    from .subjects import Refused

    try:
        return _run(args)
    except (Refused, OSError) as error:
        print(f"projgrad bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"Interrupted: what is finished is in {args.out}, and the same command goes on from there.", file=sys.stderr
        )
        return 130


def _run(args: argparse.Namespace) -> int:
    import torch

    from .changes import read_older
    from .machine import environment

    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.what or list(MODELS)
    _check(args, names)
    old = read_older(args.compare) if args.compare else None  # before it may be written anew
    about = environment(args.device) | {"threads": str(torch.get_num_threads())}
    with contextlib.ExitStack() as stack:
        return _work(args, names, about, old, stack)


def _work(
    args: argparse.Namespace,
    names: list[str],
    about: dict[str, str],
    old: list[dict] | None,
    stack: contextlib.ExitStack,
) -> int:
    from .show import LEGEND, Progress, op_table, step_table, wrapped

    stores: dict[str, Store] = {}
    work = list(_plan(args, names, about, stores, stack))
    if not args.json:
        print(wrapped(", ".join(f"{key} {value}" if key != "device" else value for key, value in about.items())))
    progress, failed, shown, seen = Progress(len(work)), False, {}, set()
    for title, kind, is_done, measure in work:
        progress.show(title)
        rows = is_done()
        fresh = rows is None
        if rows is None:
            rows = measure(lambda text, title=title: progress.show(f"{title}: {text}"))
            stores[kind].add(rows)
            rows = stores[kind].held(rows)
        progress.done += 1
        progress.clear()
        failed |= any(_is_missing(row) for row in rows)
        shown.setdefault(kind, []).extend(rows)
        if args.json:
            continue
        tables = {}
        for row in rows:
            tables.setdefault((row.get("op"), row.get("size")), []).append(row)
        for table in tables.values():
            print("\n" + (step_table(table) if kind == "steps" else op_table(table)) + ("" if fresh else "  (kept)"))
        seen.update(row.get("what", "op") for row in rows)
    if args.json:
        print(json.dumps([{k: v for k, v in row.items() if k != "times"} for rows in shown.values() for row in rows]))
        return int(failed)
    for name in sorted(seen):
        print("\n" + wrapped(LEGEND[name]))
    for store in stores.values():
        if store.rows:
            print(_files(store, about))
    if old is not None:
        print()
        for line in _changes(old, shown, stores, args.compare):
            print(wrapped(line.strip(), "  " if line.startswith(" ") else ""))
    return int(failed)


def _is_missing(row: dict) -> bool:
    """Return whether a result of projgrad is wrong or missing, other than where it says that it cannot be."""
    ours = str(row["contender"]).startswith("projgrad")
    return ours and not row["ms"] and not str(row["note"]).startswith("not run: ")


def _check(args: argparse.Namespace, names: list[str]) -> None:
    """Refuse what no case can be made of."""
    import torch

    from .step_worker import contenders
    from .subjects import Refused

    if args.device == "cuda" and not torch.cuda.is_available():
        raise Refused("there is no CUDA device: --device cpu, or python -m projgrad doctor")
    for name in names:
        if name not in (*MODELS, "ops") and ":" not in name:
            raise Refused(f"nothing named {name}; there are ops, {', '.join(MODELS)}, or give module:function")
    known = contenders(args.gram)
    if unknown := set(args.contenders or ()) - set(known):
        raise Refused(f"no contender named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.n and min(args.n) < 2 and names != ["ops"]:
        raise Refused("--n must be at least 2: with one retain sample there is nothing to compare")
    if args.out.exists() and not args.out.is_dir():
        raise Refused(f"--out {args.out} is a file; give a folder")
    letters = [f"--{letter}" for letter in LETTERS if getattr(args, letter)] + ["--op"] * bool(args.op)
    if letters and "ops" not in names:
        raise Refused(f"{', '.join(letters)}: of ops alone; projgrad bench ops {' '.join(letters)} ...")


Item = tuple  # title, kind, function that returns finished rows or None, function that measures


def _plan(
    args: argparse.Namespace,
    names: list[str],
    about: dict[str, str],
    stores: dict[str, Store],
    stack: contextlib.ExitStack,
) -> Iterator[Item]:
    """Yield what is to be done."""
    from . import ops, steps
    from .store import Store

    for name in names:
        kind, columns, key = ("ops", ops.COLUMNS, ops.KEY) if name == "ops" else ("steps", steps.COLUMNS, steps.KEY)
        if kind not in stores:
            stores[kind] = Store(args.out, kind, columns, key, about)
            if (damaged := stores[kind].damaged) and not args.json:
                print(f"{stores[kind].json} was damaged: it is now {damaged}, and everything is measured again")
        yield from _ops(args, stores[kind], stack) if name == "ops" else _steps(args, name, stores[kind])


def _ops(args: argparse.Namespace, store: Store, stack: contextlib.ExitStack) -> Iterator[Item]:
    import torch

    from .ops import Team, cases, measure_op

    device, team = args.device, stack.enter_context(Team(args.device, torch.get_num_threads()))
    sizes = {letter: getattr(args, letter) or [] for letter in ("n", *LETTERS)}

    def measure(case: OpCase) -> Callable:
        return lambda _: measure_op(case, team, args.rounds, args.seconds)

    for case in cases(args.op or OPS, sizes, args.dtype or ["float32"], device):

        def done(case: OpCase = case) -> list[dict] | None:
            about = {"size": case.shown_size(), "dtype": case.dtype, "on": device}
            found = store.find(about)
            rows = [row for row in found if row["op"] in case.ops()]
            finished = all(any(row["op"] == op and row["ms"] for row in rows) for op in case.ops())
            return rows if finished and not args.again else None

        yield case.title, "ops", done, measure(case)


def _steps(args: argparse.Namespace, name: str, store: Store) -> Iterator[Item]:
    import torch

    from . import step_worker, steps
    from .subjects import is_own, source

    known = step_worker.contenders(args.gram)
    wanted = {key: value for key, value in known.items() if not args.contenders or key in (*args.contenders, "plain")}
    dtypes, device = args.dtype or [None if is_own(name) else "float32"], args.device
    for n, dtype in itertools.product(args.n or [None], dtypes):
        task = step_worker.Task(name, n, dtype, device, torch.get_num_threads(), args.gram)

        def done(task: Task = task) -> list[dict] | None:
            about = {
                "what": steps.what(args.gram),
                "case": name,
                "source": source(name),
                "asked_n": task.n,
                "on": device,
            }
            about |= {"dtype": task.dtype} if task.dtype else {}
            rows = [row for row in store.find(about) if row["contender"] in wanted]
            names = {row["contender"] for row in rows if not _could_run(row, known)}
            return rows if names == set(wanted) and not args.again else None

        def measure(tick: Callable[[str], None], task: Task = task) -> list[dict]:
            return steps.measure_steps(task, wanted, args.rounds, args.seconds, tick, steps.start_worker)

        title = " ".join(str(part) for part in (name, task.n and f"n = {task.n}", task.dtype) if part)
        yield title, "steps", done, measure


def _could_run(row: dict, known: dict) -> bool:
    """Return whether a contender that was missing has been installed since."""
    return (
        str(row["note"]).startswith("not run: ") and "installed" in row["note"] and not known[row["contender"]].missing
    )


def _changes(old: list[dict], shown: dict[str, list[dict]], stores: dict[str, Store], path: Path) -> list[str]:
    """Compare what this command has shown with an older file."""
    from .changes import report
    from .report import as_text

    kind = "ops" if "op" in old[0] else "steps"
    if kind not in stores:
        return [f"compared: nothing, {path} holds {kind}"]
    new = [{name: as_text(value) for name, value in row.items()} for row in shown[kind]]
    return report(old, new, stores[kind].key)


def _files(store: Store, about: dict[str, str]) -> str:
    """Draw the picture, and return where everything is."""
    from .report import draw

    try:
        picture = draw(store.csv, f"{about['device']}, {about['threads']} threads, torch {about['torch']}")
        last = f", {picture.name}" if picture else ""
    except ModuleNotFoundError as error:
        last = f"; no picture: {error.name} is not installed"
    return f"Every number: {store.csv}, {store.json.name}{last}"
