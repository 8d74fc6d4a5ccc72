"""What is written where: results to stdout, bars and messages to stderr, and control codes to terminals alone."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

WIDTH = 120  # where there is no terminal


def prepare() -> None:
    """Let no letter that the terminal does not have end a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def say(message: str) -> None:
    """Write a message in one line to stderr."""
    print(f"projgrad: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def give_up_output() -> None:
    """Send what is still to be written nowhere: Python would try it again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AttributeError:  # there is none
        pass


def print_json(content: Any) -> None:
    """Print plain values; what is NaN or infinite becomes null, which JSON has."""
    print(json.dumps(_plain(content), indent=1))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_terminal(stream: IO | None) -> bool:
    return stream is not None and stream.isatty()


def console(stream: IO | None) -> Console:
    """Make a console of rich as wide as COLUMNS says, else as the terminal is; NO_COLOR is rich's own."""
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) else None if is_terminal(stream) else WIDTH
    return Console(file=stream, width=width, force_terminal=None if is_terminal(stream) else False)


def bar() -> Progress:
    """Make a progress bar with the time that has passed and the time that is left, on stderr if that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
    left = TimeRemainingColumn(elapsed_when_finished=False)
    return Progress(*columns, left, console=console(sys.stderr), disable=not is_terminal(sys.stderr))
