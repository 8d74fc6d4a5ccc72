"""Stratified splits by seed."""

import numpy as np


def train_validation_test(labels: np.ndarray, shares: tuple[float, float, float], seed: int) -> list[np.ndarray]:
    """Return test indices that do not depend on the seed, and a seeded split of the others."""
    rest, test = split(labels, (1 - shares[2], shares[2]), 0)
    return [*(rest[rows] for rows in split(labels[rest], shares[:2], seed)), test]


def split(labels: np.ndarray, shares: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Return disjoint index sets that together hold everything, each with the class proportions of the whole."""
    from sklearn.model_selection import train_test_split

    parts, rest = [], np.arange(len(labels))
    for i, share in enumerate(shares[:-1]):
        size = round(share / sum(shares[i:]) * len(rest))
        part, rest = train_test_split(rest, train_size=size, stratify=labels[rest], random_state=seed)
        parts.append(part)
    return [*parts, rest]


def wrong_labels(labels: np.ndarray, rows: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Return a copy of the labels in which those of the rows are another class, uniformly."""
    labels = labels.copy()
    labels[rows] = (labels[rows] + np.random.default_rng(seed).integers(1, classes, len(rows))) % classes
    return labels
