"""Hooks of the site: files beside docs/ become pages, formulas MathML, and docstrings Markdown."""

import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SCRIPTS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "examples").rglob("*") if p.suffix in (".py", ".yaml"))
PICTURES = sorted(f"bench/results/{p.name}" for p in (ROOT / "bench/results").iterdir() if p.suffix in (".png", ".svg"))
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
            continue
        text = (ROOT / path).read_text()
        if path in SCRIPTS:
            text = f"# {path}\n\n```{Path(path).suffix[1:]}\n{text}```\n"
        files.append(File.generated(config, page, content=text))
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
    """Reads the house's docstrings as Google's, with formulas as code and lines such as "n: samples" as lists."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = "\n\n".join(map(self.paragraph, text.split("\n\n")))

    def paragraph(self, text):
        if re.fullmatch(r"(?!\s|\w+:)[^`\n]* [=←] [^`\n]*[^.:`\n](\n[^`.\n]+)*", text):
            return re.sub(r"^", "    ", text, flags=re.MULTILINE)
        if re.match(r"[a-z_]+(, [a-z_]+)*: ", text):
            return re.sub(r"^([a-z_]+(?:, [a-z_]+)*): ", r"- **\1**: ", text, flags=re.MULTILINE)
        return text
