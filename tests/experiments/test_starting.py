"""The command before torch is imported: help, mistakes and completed words at once, and the wait of its threads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from printed import lines

import projgrad
from projgrad.experiments import starting

pytestmark = pytest.mark.same_without_extension


@pytest.fixture
def without_torch(tmp_path):
    """Run the command beside a `torch` that does what is written there."""

    def start(code, *given):
        (tmp_path / "torch.py").write_text(code)
        root, others = str(Path(projgrad.__file__).parents[1]), os.environ.get("PYTHONPATH", "")
        path = os.pathsep.join([str(tmp_path), root, others])
        env = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (what runs in the background ignores it)
        options = {"env": env, "cwd": tmp_path, "preexec_fn": heard if os.name == "posix" else None}
        return subprocess.Popen([sys.executable, "-m", "projgrad", *given], **options, **pipes)

    return start


@pytest.mark.parametrize(
    "called, line, expected",
    [
        ("/x/bin/projgrad", "python /x/bin/projgrad doctor", True),
        ("projgrad.exe", "python projgrad.exe doctor", True),
        ("-m", "python -X dev -m projgrad doctor", True),
        ("-m", "python -m projgrad.experiments.comparison.memory", False),
        ("-m", "python -m pytest projgrad", False),
        ("/x/bin/projgrad", "python -c spawned by multiprocessing", False),
        ("train.py", "python train.py projgrad", False),
        ("", "python", False),
    ],
)
def test_no_other_process_is_taken_for_the_command(called, line, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(sys, "orig_argv", line.split())
    assert starting.is_command() is expected


@pytest.mark.parametrize(
    "given, code, out, err",
    [
        (["--help"], 0, "usage: projgrad", ""),
        (["--version"], 0, f"projgrad {projgrad.__version__}\n", ""),
        (["compare", "--help"], 0, "usage: projgrad compare", ""),
        (["demo", "--seeds", "0"], 2, "", "projgrad demo: argument --seeds: must be at least 1"),
    ],
    ids=str,
)
def test_help_and_mistakes_are_answered_without_torch(given, code, out, err, without_torch):
    process = without_torch("raise AssertionError('imported')", *given)
    printed = process.communicate(timeout=60)
    assert process.returncode == code and printed[0].startswith(out) and printed[1].startswith(err), printed
    assert len(lines(printed[1])) == bool(err)


def test_ctrl_c_while_torch_is_imported(without_torch):
    process = without_torch("import time\nprint('importing', flush=True)\ntime.sleep(60)", "doctor")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "projgrad: interrupted\n" and process.returncode == 130


def test_a_missing_torch_is_named(without_torch):
    process = without_torch("raise ModuleNotFoundError('No module named torch', name='torch')", "doctor")
    assert process.communicate(timeout=60)[1] == "projgrad: the package torch is missing: pip install torch\n"
    assert process.returncode == 2


def test_words_are_completed_without_torch(without_torch, tmp_path, monkeypatch):
    pytest.importorskip("argcomplete")
    line = "projgrad compare --scenario digits-c"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " "}
    for name, value in (asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}).items():
        monkeypatch.setenv(name, value)
    process = without_torch("raise AssertionError('imported')")
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0
    assert (tmp_path / "words").read_text().strip() == "digits-class"


@pytest.mark.slow
def test_the_command_restarts_itself_with_passive_waiting():
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "projgrad", "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "passive" in done.stdout
