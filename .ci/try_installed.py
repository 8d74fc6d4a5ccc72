"""Tries the projgrad that is installed, for dist_check.py.

try_installed.py imports                      every module, where only torch is
try_installed.py plain|extension README.md    version, data, whether the extension is there, the examples of the page
"""

import importlib
import pkgutil
import re
import sys
from importlib import metadata, resources
from pathlib import Path

import projgrad
from projgrad.kernels import extension


def imports() -> None:
    """Import every module: what others lack must be in an extra."""
    count, lacking = 0, set()
    for module in pkgutil.walk_packages(projgrad.__path__, "projgrad.", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
            count += 1
        except ImportError as error:
            cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
            lacking.add(cause.name.partition(".")[0])
    lines = metadata.requires("projgrad")
    optional = {re.match(r"[\w-]+", line)[0].lower() for line in lines if "extra ==" in line}
    assert lacking <= optional, f"imports need {lacking - optional} too"
    assert count > 100, count
    print(f"  {count} modules imported beside torch alone; others need {', '.join(sorted(lacking))}")


def use(built: str, readme: str) -> None:
    """Check what is installed, and run the examples of a page in order."""
    assert projgrad.__version__ == metadata.version("projgrad")
    assert (extension() is not None) == (built == "extension")
    assert resources.files("projgrad").joinpath("py.typed").is_file()
    program, inside = [], False
    for line in Path(readme).read_text().splitlines():
        if line.startswith("```"):
            inside, line = line == "```python", ""
        program.append(line if inside else "")
    exec(compile("\n".join(program), readme, "exec"), {"__name__": "__main__"})


assert Path(projgrad.__file__).is_relative_to(sys.prefix), projgrad.__file__
imports() if sys.argv[1] == "imports" else use(*sys.argv[1:])
