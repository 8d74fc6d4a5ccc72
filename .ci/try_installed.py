"""Tries an installed projgrad: try_installed.py plain|extension README.md [examples]. See dist_check.py."""

import importlib
import pkgutil
import sys
from importlib import metadata, resources
from pathlib import Path

import projgrad
from projgrad.kernels import extension


def imported() -> tuple[int, set[str]]:
    """Import every module; return how many could be, and the packages that others lack."""
    count, lacking = 0, set()
    for module in pkgutil.walk_packages(projgrad.__path__, "projgrad.", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
            count += 1
        except ImportError as error:
            cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
            lacking.add(cause.name.partition(".")[0])
    return count, lacking


def main(built: str, readme: str, *what: str) -> None:
    assert Path(projgrad.__file__).is_relative_to(sys.prefix), projgrad.__file__
    if what:
        text, program, inside = Path(readme).read_text(), [], False
        for line in text.splitlines():
            if line.startswith("```"):
                inside, line = line == "```python", ""
            program.append(line if inside else "")
        exec(compile("\n".join(program), readme, "exec"), {"__name__": "__main__"})
        return
    assert projgrad.__version__ == metadata.version("projgrad")
    assert (extension() is not None) == (built == "extension")
    assert resources.files("projgrad").joinpath("py.typed").is_file()
    count, lacking = imported()
    optional = {"accelerate", "numpy", "transformers"}
    assert lacking <= optional, f"imports need {lacking - optional} too"
    assert count > 100, count
    print(f"  {count} modules imported beside torch alone; others need {', '.join(sorted(lacking))}")


main(*sys.argv[1:])
