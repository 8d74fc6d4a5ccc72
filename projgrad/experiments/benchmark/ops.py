"""Every op by its sizes: the cases, and a process that measures them one after the other.

`python -m projgrad.experiments.benchmark.ops` is such a process. Two of them share the work on a CPU: one measures
memory, with an allocator that gives everything back, the other one time.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .flat import feasible_rows, flat_rows, random_rows, solve_rows
from .harness import Ceilings, Clock, ceilings, matrix_rate, read_rate, release
from .layers import layer_rows, operands
from .subjects import DTYPES
from .worker import Failed, Worker, complain, serve

COLUMNS = ("op", "size", "dtype", "on", "contender", "ms", "ms_20", "ms_80", "host_ms", "rounds", "times_ours")
COLUMNS += ("percent_of_floor", "extra_mb", "memory_ours", "error", "residual", "note")
KEY = ("op", "size", "dtype", "on", "contender")
SYSTEMS = 200  # of gram_solve
SIZES = {  # what each op's size is made of
    "project_out": "np",
    "gram_solve": "n",
    "feasible": "p",
    "linear_gram": "ntio",
    "linear_dot": "ntio",
    "linear_combine": "ntio",
    "linear_moments": "ntio",
    "basis_project": "oik",
}
PARTS = {"gram": "project_out", "subtract": "project_out"}  # measured with the op that they are halves of
DEFAULTS = {
    "cpu": {"n": 32, "t": 64, "i": 512, "o": 512, "p": 1_000_000, "k": 64},
    "cuda": {"n": 32, "t": 512, "i": 2048, "o": 2048, "p": 20_000_000, "k": 128},
}


class OpCase(NamedTuple):
    """One op at one size; `size` as in SIZES."""

    op: str
    size: tuple[int, ...]
    dtype: str
    device: str

    @property
    def title(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.size))} {self.dtype}"

    def ops(self) -> list[str]:
        """Return the ops whose rows this case gives."""
        return [self.op, *(part for part, whole in PARTS.items() if whole == self.op)]

    def shown_size(self) -> str:
        """Return the size as its rows have it."""
        return "x".join(map(str, (SYSTEMS, *self.size) if self.op == "gram_solve" else self.size))

    def rows(self, most: Ceilings | None, clock: Clock, **how: float) -> Iterator[dict]:
        dtype, on_cpu = DTYPES[self.dtype], self.device == "cpu"
        if self.op == "project_out":
            u, G = random_rows(*self.size, dtype, self.device)
            yield from flat_rows(u, G, most or cpu_ceilings(dtype, G), clock, qr=on_cpu, **how)
        elif self.op == "gram_solve":
            floor = SYSTEMS * self.size[0] ** 3 / 3 / product_rate(torch.float64) if on_cpu and how["rounds"] else None
            yield from solve_rows(SYSTEMS, *self.size, clock, floor, **how)
        elif self.op == "feasible":
            if most is None:
                most = cpu_ceilings(dtype, torch.randn(self.size[0]).to(dtype))
            yield from feasible_rows(*self.size, dtype, most, clock, **how)
        else:
            if most is None:
                most = cpu_ceilings(dtype, operands(self.op, self.size, dtype, self.device)[0])
            yield from layer_rows(self.op, self.size, dtype, most, clock, **how)


@functools.lru_cache
def product_rate(dtype: torch.dtype) -> float:
    return matrix_rate(dtype)


def cpu_ceilings(dtype: torch.dtype, inputs: Tensor) -> Ceilings:
    """Return how fast this CPU reads these inputs, and multiplies matrices of their dtype, 16 bits in float32."""
    products = product_rate(torch.float64 if dtype == torch.float64 else torch.float32)
    return Ceilings(read_rate(inputs), *[products] * 5)


def cases(ops: Sequence[str], sizes: dict[str, Sequence[int]], dtypes: Sequence[str], device: str) -> list[OpCase]:
    """Return all cases of these ops; sizes: by letter, those that are not named are DEFAULTS."""
    found = []
    for op in dict.fromkeys(PARTS.get(op, op) for op in ops):
        choices = [sizes.get(letter) or [DEFAULTS[device][letter]] for letter in SIZES[op]]
        for dtype in dtypes if op != "gram_solve" else ["float32"]:
            found += [OpCase(op, size, dtype, device) for size in itertools.product(*choices)]
    return found


def answers(device: str, threads: str) -> Callable[[str], dict]:
    """Return what answers a question: a case and how to measure it, as JSON."""
    torch.set_num_threads(int(threads))
    clock = Clock(device)
    most = ceilings(clock, tiny=False) if device == "cuda" else None

    def answer(question: str) -> dict:
        asked = json.loads(question)
        case = OpCase(asked["op"], tuple(asked["size"]), asked["dtype"], device)
        rows = list(case.rows(most, clock, **asked["how"]))
        release()
        return {"rows": rows}

    return answer


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(answers(*sys.argv[1:]), out=replies)
    except Exception as error:
        complain(error, out=replies)


class Team:
    """The processes that measure ops: started when they are first asked, and anew after an error.

    Behind an error of CUDA nothing runs any more in its process.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.stack, self.workers = contextlib.ExitStack(), {}

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def ask(self, memory: bool, question: str) -> dict:
        """Return the answer to a question; memory: of the process for that."""
        if memory not in self.workers:
            variables = {"OMP_NUM_THREADS": str(self.threads)}
            if memory:
                variables["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory leaves at once
            arguments = ["-m", "projgrad.experiments.benchmark.ops", self.device, str(self.threads)]
            self.workers[memory] = self.stack.enter_context(Worker(arguments, variables))
        try:
            return self.workers[memory].ask(question)
        except Failed:
            self.workers.pop(memory).__exit__()
            raise


def measure_op(case: OpCase, team: Team, rounds: int, seconds: float) -> list[dict]:
    """Return the rows of a case, with a note where the op could not be measured."""
    asked = {"op": case.op, "size": case.size, "dtype": case.dtype}

    def ask(for_memory: bool, **how: float) -> list[dict]:
        return team.ask(for_memory, json.dumps(asked | {"how": how}))["rows"]

    try:
        if case.device == "cuda":
            rows = ask(False, rounds=rounds, seconds=seconds)
        else:
            rows = ask(False, rounds=rounds, seconds=seconds, memory=False)
            for row, other in zip(rows, ask(True, rounds=0, seconds=0.0), strict=True):
                row |= {name: other.get(name) for name in ("extra_mb", "memory_ours")}
    except Failed as error:
        about = {"size": case.shown_size(), "dtype": case.dtype, "contender": "projgrad", "note": str(error)}
        rows = [{"op": op, **about} for op in case.ops()]
    kept = (*COLUMNS, "times")
    return [{name: row.get(name) for name in kept} | {"on": case.device} for row in rows]


if __name__ == "__main__":
    main()
