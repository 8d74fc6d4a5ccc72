"""The cost model of CUDA against times that were measured."""

import csv
from pathlib import Path

import pytest

from projgrad.ops.cost import linear_route

FILE = Path(__file__).parents[2] / "bench" / "results" / "layers_h100.csv"
with FILE.open(newline="") as file:
    ROWS = list(csv.DictReader(file))
MS = {(tuple(int(row[x]) for x in "ntio"), row["op"], row["way"]): float(row["ms"]) for row in ROWS}
HOST_BOUND = {
    (tuple(int(row[x]) for x in "ntio"), row["op"], row["way"]) for row in ROWS if float(row["host_ms"] or 0) > 1
}
SIZES = sorted({size for size, *_ in MS})
CLOSE = 1.2


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("narrow, m", [(False, 0), (False, 1), (True, 1)])  # 16 bits where there is a direction
def test_the_route_is_the_fastest_of_those_measured(size, narrow, m):
    """Or one within 20 %. Chunks give v in the same pass. A millisecond of the host hides the device."""
    way = "chunks, 16 bits" if narrow else "chunks, float32"
    times = {"chunks": MS[size, "linear_gram", way], "factors": MS[size, "linear_gram", "factors"]}
    times["factors"] += m * MS[size, "linear_dot", "factors"]
    chosen = linear_route(*size, m=m, itemsize=2, device="cuda", narrow=narrow).name
    unknown = chosen == "chunks" and (size, "linear_gram", way) in HOST_BOUND
    assert times[chosen] <= CLOSE * min(times.values()) or unknown, times


def test_the_library_is_faster_than_the_kernels_that_were_dropped():
    for (size, op, way), ms in MS.items():
        if way.startswith("Triton") and (size, op, way) not in HOST_BOUND:
            assert min(MS[size, op, w] for w in ("factors", "chunks, 16 bits")) < ms


def test_many_single_positions_are_not_made_into_chunks():
    for n, width in ((64, 4096), (256, 1024)):
        assert linear_route(n, 1, width, width, m=1, itemsize=2, device="cuda").name == "factors"
