"""`projgrad bench`: how long a step takes here, how much memory, and beside whom."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .options import LETTERS, MODELS, OPS
from .options import add as add  # part of the command

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ops import OpCase
    from .steps import Task
    from .store import Store


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; return the exit code: 1 for a wrong result of projgrad, 2 for what cannot be done."""
    from .subjects import Refused

    try:
        return _run(args)
    except Refused as error:
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
    from ..cli.terminal import print_json
    from .show import Progress, legend, op_table, step_table, wrapped

    stores: dict[str, Store] = {}
    work = list(_plan(args, names, about, stores, stack))
    if not args.json:
        print(wrapped(", ".join(f"{key} {value}" if key != "device" else value for key, value in about.items())))
    progress, failed, shown, seen = Progress(len(work)), False, {}, {}
    for title, kind, is_done, measure in work:
        progress.show(title)
        rows = is_done()
        fresh = rows is None
        if rows is None:
            rows = measure(lambda text, finished=False, title=title: progress.show(f"{title}: {text}", finished))
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
            mark = "" if fresh else "  (kept)"
            print("\n" + (step_table if kind == "steps" else op_table)(table, mark), flush=True)
        for row in rows:
            seen.setdefault(row.get("what", "op"), []).append(row)
    if args.json:
        print_json([{k: v for k, v in row.items() if k != "times"} for rows in shown.values() for row in rows])
        return int(failed)
    for name in sorted(seen):
        print("\n" + wrapped(legend(name, seen[name])))
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

    from ..cli.problems import Unusable, check_folder
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
    letters = [f"--{letter}" for letter in LETTERS if getattr(args, letter)] + ["--op"] * bool(args.op)
    if letters and "ops" not in names:
        raise Refused(f"{', '.join(letters)}: of ops alone; projgrad bench ops {' '.join(letters)} ...")
    if args.json and args.compare:
        raise Refused("--compare tells in words what has changed: leave out --json")
    try:
        check_folder(args.out)
    except Unusable as error:
        raise Refused(str(error)) from error


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
        yield from _ops(args, stores[kind], stack) if name == "ops" else _steps(args, name, stores[kind])


def _ops(args: argparse.Namespace, store: Store, stack: contextlib.ExitStack) -> Iterator[Item]:
    import torch

    from .ops import Team, cases, measure_op

    device, team = args.device, stack.enter_context(Team(args.device, torch.get_num_threads()))
    sizes = {letter: getattr(args, letter) or [] for letter in ("n", *LETTERS)}

    def measure(case: OpCase) -> Callable:
        def one(tick: Callable[..., None]) -> list[dict]:
            rows = measure_op(case, team, args.rounds, args.seconds)
            tick("finished", True)
            return rows

        return one

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

        def measure(tick: Callable[..., None], task: Task = task) -> list[dict]:
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
        title = f"{about['device']}, {about['threads']} threads, torch {about['torch']}"
        picture = draw(store.csv, title, about)
        last = f", {picture.name}" if picture else ""
    except ModuleNotFoundError as error:
        last = f"; no picture: {error.name} is not installed"
    return f"Every number: {store.csv}, {store.json.name}{last}"
