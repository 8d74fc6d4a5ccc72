"""`projgrad bench` on other data, terminals and folders, and on GPUs that are not here."""

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from projgrad.experiments.benchmark import (
    changes,
    command,
    harness,
    ops,
    options,
    report,
    show,
    step_worker,
    steps,
    subjects,
    worker,
)
from projgrad.experiments.benchmark.contenders import Contender
from projgrad.experiments.benchmark.models import Job
from projgrad.experiments.benchmark.peers import PEERS
from projgrad.experiments.benchmark.subjects import Refused
from projgrad.experiments.benchmark.worker import Failed, Worker

pytestmark = pytest.mark.same_without_extension


def job():
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    return Job(model, lambda n: (torch.randn(n, 6), torch.randint(5, (n,))), 4)


# Numbers


def test_memory_of_all_steps_is_above_the_same(monkeypatch, tmp_path):
    found, some = [], job()

    @contextlib.contextmanager
    def peak(_):
        found.append(all(p.grad is None for p in some.model.parameters()))
        yield SimpleNamespace(bytes=0)

    monkeypatch.setattr(step_worker, "peak_memory", peak)
    plain = step_worker.STEPS["plain"]
    step_worker.examine(some, plain.start(some), step_worker.State(some), plain, tmp_path / "no truth")
    assert found == [True, True]


SIZES = {"n": [4], "t": [6], "i": [24], "o": [16], "p": [3000], "k": [3]}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_ops_are_measured_in_every_dtype(dtype, monkeypatch):
    monkeypatch.setattr(ops, "product_rate", lambda _: 1e11)
    for case in ops.cases([op for op in ops.SIZES if op != "gram_solve"], SIZES, [dtype], "cpu"):
        for row in case.rows(None, harness.Clock("cpu"), rounds=2, seconds=1e-4, memory=False):
            assert not row["note"] and row["ms"], row
            if dtype == "float64":  # others too: in float32 they would have half of the work
                assert row["error"] < 1e-12, row


def test_a_gpu_is_asked_for_its_rate_in_float64():
    assert harness.ceilings(harness.Clock("cpu"), tiny=True).fp64 > 0


def test_steps_and_k_have_pictures_of_their_own_from_here_alone():
    row = {"case": "mlp", "n": "4", "dtype": "float32", "ms": "1", "device": "a"}
    rows = [row | {"what": "step"}, row | {"what": "K"}, row | {"what": "K", "n": "8", "device": "b"}]
    assert list(report.panels(rows, {"device": "a"})) == [("mlp", "n = 4, float32"), ("K, mlp", "n = 4, float32")]


def test_packages_take_what_the_optimizer_holds():
    some = job()
    some.optimizer = torch.optim.SGD(some.model[2].parameters(), 0.1)
    for name in ("plain", "projgrad", "vmap + Gram", "one by one"):
        assert PEERS[name].project(some)().shape == (40,), name
    ours, theirs = (PEERS[name].start(some)().float() for name in ("projgrad", "vmap + Gram"))
    torch.testing.assert_close(ours, theirs)


def test_buffers_that_are_not_saved_are_put_back_and_extra_state_is_no_matter():
    class Layer(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    layer = Layer(2, 2)
    layer.register_buffer("count", torch.zeros(1), persistent=False)
    state = step_worker.State(SimpleNamespace(model=layer))
    layer.count += 1
    state.restore()
    assert layer.count == 0


def test_nan_is_null_in_json(monkeypatch, capsys):
    row = {"contender": "off", "ms": None, "error": math.nan, "note": "wrong by nan", "what": "step", "times": []}
    monkeypatch.setattr(command, "_plan", lambda *_: iter([("mlp", "steps", lambda: [row], None)]))
    assert command.run(parsed("mlp", "--json")) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["error"] is None


# Steps without processes


ABOUT = {"n": 4, "p": 8, "dtype": "float32", "device": "cuda", "optimizer": "SGD", "free": 4e9, "G": 10}
ABOUT |= {"slices": True, "no_metric": "", "unchecked": ""}


class Answering:
    def __init__(self, task):
        self.task = task

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, _=""):
        if not self.task.contender:
            if self.task.file:
                raise Failed("out of memory")
            return ABOUT | {"unchecked": "no room"}
        if self.task.timing:
            return {"ms": 1.0}
        return {"peak_mb": 1.0, "later_mb": 1.0, "total_mb": 1000.0}


def test_what_does_not_fit_is_said():
    wanted = {name: Contender(None, "global") for name in ("plain", "ours", "other")}
    wanted["torchjd"] = Contender(None, "u, global", needs_samples=True)
    task = step_worker.Task("mine:make", 4, None, "cuda", 1)
    rows = {row["contender"]: row for row in steps.measure_steps(task, wanted, 2, 1.0, lambda *_: None, Answering)}
    assert rows["plain"]["note"] == rows["ours"]["note"] == "unchecked: no room"  # 2 processes of 1.6 GB, of 3.2
    assert rows["other"]["note"] == f"unchecked: no room; {steps.ALONE}" and rows["other"]["ms"] == 1
    assert rows["torchjd"]["note"] == f"not run: {steps.CLOSURES}" and not rows["torchjd"]["ms"]


def test_a_process_of_ops_is_not_asked_again_after_an_error(monkeypatch):
    class Broken:
        def __init__(self, *_):
            self.asked = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.ended = True

        def ask(self, _):
            self.asked += 1
            raise Failed("CUDA error")

    made = []
    monkeypatch.setattr(ops, "Worker", lambda *_: made.append(Broken()) or made[-1])
    with ops.Team("cuda", 1) as team:
        for _ in range(2):
            with pytest.raises(Failed, match="CUDA error"):
                team.ask(False, "")
    assert [(one.asked, one.ended) for one in made] == [(1, True)] * 2


def test_a_process_of_ops_that_cannot_begin_says_why(monkeypatch, capsys):
    def answers(*_):
        raise RuntimeError("CUDA out of memory: 4 GB for the ceilings")

    for name in ("dup", "dup2"):
        monkeypatch.setattr(os, name, lambda *_: None)
    monkeypatch.setattr(os, "fdopen", lambda *_: sys.stdout)
    monkeypatch.setattr(ops, "answers", answers)
    ops.main()
    assert json.loads(capsys.readouterr().out) == {"error": "out of memory"}


def test_measuring_on_the_cpu_leaves_the_gpu_alone(monkeypatch):
    def refuse():
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(harness, "DEVICE", "cuda")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert not torch.cuda.is_initialized() and harness.wall_clock(lambda: None) >= 0
    harness.release()


@pytest.mark.parametrize("is_checkout", [True, False])
def test_installed_packages_stay_behind_the_library_of_python(is_checkout, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setattr(worker, "ROOT", tmp_path)
    monkeypatch.setattr(worker.subprocess, "Popen", lambda *_, **more: given.update(more))
    if is_checkout:
        (tmp_path / "pyproject.toml").touch()
    Worker(["-m", "x"])
    assert given["env"]["PYTHONPATH"] == (f"{tmp_path}{os.pathsep}mine" if is_checkout else "mine")


# What is given


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    options.add(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--rounds", "1"], "at least 2"),
        (["--seconds", "long"], "must be a number of seconds; got 'long'"),
        (["--out", ""], "must name a folder"),
    ],
)
def test_options_that_cannot_be_used_are_refused(arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(*arguments)
    assert told in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsed("--out=~/there").out == tmp_path / "there"


def test_words_and_json_are_not_mixed(capsys, tmp_path):
    old = tmp_path / "old.csv"
    report.write_csv(old, [{"case": "mlp"}], ["case", "contender", "ms", "ms_20", "ms_80"])
    assert command.run(parsed("mlp", "--json", "--compare", str(old), "--out", str(tmp_path))) == 2
    assert "leave out --json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["case,contender,ms\nmlp,plain,1\n", f"case,contender\n{'x' * 200_000},1\n"])
def test_files_that_cannot_be_compared_are_refused(text, tmp_path):
    (tmp_path / "old.csv").write_text(text)
    with pytest.raises(Refused, match=r"--compare .*old\.csv"):
        changes.read_older(tmp_path / "old.csv")


def test_a_reader_of_the_output_that_has_gone_is_the_affair_of_the_command_line(monkeypatch):
    def gone(_):
        raise BrokenPipeError

    monkeypatch.setattr(command, "_run", gone)
    with pytest.raises(BrokenPipeError):
        command.run(parsed("mlp"))


def test_a_file_that_the_users_module_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reads.py").write_text("open('data.csv')\n")
    with pytest.raises(Refused, match=r"raised FileNotFoundError: .*data\.csv"):
        subjects.own("reads.py:make", None, None, "cpu")


def test_a_package_that_was_edited_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    found = []
    for text in ("a = 1\n", "a = 2\n"):
        Path("mine/__init__.py").write_text(text)
        found.append(subjects.source("mine:make"))
    assert all(found) and found[0] != found[1] and not subjects.source("yours:make")


def test_another_gpu_is_refused(monkeypatch):
    def make():
        model = nn.Linear(3, 4)
        x, y = torch.randn(4, 3), torch.arange(4)
        place = SimpleNamespace(device=torch.device("cuda", 1))
        monkeypatch.setattr(subjects.itertools, "chain", lambda *_: [place])
        return model, lambda: cross_entropy(model(x), y), lambda: cross_entropy(model(x), y, reduction="none")

    monkeypatch.setattr(subjects, "_function", lambda _: make)
    with pytest.raises(Refused, match="on cuda:1, and the first GPU is measured; CUDA_VISIBLE_DEVICES=1"):
        subjects.own("mine:make", None, None, "cuda")


def test_progress_fits_the_terminal(monkeypatch):
    written = []
    terminal = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    for columns, width in (("40", 39), ("300", show.WIDTH - 1)):
        monkeypatch.setenv("COLUMNS", columns)
        show.Progress(1, terminal).show("x" * 500)
        assert len(written.pop().lstrip("\r")) == width
