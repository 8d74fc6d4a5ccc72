"""`projgrad bench ops`, and what both kinds of measurement share: comparisons, groups and progress."""

import pytest
from in_process import FEW, InProcess
from printed import Stream

from projgrad.experiments.benchmark import changes, command, ops, steps
from projgrad.experiments.benchmark.report import read_csv
from projgrad.experiments.benchmark.show import WIDTH, Progress
from projgrad.experiments.benchmark.worker import Failed

pytestmark = pytest.mark.same_without_extension


SIZES = ("--n", "3", "--t", "4", "--i", "8", "--o", "16", "--p", "500", "--k", "2")


def test_every_op_is_right_and_resumes(bench, monkeypatch):
    monkeypatch.setattr(ops, "SYSTEMS", 3)
    status, printed, _ = bench("ops", *SIZES, *FEW)
    rows = read_csv(bench.out / "ops.csv")
    assert status == 0 and {row["op"] for row in rows} == set(command.OPS)
    assert max(map(len, printed.splitlines())) <= WIDTH
    for row in rows:
        if row["contender"] == "projgrad":
            assert row["ms"] and row["error"] and row["percent_of_floor"] and row["extra_mb"], row["op"]
    count = InProcess.started
    bench("ops", *SIZES, *FEW)
    assert InProcess.started == count
    bench("ops", *SIZES, *FEW, "--op", "gram", "--p", "500", "600", "--dtype", "float32", "bfloat16")
    sizes = {(row["size"], row["dtype"]) for row in read_csv(bench.out / "ops.csv") if row["op"] == "gram"}
    assert sizes == {(size, dtype) for size in ("3x500", "3x600") for dtype in ("float32", "bfloat16")}


def test_a_process_that_dies_is_a_note(bench, monkeypatch):
    def die(*_):
        raise Failed("out of memory")

    monkeypatch.setattr(ops.Team, "ask", die)
    status, printed, _ = bench("ops", *SIZES, *FEW, "--op", "feasible")
    assert status == 1 and "projgrad: out of memory" in printed


def test_changes_are_beyond_the_percentiles_and_five_percent():
    def row(low, middle, high):
        return {"ms_20": low, "ms": middle, "ms_80": high}

    old = row("1", "2", "3")
    assert changes.changed(old, row("2.9", "4", "5")) is None  # the ranges overlap
    assert changes.changed(old, row("3.1", "4", "5")) == 2
    assert changes.changed(row("1", "1", "1"), row("1.04", "1.04", "1.04")) is None
    assert changes.changed(old, row("", "", "")) is None


def test_contenders_that_do_not_fit_together_are_timed_apart():
    assert steps.groups({"a": 40, "b": 30, "c": 30}, 100) == [["a", "b"], ["c"]]
    assert steps.groups({"a": 90}, 100) == [["a"]] and steps.groups({"a": 1, "b": 2}, None) == [["a", "b"]]


def test_progress_is_for_terminals():
    for watched in (True, False):
        stream = Stream(watched)
        progress = Progress(4, stream)
        progress.done = 2
        progress.show("mlp")
        assert ("[##########..........] 2/4 mlp" in stream.getvalue()) == watched
        progress.clear()
    assert stream.getvalue() == ""
    progress.show("mlp: plain", finished=True)
    assert stream.getvalue() == "mlp: plain\n"
