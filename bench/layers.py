"""The ops on the factors of one linear layer on a GPU: `python -m bench.layers`, `bench/gpu.sh layers`.

Every alternative is compared with float64 first; one that is wrong is not timed. Floor: the fewest flops of any route
at the measured matrix rate, or the fewest bytes at the measured bandwidth, whichever takes longer. On a CPU
`bench.routes` measures the two routes to the Gram matrix.
"""

import sys
from collections.abc import Iterator

import torch

from projgrad.experiments.benchmark.harness import DEVICE, Ceilings, Clock, ceilings
from projgrad.experiments.benchmark.layers import ALTERNATIVES, layer_rows, operands
from projgrad.experiments.benchmark.report import about_case

from .command import Deadline, arguments, rows_of, run, started, title

F32, BF16 = torch.float32, torch.bfloat16
COLUMNS = ("op", "size", "dtype", "contender", "ms", "ms_20", "ms_80", "host_ms", "rounds", "times_ours")
COLUMNS += ("percent_of_floor", "percent_of_rate", "rate", "unit", "extra_mb", "memory_ours", "error", "note")
KEY = COLUMNS[:4]
SIZES = [  # n, t, i, o
    (4, 512, 2048, 2048),
    (4, 512, 2048, 512),
    (4, 512, 2048, 8192),
    (4, 512, 8192, 2048),
    (16, 512, 2048, 2048),
    (16, 512, 2048, 8192),
    (32, 512, 768, 3072),
    (64, 1, 4096, 4096),
]
FLOAT = [("linear_gram", SIZES[4])]  # and what else is measured in float32
MOMENTS = SIZES[:1] + SIZES[-2:-1]
BASES = [(2048, 2048, 128), (4096, 4096, 512)]  # o, i, k
TINY, TINY_BASES = [(3, 5, 16, 24), (4, 1, 8, 8)], [(24, 16, 4)]


def plan(tiny: bool, only: str, most: Ceilings, clock: Clock) -> Iterator[tuple]:
    """Yield what is measured: sizes in order of interest, in each the ops, in each the dtypes."""
    products = ("linear_gram", "linear_dot", "linear_combine")
    cases = [(op, size, BF16) for size in (TINY if tiny else SIZES) for op in products]
    cases += [(op, TINY[0] if tiny else size, F32) for op, size in FLOAT]
    cases += [("linear_moments", size, BF16) for size in (TINY if tiny else MOMENTS)]
    cases += [("basis_project", size, BF16) for size in (TINY_BASES if tiny else BASES)]
    for op, size, dtype in cases:
        about = about_case(op, size, dtype)
        if only in title(about):
            yield about, lambda op=op, size=size, dtype=dtype: layer_rows(op, size, dtype, most, clock)


def profile(op: str, size: str, dtype: str, name: str) -> None:
    """Print where the time of one call goes."""
    a, b, other, _ = operands(op, tuple(map(int, size.split("x"))), getattr(torch, dtype), DEVICE)
    call = ALTERNATIVES[op][name].call
    for _ in range(3):
        call(a, b, other)
    with torch.profiler.profile() as profiler:
        call(a, b, other)
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


def main() -> None:
    args = arguments(__doc__, ("--profile", {"nargs": 4, "metavar": ("OP", "SIZE", "DTYPE", "CONTENDER")}))
    if args.device == "cpu":
        raise SystemExit("the ops of a layer are measured on a GPU; for a CPU there is python -m bench.routes")
    if args.profile:
        return profile(*args.profile)
    deadline, clock = Deadline(args.seconds), Clock()
    rows = rows_of("layers", args, COLUMNS, KEY)
    most = ceilings(clock, args.tiny)
    for row in most.rows():
        rows.add(row)
    sys.exit(run(plan(args.tiny, args.only, most, clock), rows, deadline))


if __name__ == "__main__":
    started(main)
