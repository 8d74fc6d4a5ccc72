"""PGU's file: safetensors with a description as JSON, and a checksum over every byte of it."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._atomic import replacing
from ..._extras import check_installed

FORMAT = 2  # 1 had neither a checksum nor the arithmetic of the fit
EMPTY = "0" * 64  # stands where the checksum will be, and is what its place counts as
CHECKSUM = re.compile(rb'"blake2b":"([0-9a-f]{64})"')
PIECE = 1 << 20  # bytes read at once
HEADER = 100_000_000  # bytes that safetensors takes at most
AGAIN = "Take a copy of the file, or call fit() with the training data and save() again"


def write(path: str | os.PathLike, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file that is complete or not there at all, and safe from the machine's end when this returns."""
    check_installed("PGU.save", "cache", "safetensors", "numpy")  # safetensors.torch imports numpy where it writes
    from safetensors.torch import save_file

    hosts = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    with replacing(path, durable=True) as partial:
        save_file(hosts, partial, {"pgu": json.dumps({"format": FORMAT, **about}), "blake2b": EMPTY})
        start, _ = _checksum(partial)
        digest = _digest(partial, start)
        with partial.open("r+b") as file:
            file.seek(start)
            file.write(digest)


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors.

    Raises FileNotFoundError, ValueError for another file, another format, or one that is not as it was written, and
    ModuleNotFoundError where safetensors is not installed.
    """
    check_installed("PGU.load", "cache", "safetensors")
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise (IsADirectoryError if path.exists() else FileNotFoundError)(f"no cache of PGU: {path}")
    checksum = _checksum(path)
    if checksum is not None and _digest(path, checksum[0]) != checksum[1]:
        raise ValueError(f"{path} is not as it was written: its checksum does not match. {AGAIN}")
    try:
        with safe_open(path, "pt") as file:
            about = _description((file.metadata() or {}).get("pgu", "{}"))
            if about.get("format") == 1:
                raise ValueError(
                    f"{path} was saved by an earlier version, without a checksum: damage to it could not be told. Call "
                    "fit() with the training data, forget() with what was deleted, and save() again"
                )
            if checksum is None or about.get("format") != FORMAT:
                raise ValueError(f"{path} is not a cache of PGU in format {FORMAT}, or is damaged. {AGAIN}")
            return about, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete cache of PGU: {error}. {AGAIN}") from None


def _description(text: str) -> dict[str, Any]:
    """Return a description; an empty one for what is none, also for brackets without end and endless numbers."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _checksum(path: Path) -> tuple[int, bytes] | None:
    """Return where the checksum is, and what it is; None where the header has none, or more than one."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(HEADER, path.stat().st_size - 8):
            return None
        matches = list(CHECKSUM.finditer(file.read(size)))
    return (8 + matches[0].start(1), matches[0][1]) if len(matches) == 1 else None


def _digest(path: Path, start: int) -> bytes:
    """Return the BLAKE2b of all bytes, in hexadecimal, with zeros in the place of the checksum itself."""
    digest = hashlib.blake2b(digest_size=len(EMPTY) // 2)
    with path.open("rb") as file:
        digest.update(file.read(start))
        file.seek(len(EMPTY), os.SEEK_CUR)
        digest.update(EMPTY.encode())
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest().encode()
