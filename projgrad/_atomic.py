"""Files that are complete or absent, whoever else writes them at the same time."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """Give a path to write to, and move what is written there to `path` in one step.

    A reader, or an interruption, finds the old file or the new one; after an error the partial file is removed. Its
    name is unique, so that several processes can write one file: the last one stays. A link stays a link.

    durable: the file survives the machine's end as soon as this returns.
    Raises FileExistsError where `path` is something else than a file.
    """
    target = Path(path).resolve()  # a link stays one
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{path} is not a file and cannot be replaced by one")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # by the umask, whatever the writer gives its files
        yield partial
        partial.chmod(mode)
        if durable:
            _to_disk(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        _to_disk(target.parent)


def _to_disk(path: Path) -> None:
    """Write a file's contents, or the names in a folder, to the disk: they survive the machine's end."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
