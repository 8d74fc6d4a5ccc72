"""What is declared is what is needed: requirements and extras, the build's messages, the citation."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import projgrad

tomllib = pytest.importorskip("tomllib")
pytestmark = pytest.mark.same_without_extension

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The others are called as they are imported.
PIP_NAMES = {"backpack": "backpack-for-pytorch", "PIL": "pillow", "sklearn": "scikit-learn"}
# Which extras bring what a file, or all files of a folder, may import beside torch and triton; the longest path counts.
PLACES = {
    "projgrad/evaluate": "evaluate",
    "projgrad/evaluate/pictures.py": "demo",
    "projgrad/evaluate/report.py": "demo",
    "projgrad/evaluate/style.py": "demo",
    "projgrad/evaluate/tables.py": "demo",
    "projgrad/experiments": "demo",
    "projgrad/experiments/benchmark": "demo hf peers",
    "projgrad/experiments/cli": "demo completion",
    "projgrad/experiments/facts_demo.py": "scenarios",
    "projgrad/experiments/plan": "hf",
    "projgrad/experiments/scenarios": "scenarios",
    "projgrad/integrations": "hf",
    "projgrad/methods/pgu/file.py": "cache",
}
# By file: what it can do without, and says so in one line.
SAID = {"projgrad/methods/union.py": {"rich"}}
# By extra: what is declared and not imported by projgrad, and why.
NOT_IMPORTED = {"scenarios": {"gguf": "transformers imports it to read SmolLM2"}}
TOOLS = ("dev", "docs")  # extras that projgrad itself does not import


def pip_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


@cache
def declared(extra: str | None) -> frozenset[str]:
    """Return the packages of an extra, those of the extras in it too, or with None what is always required."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    names = set()
    for line in lines:
        if line.startswith("projgrad["):
            names |= set().union(*map(declared, line[len("projgrad[") : line.index("]")].split(",")))
        else:
            names.add(pip_name(line))
    return frozenset(names)


def imported(path: Path) -> set[str]:
    """Return the packages, as pip names them, that a file imports anywhere; those of Python and projgrad left out."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
    tops = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"projgrad"}
    return {PIP_NAMES.get(top, top).lower() for top in tops}


IMPORTS = {str(path.relative_to(ROOT)): imported(path) for path in sorted((ROOT / "projgrad").rglob("*.py"))}


def extras_of(file: str) -> list[str]:
    places = [place for place in PLACES if file == place or file.startswith(place + "/")]
    return PLACES[max(places, key=len)].split() if places else []


def test_every_import_is_declared_where_it_is_needed():
    undeclared = []
    for file, packages in IMPORTS.items():
        extras = extras_of(file)
        allowed = declared(None) | SAID.get(file, set()) | set().union(*map(declared, extras))
        where = " or ".join(["dependencies", *extras])
        undeclared += [f"{file} imports {package}: not in {where}" for package in packages - allowed]
    assert undeclared == []


def test_what_is_declared_is_imported():
    everything = set().union(*IMPORTS.values())
    assert declared(None) == {"torch", "triton"}
    for extra in PROJECT["optional-dependencies"].keys() - TOOLS:
        assert declared(extra) - everything == set(NOT_IMPORTED.get(extra, ())), extra


def test_dev_brings_what_the_tests_import():
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {path.name for path in (ROOT / "tests").rglob("*")}
    lacking = set()
    for path in (ROOT / "tests").rglob("*.py"):
        skipped = set(re.findall(r"importorskip\(\"(\w+)", path.read_text()))
        skipped = {PIP_NAMES.get(name, name).lower() for name in skipped}
        lacking |= imported(path) - declared("dev") - declared(None) - skipped - ours - {"bench"}
    assert lacking == set()


def test_a_package_has_the_same_bound_everywhere():
    bounds = {}
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for line in lines:
            if ">=" in line:
                bounds.setdefault(re.split(r"[\[>]", line)[0].lower(), set()).add(re.search(r">=[\d.]+", line)[0])
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


ALONE = """
import sys
sys.modules |= dict.fromkeys({blocked!r})
import torch
from torch.nn.functional import cross_entropy
import projgrad
from projgrad.experiments.cli import main

model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(8, 4), torch.arange(8) % 3
closures = lambda: cross_entropy(model(-x), y), lambda: cross_entropy(model(x), y, reduction="none")
for method in (projgrad.OrthoGrad(model, optimizer), projgrad.FeasibleUpdates(model, optimizer)):
    method.step(*closures)
pgu = projgrad.PGU(model, optimizer, gamma=0.6).fit([x]).forget([x[:2]])
pgu.step(lambda: (model(x[:2]), y[:2]))
for use in (lambda: pgu.save("cache"), lambda: pgu.load("cache", model, optimizer), lambda: projgrad.evaluate.scores):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
sys.exit(main(["doctor"]))
"""


def test_torch_alone_is_enough_and_the_rest_says_what_brings_it(tmp_path):
    blocked = [
        "jinja2",
        "matplotlib",
        "numpy",
        "rich",
        "safetensors",
        "scipy",
        "sklearn",
        "tqdm",
        "transformers",
        "yaml",
    ]
    command = [sys.executable, "-c", ALONE.format(blocked=blocked)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for message in (
        "PGU.save needs safetensors: pip install 'projgrad[cache]'",
        "PGU.load needs safetensors: pip install 'projgrad[cache]'",
        "projgrad.evaluate needs numpy: pip install 'projgrad[evaluate]'",
    ):
        assert message in done.stdout


def public_functions() -> dict[str, Callable]:
    """Return the public functions and methods, by the names under which users find them."""
    found, waiting = {}, {name: getattr(projgrad, name) for name in projgrad.__all__}
    while waiting:
        name, value = waiting.popitem()
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.ismodule(value):
            waiting |= {f"{name}.{inner}": getattr(value, inner) for inner in value.__all__}
        elif inspect.isclass(value):
            special = ("__init__", "__enter__", "__exit__")
            waiting |= {f"{name}.{n}": v for n, v in vars(value).items() if not n.startswith("_") or n in special}
    return found


def test_public_signatures_have_types():
    """A type checker takes what has none for anything: mistakes there are not seen."""
    lacking, functions = [], public_functions()
    assert {"gram", "Tape.project_", "PGU.load", "functional.conv2d", "evaluate.scores"} <= set(functions)
    for name, function in functions.items():
        signature = inspect.signature(function)
        given = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        lacking += [f"{name}: {p.name}" for p in given if p.annotation is p.empty]
        lacking += [name] if signature.return_annotation is signature.empty else []
    assert lacking == []


def test_every_public_name_is_shown_to_the_type_checker():
    text = (ROOT / "tests" / "public_types.py").read_text()
    assert [name for name in projgrad.__all__ if not re.search(rf"\b{name}\b", text)] == []


SETUP = """
import runpy, sys, types
{before}
runpy.run_path("setup.py")
"""
OLD = """
for name in ("torch", "torch.utils", "torch.utils.cpp_extension"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].__version__ = "2.10.1+cpu"
sys.modules["torch.utils"].cpp_extension = sys.modules["torch.utils.cpp_extension"]
for name in ("BuildExtension", "CppExtension", "CUDAExtension"):
    setattr(sys.modules["torch.utils.cpp_extension"], name, None)
"""


@pytest.mark.parametrize(
    "before, message",
    [
        ("sys.modules['pybind11'] = None", "building it needs pybind11, which is not installed. Run `pip install"),
        ("sys.modules['torch'] = None", "building it needs torch, which is not installed. Run `pip install"),
        (OLD, "building it needs torch 2.11 or later, and this is 2.10.1+cpu"),
    ],
    ids=["no pybind11", "no torch", "old torch"],
)
def test_what_a_build_lacks_is_said_in_one_line(before, message):
    for package in ("setuptools", "pybind11"):
        pytest.importorskip(package)
    command = [sys.executable, "-c", SETUP.format(before=before)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_build_asks_for_what_setup_needs():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    needed = imported(ROOT / "setup.py") | {"ninja"}  # torch's BuildExtension runs it
    assert {pip_name(line) for line in requires} == needed


def test_the_citation_names_this_version_and_the_papers():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == projgrad.__version__
    papers = {reference["url"]: reference for reference in citation["references"]}
    linked = set(re.findall(r"https://arxiv\.org/abs/\d{4}\.\d{5}", (ROOT / "README.md").read_text()))
    assert set(papers) == linked == set(PROJECT["urls"].values())
    assert all(len(paper["authors"]) >= 3 and paper["year"] >= 2024 for paper in papers.values())
