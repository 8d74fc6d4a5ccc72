"""`projgrad doctor`: that it finds what is broken, says what computes, and what to install."""

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from printed import lines

import projgrad
from projgrad.experiments import cli
from projgrad.experiments.cli import doctor, self_test
from projgrad.experiments.comparison import environment

same_without_extension = pytest.mark.same_without_extension


@pytest.fixture(scope="module")
def told():
    """What doctor says as JSON, and its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out := io.StringIO())
        code = cli.main(["doctor", "--json"])
    return code, json.loads(out.getvalue())


def test_doctor_finds_everything_right(told):
    code, found = told
    assert code == 0 and found["ok"] and found["projgrad"] == projgrad.__version__
    assert {line["name"] for line in found["self_test"]} == {*self_test.OPS, "step of OrthoGrad"}
    assert all(0 <= line["error"] <= line["limit"] <= 1e-2 for line in found["self_test"]), found["self_test"]


def test_doctor_reads_from_the_dispatcher_what_computes_an_op(told):
    ops, is_built = told[1]["ops"]["cpu"], environment.extension() is not None
    compiled = {name for name, parts in ops.items() if "C++ extension" in parts}
    assert compiled == ({"gram", "gram_solve", "project_out", "feasible", "linear_gram"} if is_built else set())
    if is_built:
        assert ops["linear_gram"] == {"C++ extension": ["gram_pass"]}  # of chunks of per-sample gradients
        assert set(ops["project_out"]["C++ extension"]) == {"gram_pass", "gram_solve", "subtract"}
    assert all(list(ops[name]) == ["plain PyTorch"] for name in ops.keys() - compiled)


@same_without_extension
def test_every_public_op_is_tested():
    public = {name: getattr(projgrad, name) for name in projgrad.__all__}
    ops = {k for k, v in public.items() if getattr(v, "__module__", "").startswith("projgrad.ops.") and k.islower()}
    assert ops == set(self_test.OPS) and ops < set(self_test.TESTS)


def nudged(result):
    """What a slightly broken kernel returns: its largest number is off by one percent."""
    if isinstance(result, tuple):
        return (nudged(result[0]), *result[1:])
    result = result.clone()
    result.view(-1)[result.abs().argmax()] *= 1.01
    return result


@pytest.mark.parametrize("name", self_test.OPS)
def test_a_broken_op_is_found(name, monkeypatch):
    right = self_test.OPS[name]
    monkeypatch.setitem(self_test.OPS, name, lambda *args: nudged(right(*args)))
    monkeypatch.setattr(self_test, "TESTS", {name: self_test.TESTS[name]})
    (line,) = self_test.self_test("cpu")
    assert line.ok is False and line.error > line.limit


@same_without_extension
@pytest.mark.parametrize("broken", [float("nan"), None, RuntimeError("no kernel\nimage")], ids=str)
def test_nonsense_and_errors_of_an_op_are_found(broken, monkeypatch, capsys):
    def gram(G, u):
        if isinstance(broken, Exception):
            raise broken
        return (G.new_full((1, 1), 0.0),) * 2 if broken is None else (G @ G.mT * broken, G @ u.mT)

    monkeypatch.setitem(self_test.OPS, "gram", gram)
    monkeypatch.setattr(self_test, "TESTS", {"gram": self_test.TESTS["gram"]})
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "do not trust" in printed
    assert ("RuntimeError: no kernel image" in printed) == isinstance(broken, Exception)


def test_a_step_that_does_not_project_is_found(monkeypatch):
    def steps(model, optimizer):
        return projgrad.OrthoGrad(model, optimizer, projector=lambda u, G: u)

    monkeypatch.setitem(self_test.STEPS, "OrthoGrad", steps)
    monkeypatch.setattr(self_test, "TESTS", {"step": self_test.TESTS["step of OrthoGrad"]})
    assert [line.ok for line in self_test.self_test("cpu")] == [False]


@same_without_extension
def test_the_input_nearest_to_its_limit_decides(monkeypatch):
    def tests(*errors):
        monkeypatch.setattr(self_test, "TESTS", {"x": lambda device: iter(errors)})
        (line,) = self_test.self_test("cpu")
        return line.error, line.limit, line.dtype, line.ok

    small, wide = (1e-13, 1e-12, torch.float64), (1e-2, 1e-2, torch.bfloat16)
    assert tests(small, wide) == (1e-2, 1e-2, "bfloat16", True)
    assert tests((1.01e-12, 1e-12, torch.float64), wide) == (1.01e-12, 1e-12, "float64", False)
    assert tests(wide, (float("nan"), 1.0, torch.float32))[3] is False


@same_without_extension
def test_the_self_test_ends_in_time():
    assert [line.ok for line in self_test.self_test("cpu", end=0.0)] == [None] * len(self_test.TESTS)


@same_without_extension
def test_who_computes_a_part_of_an_op_is_named(monkeypatch, capsys):
    """As on a GPU without nvcc."""
    computed = {"gram": {"Triton": ["gram_pass"]}, "feasible": {"plain PyTorch": ["feasible_pass"]}}
    computed["project_out"] = {"Triton": ["project_out"], "plain PyTorch": ["gram_solve"]}
    monkeypatch.setattr(doctor, "OPS", computed)
    monkeypatch.setattr(doctor, "_computed_by", lambda name, device: computed[name])
    monkeypatch.setattr(self_test, "TESTS", {})
    assert cli.main(["doctor"]) == 0
    printed = lines(capsys.readouterr().out)
    rows = [line.split(maxsplit=1) for line in printed[printed.index("Computed on cpu by") + 1 :][:3]]
    assert rows == [
        ["gram", "Triton"],
        ["feasible", "plain PyTorch"],
        ["project_out", "Triton; plain PyTorch: gram_solve"],
    ]


@same_without_extension
@pytest.mark.parametrize(
    "changes, advice",
    [
        ({}, "nothing to install"),
        ({"extension": None}, "a C++ compiler"),
        ({"cuda": "a GPU", "triton": None}, "pip install triton"),
        ({"recording": "Python"}, "install projgrad again (pip"),
        ({"cuda": "a GPU", "extension": {"cuda": False}}, "CUDA_HOME"),
    ],
)
def test_doctor_says_what_to_install_to_be_faster(changes, advice, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    about = {"extension": {"cuda": True}, "cuda": None, "triton": "3.6", "recording": "C++", "torch": "2.13"} | changes
    assert advice in doctor.advice(about)


@same_without_extension
def test_a_gpu_that_torch_cannot_use_is_seen(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a torch with CUDA" in doctor.advice({"extension": None, "cuda": None, "triton": None})


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


@same_without_extension
def test_scores_and_doctor_need_only_numpy():
    code = PLAIN.format(blocked=OPTIONAL)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "orthograd is best" in process.stdout and "95 % interval" in process.stdout
    assert "digits-labels" in process.stdout and f"projgrad        {projgrad.__version__}" in process.stdout


def test_the_environment_names_the_extension_where_it_is_built():
    assert (environment.environment()["extension"] is None) == (find_spec("projgrad._C") is None)


@same_without_extension
def test_doctor_says_what_the_absent_extension_costs(monkeypatch, capsys):
    monkeypatch.setattr(environment, "extension", lambda: None)
    monkeypatch.setattr(self_test, "TESTS", {})
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "C++ extension   absent: everything works, slower" in printed and "To be faster: a C++ compiler" in printed


@same_without_extension
def test_without_a_compiler_the_install_says_what_that_costs():
    for package in ("setuptools", "pybind11"):
        pytest.importorskip(package)
    command, root = [sys.executable, "setup.py", "--name"], Path(__file__).parents[2]
    env = os.environ | {"CXX": "/nonexistent/c++ -O1"}
    process = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and process.stdout.strip() == "projgrad"
    assert "there is no compiler '/nonexistent/c++ -O1'. Everything works, slower" in process.stderr
