"""Turn the rows that the benchmarks of pytest leave in `extra_info` into a table, a CSV file and a picture."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .report import report


def pytest_sessionfinish(session):
    state = getattr(session.config, "_benchmarksession", None)
    benchmarks = state.benchmarks if state else []
    rows = [row for benchmark in benchmarks for row in benchmark.extra_info.get("rows", [])]
    if rows:
        report(rows, "flat_cpu", "Flat ops on the CPU, float32")
