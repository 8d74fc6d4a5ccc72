"""What can be wrong with a package, a folder or a disk, in one line each."""

from __future__ import annotations

import errno
import re
import tempfile
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

# By the name under which Python imports it, where pip has another one.
PIP_NAMES = {
    "jinja2": "Jinja2",
    "markupsafe": "MarkupSafe",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
GO_ON = "make room, and give the same command again: what is finished is not run again"


class Unusable(Exception):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def missing(error: ImportError) -> str:
    """Name the package that an import asked for as pip names it, and the extra of projgrad that brings it."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not module:
        return f"a package cannot be imported: {first_line(error)}. Install it again"
    package = PIP_NAMES.get(module, module)
    extra = extra_with(package)
    if extra is None:
        return f"the package {package} is missing: pip install {package}"
    return f"the package {package} is missing: pip install 'projgrad[{extra}]', or pip install {package}"


def extra_with(package: str) -> str | None:
    """Return the first extra of projgrad that brings a package, as its metadata say; None where none does."""
    try:
        lines = requires("projgrad") or []
    except PackageNotFoundError:  # it runs from a folder that was never installed
        return None
    for line in lines:
        found = re.match(r"""([\w.-]+).*extra == ["']([\w-]+)["']""", line)
        if found and found[1].lower() == package.lower():
            return found[2]
    return None


def check_packages(*modules: str) -> None:
    """Raise ModuleNotFoundError for the first that is not installed, before hours of work."""
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)


def check_folder(out: Path) -> None:
    """Make the folder for results and write to it, before hours of work; raises Unusable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"x")
    except (FileExistsError, NotADirectoryError):
        place = next((path for path in (out, *out.parents) if path.is_symlink() or path.exists()), out)
        raise Unusable(f"--out {out}: {place} is not a folder; give one, or a name that is free") from None
    except OSError as error:
        raise Unusable(f"--out {out} cannot be written: {reason(error)}; give another folder") from None


def reason(error: OSError) -> str:
    return (error.strerror or first_line(error)).lower()


def of_disk(error: OSError) -> str:
    """Say what could not be read or written."""
    where = "" if error.filename is None else f"{error.filename}: "
    if error.errno in FULL:
        return f"{where}{reason(error)}; {GO_ON}"
    return where + (reason(error) if where else first_line(error))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
