"""Every example in the README and in the docstrings runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import projgrad

README = Path(__file__).parent.parent / "README.md"
MODULES = sorted(m.name for m in pkgutil.walk_packages(projgrad.__path__, "projgrad.") if not m.name.endswith("._C"))
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_readme_has_examples():
    assert len(EXAMPLES) >= 3


def test_readme(tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for example in EXAMPLES:
        exec(compile(example, str(README), "exec"), namespace)


def test_measured_tables_are_those_of_the_results():
    from bench.readme import ROOT, SECTIONS, written

    for file in SECTIONS:
        text = (ROOT / file).read_text()
        assert written(file, text) == text


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    results = doctest.testmod(importlib.import_module(name), extraglobs={"projgrad": projgrad, "torch": torch})
    assert results.failed == 0


def test_public_functions_have_an_example():
    for name in ("gram", "gram_solve", "project_out", "OrthoGrad", "PGU", "FeasibleUpdates", "feasible"):
        assert "Example:" in getattr(projgrad, name).__doc__, name
