"""The CPU benchmarks on tiny sizes: every contender is right, and every row complete."""

import dataclasses
import sys

import pytest
import torch
from rich.console import Console

from bench import contenders, report, steps, steps_cuda, test_flat
from projgrad.experiments.benchmark.harness import timed
from projgrad.experiments.benchmark.report import read_csv


@pytest.mark.parametrize("case", test_flat.CASES, ids=lambda case: case.name)
def test_contenders_of_the_flat_ops_pass_their_gate(case):
    small = dataclasses.replace(case, size=(3, 8) if case.op == "gram_solve" else (8, 1000))
    inputs = small.inputs()
    check, limits = small.gate(inputs)
    for name, call in small.contenders.items():
        for kind, error in check(call(*inputs)).items():
            assert error <= 10 * limits[kind], name


class InProcess:
    """A worker of `steps` without a process, on the small model."""

    def __init__(self, case, name, result=None):
        self.job, self.result = case.job(small=True), result
        self.step = case.contenders[name].start(self.job)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self):
        return steps.three_steps(self.job, self.step, self.result) if self.result else {"seconds": timed(self.step)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv", "decoder-256", "gram-mlp", "gram-encoder"])
def test_steps_of_every_contender_are_right(name, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "worker", InProcess)
    case = next(case for case in contenders.CASES if case.name == name)
    rows = steps.measure(case, 2, Console(quiet=True))
    assert not any(row["note"] for row in rows), [row["note"] for row in rows]
    assert all(row["ms"] and row["time_over_plain"] for row in rows)
    written = steps.write(rows, tmp_path / "steps_cpu.csv")
    assert [row["contender"] for row in written] == [row["contender"] for row in rows]
    assert len(steps.write(rows, tmp_path / "steps_cpu.csv")) == len(rows)  # of the same case: replaced
    (line,) = steps.summary(written)
    assert len(line) == len(steps.SUMMARY) and line[0] == f"{case.title}, n = {case.n}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_chooses_the_steps(device, monkeypatch):
    started = []
    monkeypatch.setattr(steps_cuda, "main", lambda: started.append("cuda"))
    monkeypatch.setattr(steps, "profile", lambda *_: started.append("cpu"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["bench.steps", "--device", device, "--profile", "mlp", "plain"])
    steps.main()
    assert started == [device]


def test_report_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    row = {"op": "gram", "size": "2x3", "contender": "projgrad", "ms": 1.0, "ms_20": 0.9, "ms_80": 1.1}
    row |= {"times_ours": 1.0, "target": None, "percent_of_floor": 50.0, "extra_mb": 1.0, "extra_mb_target": 2}
    report.report([row, row | {"contender": "plain", "target": 1.5}], "flat_cpu", "Flat")
    assert "MISSED" in capsys.readouterr().out
    assert [row["target"] for row in read_csv(tmp_path / "flat_cpu.csv")] == ["", "1.5"]
    assert (tmp_path / "flat_cpu.svg").read_text().startswith("<?xml")
