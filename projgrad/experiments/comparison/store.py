"""Files that are complete or absent: JSON and models, written atomically. A damaged one is set aside, never deleted."""

import errno
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..._atomic import replacing


class DamagedFile(UserWarning):
    """A file that could not be used was renamed, and what it held is made again."""


def write_json(path: Path, content: Any) -> None:
    """Write a file in one step: a reader, or an interruption, finds the old file or the new one."""
    with _written(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any | None:
    return json.loads(path.read_text()) if path.exists() else None


def read_or_set_aside(path: Path, is_whole: Callable[[Any], bool]) -> Any | None:
    """Return what a file of an earlier call holds; None where it is absent, and where it is damaged and set aside.

    is_whole: whether the content has all that its reader needs.
    """
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except (ValueError, RecursionError) as error:  # no JSON, or no text at all
        return _set_aside(path, str(error))
    except IsADirectoryError:
        return _set_aside(path, "a folder")
    return content if is_whole(content) else _set_aside(path, "something that should be there is missing")


def save_model(path: Path, model: nn.Module) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    with _written(path) as partial:
        try:
            save_model(model, str(partial))
        except SafetensorError as error:  # a full disk too is one of these
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def load_model(path: Path, model: nn.Module) -> nn.Module:
    from safetensors.torch import load_model

    load_model(model, str(path))
    return model


def load_or_set_aside(path: Path, build: Callable[[], nn.Module]) -> nn.Module | None:
    """Return a model of an earlier call; None where the file is absent, and where it is damaged and set aside."""
    from safetensors import SafetensorError

    if not path.exists():
        return None
    if path.is_dir():
        return _set_aside(path, "a folder")
    model = build()
    try:
        return load_model(path, model)
    except (SafetensorError, RuntimeError) as error:  # not such a file; the tensors of another model
        return _set_aside(path, str(error))


def _set_aside(path: Path, why: str) -> None:
    """Give a damaged file a free name beside its own, and say so."""
    endings = itertools.chain([""], (f"-{count}" for count in itertools.count(2)))
    names = (path.with_name(f"{path.name}.damaged{ending}") for ending in endings)
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    reason = (why.strip().splitlines() or ["empty"])[0].rstrip(":.")
    warnings.warn(f"{path} is damaged ({reason}): set aside as {aside.name}, and made again", DamagedFile, stacklevel=4)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Make the folder and the file; an error of the system names the file itself, not the partial one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        if error.errno is not None and error.errno != errno.EEXIST:
            error.filename = str(path)
        raise
