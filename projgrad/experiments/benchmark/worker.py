"""Processes that measure: a fresh one for every contender, which answers questions line by line."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TextIO

from .harness import is_out_of_memory
from .machine import ROOT


class Failed(Exception):
    """Why a contender has no number."""


class Worker:
    """A Python process that answers every line of its input with one line of JSON.

    quiet: what it writes to its standard error is dropped.
    """

    def __init__(
        self, arguments: Sequence[str], variables: Mapping[str, str] | None = None, quiet: bool = False
    ) -> None:
        # A checkout, however this process found it. Of installed packages none may come before Python's own library.
        checkout = str(ROOT) if (ROOT / "pyproject.toml").is_file() else ""
        path = os.pathsep.join(filter(None, (checkout, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(variables or {})},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()

    def ask(self, question: str = "") -> dict:
        """Return the answer to one question; raise `Failed` where there is none."""
        with contextlib.suppress(BrokenPipeError):  # the reason can still be read
            print(question, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # what a library has to say
            print(line, end="", file=sys.stderr)
            line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            ended = f"ended by signal {-status}" if status < 0 else f"ended by itself with status {status} (sys.exit?)"
            raise Failed("out of memory" if status == -9 else ended)
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply


def serve(answer: Callable[[str], dict], lines: Iterable[str] = sys.stdin, out: TextIO | None = None) -> None:
    """Answer every question, on the worker's side."""
    for line in lines:
        _tell(answer(line.strip()), out)


def complain(error: Exception, out: TextIO | None = None) -> None:
    """Tell the asking process why there is no answer."""
    text = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    _tell({"error": text.splitlines()[0]}, out)


def _tell(reply: dict, out: TextIO | None) -> None:
    try:
        print(json.dumps(reply), flush=True, file=out)
    except BrokenPipeError:  # whoever asked has gone; Python would complain once more at its end
        os._exit(1)
