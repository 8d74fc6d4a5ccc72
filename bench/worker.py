"""Contenders in processes of their own, asked for one measurement at a time."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class Failed(Exception):
    """Why a contender has no number."""


class Worker:
    """A Python process that answers every line of its input with one line of JSON."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(variables or {})},
            cwd=Path(__file__).parent.parent,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()

    def defer(self, question: str = "") -> dict:
        with contextlib.suppress(BrokenPipeError):  # the reason can still be read
            print(question, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # what a library has to say
            print(line, end="", file=sys.stderr)
            line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise Failed("out of memory" if status == -9 else f"ended with status {status}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply


def serve(answer: Callable[[str], dict], lines: object = sys.stdin) -> None:
    """The worker's side."""
    for line in lines:
        print(json.dumps(answer(line.strip())), flush=True)


def complain(error: Exception) -> None:
    """Tell the asking process why there is no answer."""
    text = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    print(json.dumps({"error": text.splitlines()[0]}), flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or any(
        some in str(error) for some in ("allocate memory", "out of memory", "ALLOC_FAILED")
    )
