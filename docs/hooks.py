"""What `mkdocs build` needs besides mkdocs.yml: files beside docs/ become pages, formulas MathML, docstrings Markdown."""

import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SCRIPTS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "examples").rglob("*") if p.suffix in (".py", ".yaml"))
PICTURES = sorted(
    p.relative_to(ROOT).as_posix() for p in (ROOT / "bench/results").iterdir() if p.suffix in (".png", ".svg")
)
PAGES = {  # where a file of the repository is in the site
    **{name: name.lower() for name in DOCUMENTS},
    **{path: f"{path}.md" for path in SCRIPTS},
    **{path: path.removeprefix("bench/") for path in PICTURES},
}


def on_files(files, config):
    """Add what lies beside docs/: documents, scripts as code, pictures."""
    for path, page in PAGES.items():
        if path in PICTURES:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
        elif path in SCRIPTS:
            language = {".py": "python", ".yaml": "yaml"}[Path(path).suffix]
            code = f"# {path}\n\n```{language}\n{(ROOT / path).read_text()}```\n"
            files.append(File.generated(config, page, content=code))
        else:
            files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to where files are in the site, make MathML of formulas, and drop the comments around tables."""
    folder = "" if page.file.src_uri in PAGES.values() else "docs"

    def link(match):
        path, _, heading = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        target = PAGES.get(path, path.removeprefix("docs/"))
        return f"]({target}{'#' * bool(heading)}{heading})"

    if not page.file.src_uri.startswith("examples/"):
        markdown = re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", link, markdown)
    markdown = re.sub(r"\$\$(.+?)\$\$", lambda match: convert(match[1], display="block"), markdown)
    return re.sub(r"^<!-- .* -->$", "", markdown, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Reads the house's docstrings as Google's: one example under "Example:", formulas in paragraphs of their own."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            paragraphs = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE).split("\n\n")
            formula = re.compile(r"(?!\s|\w+:)[^`\n]* [=←] [^`\n]*[^.:`\n](\n[^`.\n]+)*")
            obj.docstring.value = "\n\n".join(
                re.sub(r"^", "    ", text, flags=re.MULTILINE) if formula.fullmatch(text) else text
                for text in paragraphs
            )
