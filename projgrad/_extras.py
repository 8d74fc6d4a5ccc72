"""Packages that an extra of projgrad brings: where one is missing, the message says how to install it."""

from importlib.util import find_spec


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Raise ModuleNotFoundError where `what` needs a package that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{what} needs {package}: pip install 'projgrad[{extra}]'", name=package)
