"""What several files of this folder start from."""

import argparse

import pytest
import torch
from in_process import InProcess
from tiny import scenario, small_plan

from projgrad.experiments import cli
from projgrad.experiments.benchmark import command, ops, report, step_worker, steps
from projgrad.experiments.scenarios import SCENARIOS


@pytest.fixture
def tiny(monkeypatch):
    """Make `compare --scenario tiny` a matter of a second; the command with a folder for its results."""
    for package in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    from projgrad.experiments.cli import comparing

    monkeypatch.setitem(SCENARIOS, "tiny", scenario())
    monkeypatch.setattr(comparing, "make_plan", lambda *_, **__: small_plan())
    monkeypatch.setattr(comparing, "draw", lambda results, titles, out: None)  # which takes seconds
    monkeypatch.setattr(comparing, "write_report", lambda results, titles, path: path)
    return lambda out, *more: cli.main(["compare", "--scenario", "tiny", "--out", str(out), *more])


@pytest.fixture
def in_process(monkeypatch):
    threads, InProcess.started = torch.get_num_threads(), 0
    monkeypatch.setattr(steps, "start_worker", lambda task: InProcess(lambda: step_worker.answers(task)))
    monkeypatch.setattr(ops, "Worker", lambda arguments, _: InProcess(lambda: ops.answers(*arguments[-2:])))
    monkeypatch.setattr(ops, "matrix_rate", lambda _: 1e11)
    monkeypatch.setattr(ops, "release", lambda: None)
    monkeypatch.setattr(report, "draw", lambda *_: None)
    ops.product_rate.cache_clear()
    yield
    ops.product_rate.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def bench(in_process, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        parser = argparse.ArgumentParser(prog="projgrad bench")
        command.add(parser)
        status = command.run(parser.parse_args([*arguments, "--out", "out"]))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    run.out = tmp_path / "out"
    return run
