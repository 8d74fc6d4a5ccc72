"""Workers of `projgrad bench` that run inside this process, and what the tests of it share."""

import json
from pathlib import Path
from types import SimpleNamespace

import bench_models

from projgrad.experiments.benchmark import report
from projgrad.experiments.benchmark.worker import Failed

EXAMPLE = f"{Path(__file__).parents[2] / 'examples' / 'bench_own_model.py'}:make"
MODELS = f"{bench_models.__file__}:"
DRAW = report.draw
FEW = ("--rounds", "2", "--seconds", "0.001")


class InProcess:
    """A worker without a process; `started` counts them."""

    started = 0

    def __init__(self, make):
        type(self).started += 1
        self.make, self.process = make, SimpleNamespace(poll=lambda: None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question=""):
        try:
            reply = json.loads(json.dumps(self.make()(question)))
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        if "error" in reply:
            raise Failed(reply["error"])
        return reply
