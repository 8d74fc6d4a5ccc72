"""The documents are true: every example runs, every table is that of the results, every link leads somewhere."""

import csv
import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch

import projgrad

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(m.name for m in pkgutil.walk_packages(projgrad.__path__, "projgrad.") if not m.name.endswith("._C"))
OPTIONAL = {
    "recipes.md": ("transformers", "peft"),
    "transformers.md": ("transformers", "peft"),
    "tutorial_language_model.md": ("transformers",),
    "README.md": ("sklearn",),
    "api.md": ("sklearn",),
}


def examples(page: Path) -> str:
    """The ```python blocks of a page as one program, each on its own lines, so that an error names the right one."""
    program, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        program.append(line if inside else "")
    return "\n".join(program)


@pytest.mark.same_without_extension  # those of the docstrings run without it as well
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page).strip()], ids=lambda page: page.name)
def test_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    for package in OPTIONAL.get(page.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(examples(page), str(page), "exec"), {"__name__": "__main__"})


def test_readme_is_read_in_three_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert text.count("```python") >= 2


def test_readme_begins_with_its_worst_rows():
    with (ROOT / "bench" / "results" / "steps_cpu.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["contender"].startswith("projgrad")]
    beginning = (ROOT / "README.md").read_text().split("$$")[0]
    for unit in ("time", "memory"):
        assert f"{max(float(row[f'{unit}_over_plain']) for row in rows):.3g} x" in beginning, unit


def test_measured_tables_are_those_of_the_results():
    from bench.readme import ROOT, SECTIONS, written

    for file in SECTIONS:
        text = (ROOT / file).read_text()
        assert written(file, text) == text


def test_steps_measured_on_a_gpu_get_a_line_in_the_readme(tmp_path):
    from bench.gpu_readme import step_rows

    assert step_rows(tmp_path) == []
    (tmp_path / "gpu_steps.csv").write_text(
        "case,model,contender,ms,note,time_over_plain,total_over_plain,total_mb,model_mb,later_mb,device\n"
        "a,M,plain,100,,1,1,400,100,300,D\n"
        "a,M,projgrad global,250,,2.5,1.25,500,100,300,D\n"
    )
    assert step_rows(tmp_path) == [["M, bfloat16, D", "2.5 x", "1.25 x", "1 x", "not measured"]]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        where = (page.parent / file) if file else page
        assert where.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", where.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name} links to {target}"


def test_public_names_are_documented():
    text = "\n".join((ROOT / file).read_text() for file in ("README.md", "docs/api.md"))
    for name in projgrad.__all__:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(name), extraglobs={"projgrad": projgrad, "torch": torch})
    assert results.failed == 0


def test_public_functions_have_an_example():
    for name in ("gram", "gram_solve", "project_out", "OrthoGrad", "PGU", "FeasibleUpdates", "feasible"):
        assert "Example:" in getattr(projgrad, name).__doc__, name


def test_the_way_of_a_loss_leads_through_the_files_that_are_named():
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    rows = re.findall(r"^\| \d+ \| `(projgrad/[\w/]+\.py)` \| (.*) \|$", page, re.M)
    files = [file for file, _ in rows]
    assert len(set(files)) <= 14 and max(map(files.count, files)) <= 2
    model = torch.nn.Linear(4, 3)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    entered = set()

    def note(frame, event, _):
        entered.add((Path(frame.f_code.co_filename), frame.f_code.co_name))

    for _ in range(2):
        sys.setprofile(note)
        try:
            unlearner.step(
                lambda: torch.nn.functional.cross_entropy(model(-x), y),
                lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"),
            )
        finally:
            sys.setprofile(None)
    for file, what in rows:
        functions = {name for path, name in entered if path == ROOT / file}
        assert functions, file
        for name in re.findall(r"`(?:\w+\.)?([a-z_]+)`", what):
            if f"def {name}(" in (ROOT / file).read_text():
                assert name in functions, f"{file}: {name}"
