"""projgrad plan."""

from __future__ import annotations

import argparse
import contextlib
import sys

from ..plan.plan import make_plan, rows, sentence
from ..plan.subjects import Unknown
from .terminal import is_terminal, print_json


def plan(args: argparse.Namespace) -> int:
    """Print what a step takes, in every way."""
    given = {key: value for key, value in vars(args).items() if key not in ("command", "error", "json")}
    is_watched = is_terminal(sys.stderr) and not args.json

    def notify(what: str) -> None:
        if is_watched:
            print(f"\r{what:<78}", end="\r", file=sys.stderr, flush=True)

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a function of the user prints
            plan = make_plan(**given, notify=notify)
    except (Unknown, ImportError) as error:
        args.error(str(error))
    finally:
        notify("")
    if args.json:
        print_json(plan)
        return 0
    heads = ["GB", "GB, first step", "x plain", "Tflop", "x plain", *(["largest n"] if args.memory else [])]
    for title, *cells in [("", *heads), *rows(plan)]:
        print(f"{title:<47}", *(f"{cell:>{max(9, len(head))}}" for cell, head in zip(cells, heads, strict=True)))
    print(sentence(plan))
    return 0
