"""The site: every page is in its navigation, every refusal is explained, and it builds without a network."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import projgrad

pytestmark = pytest.mark.same_without_extension
ROOT = Path(__file__).parent.parent
REFUSING = ("recording", "tape", "methods", "integrations")


def test_every_page_is_in_the_navigation_and_every_entry_exists():
    entries = re.findall(r"([\w./]+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2], re.MULTILINE)
    assert len(set(entries)) == len(entries)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {*entries}, f"add to nav of mkdocs.yml: {sorted(pages - {*entries})}"
    beside = {name.lower() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    for entry in {*entries} - pages - beside:  # scripts, which docs/hooks.py makes pages of
        assert entry.startswith("examples/") and (ROOT / entry.removesuffix(".md")).is_file(), entry


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text()
    for name in projgrad.__all__:
        assert name == "__version__" or f"::: projgrad.{name}\n" in page, name


def test_worst_numbers_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in ("index.md", "limitations.md"):
        numbers = re.findall(r"up to ([\d.]+) times (?:one without|a plain step's)", (ROOT / "docs" / page).read_text())
        assert numbers, page
        for number in numbers:
            assert f"{number} x" in readme, f"{page}: {number}"


def words(node: ast.AST) -> str:
    """Return the text of a message, with … for what is only known when it is raised."""
    if isinstance(node, ast.Constant):
        return re.sub(r"\{\w*\}", "…", str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words, node.values))
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "…"


def beginning(message: str) -> str:
    """Return a message up to the end of its first clause that says something."""
    for end in re.finditer(r": |; |\. | \(|, so|$", message):
        if len(re.sub(r"[^A-Za-z]", "", message[: end.start()])) >= 12:
            return message[: end.start()]
    return message


def messages() -> dict[str, str]:
    """Return the beginnings of all messages of errors and warnings, with where they are."""
    found = {}
    for room in REFUSING:
        for file in sorted((ROOT / "projgrad" / room).rglob("*.py")):
            tree = ast.parse(file.read_text())
            given = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
            given += [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "warnings.warn"]
            if file.name == "refusals.py":
                given = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and not isinstance(n.value, ast.Dict)]
            for node in given:
                text = words(node.value if isinstance(node, ast.Assign) else node.args[0]) if node else ""
                if re.search(r"\w{3}", text):
                    found[beginning(text)] = f"{file.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_refusal_is_explained():
    found, page = messages(), " ".join((ROOT / "docs" / "refused.md").read_text().split())
    assert len(found) > 150
    missing = {text: where for text, where in found.items() if text not in page}
    assert not missing, "add to docs/refused.md:\n" + "\n".join(
        f"{text}   ({where})" for text, where in missing.items()
    )


def test_every_message_on_the_page_is_one_that_is_raised():
    """A row whose message was changed or dropped goes."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "projgrad").rglob("*.py")]
    constants = [n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    sources = "\n".join(value for value in constants if isinstance(value, str))
    page = (ROOT / "docs" / "refused.md").read_text().partition("## The retain losses")[2]
    for row in re.findall(r"^\| (`+)(.+?)\1", page, re.MULTILINE):
        for part in re.split(r"…", row[1].strip()):
            assert part.strip(" .:,()[]") in sources, row[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the site, with all warnings errors: links, headings, pages that nothing leads to."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'projgrad[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_needs_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag), f"{page.name}: {tag}"


def test_site_has_formulas_tables_and_the_reference(site):
    assert "<math" in (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        html = (site / f"{page.stem}.html").read_text()
        outside = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert html.count("<table>") == len(re.findall(r"^\|[ :]*-", outside, re.MULTILINE)), page.name
    reference = (site / "reference.html").read_text()
    for name in projgrad.__all__:
        assert name == "__version__" or f'id="projgrad.{name}"' in reference, name
