"""A forget set with retain samples beside it: one data set, its batches, and how they are collated."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from .token_losses import Batch, forward_of

Collator = Callable[[list[Any]], Batch]
EXTRA = ("labels", "label", "label_ids", "token_weights")  # columns that are no arguments of the model, and are used


class Pairs(Dataset):
    """Forget samples, at 0 to len - 1, and behind them retain samples: an epoch passes over the forget set.

    Items are (position, sample). Without retain samples (None) batches have the forget side alone.
    """

    def __init__(self, forget: Sequence[Any], retain: Sequence[Any] | None) -> None:
        for name, data in ("forget_dataset", forget), ("retain_dataset", retain):
            if data is None and name == "retain_dataset":
                continue
            if isinstance(data, Mapping) or not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
                raise TypeError(
                    f"{name} must have a length and items by number; got {type(data).__name__}: make a list of its "
                    "samples"
                )
            if not len(data):
                raise ValueError(f"{name} is empty")
        self.forget, self.retain = forget, () if retain is None else retain

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, k: int) -> tuple[int, Any]:
        return k, self.forget[k] if k < len(self) else self.retain[k - len(self)]


class PairedBatches(Sampler):
    """Positions in `Pairs` by micro-batch: of forget samples, each once an epoch, and of retain samples.

    Retain samples come in a shuffled order, anew before one would come twice in a micro-batch. The order depends on
    the seed and the epoch alone. Over several processes each has its part of every micro-batch, of equal sizes: the
    last one of an epoch is filled up from the first.

    Args:
        pairs: what to draw from.
        forget_size, retain_size: of a micro-batch in one process.
        epoch: says which epoch begins.
    """

    def __init__(
        self,
        pairs: Pairs,
        forget_size: int,
        retain_size: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pairs, self.seed, self.epoch, self.shuffle, self.drop_last = pairs, seed, epoch, shuffle, drop_last
        self.rank, self.world = rank, world
        self.forget_size, self.retain_size = forget_size * world, retain_size * world
        if self.retain_size > len(pairs.retain):
            raise ValueError(
                f"{self.retain_size} retain samples are asked for in a micro-batch, but retain_dataset has "
                f"{len(pairs.retain)}: set a smaller retain_batch_size"
            )
        if not len(self):
            raise ValueError(f"no batch of {self.forget_size} forget samples is full: drop_last leaves none")

    def __len__(self) -> int:
        whole, rest = divmod(len(self.pairs), self.forget_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 24) + self.epoch())

        def order(size: int) -> Tensor:
            return torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)

        forgets = order(len(self.pairs))
        forgets = forgets.repeat(1 + self.world)[: len(forgets) + -len(forgets) % self.world]
        retains = forgets[:0]
        for k in range(len(self)):
            if len(retains) < self.retain_size:
                retains = order(len(self.pairs.retain)) + len(self.pairs)
            drawn = forgets[k * self.forget_size : (k + 1) * self.forget_size], retains[: self.retain_size]
            retains = retains[self.retain_size :]
            yield torch.cat([part[self.rank :: self.world] for part in drawn]).tolist()


class PairCollator:
    """Makes {"forget": batch, "retain": batch, "positions": of the forget samples} of items of `Pairs`.

    collate: of the user, for samples of one side. columns: that are kept of samples that are dictionaries, or None.
    """

    def __init__(self, collate: Collator, pairs: Pairs, columns: frozenset[str] | None) -> None:
        self.collate, self.forgets, self.columns = collate, len(pairs), columns

    def __call__(self, items: list[tuple[int, Any]]) -> dict[str, Any]:
        sides: dict[str, list[Any]] = {"forget": [], "retain": []}
        for k, sample in items:
            sides["forget" if k < self.forgets else "retain"].append(self._kept(sample))
        batch = {name: self.collate([self._kept(x) for x in samples]) for name, samples in sides.items() if samples}
        return {**batch, "positions": torch.tensor([k for k, _ in items if k < self.forgets])}

    def _kept(self, sample: Any) -> Any:
        if self.columns is None or not isinstance(sample, Mapping):
            return sample
        return {name: value for name, value in sample.items() if name in self.columns}


def columns_of(model: nn.Module) -> frozenset[str]:
    """Return the columns of samples that a model of transformers, or peft around one, can use."""
    return frozenset({*inspect.signature(forward_of(model)).parameters, *EXTRA})
