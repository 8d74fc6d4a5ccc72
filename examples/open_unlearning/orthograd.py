"""OrthoGrad as a trainer of open-unlearning: copy this file to src/trainer/unlearn/orthograd.py."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from trainer.unlearn.base import UnlearnTrainer

from projgrad.integrations.transformers import UnlearningSteps

USED = ("input_ids", "attention_mask", "labels")  # batches also hold the numbers of their samples


class RetainSamples(Dataset):
    """The framework's pairs of a forget and a retain sample, with more retain samples drawn beside each."""

    def __init__(self, pairs: Dataset, more: int) -> None:
        self.pairs, self.more = pairs, more

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> dict[str, list[Any]]:
        pair, retain = self.pairs[k], self.pairs.retain
        drawn = torch.randperm(len(retain))[: self.more].tolist()
        return {"forget": [pair["forget"]], "retain": [pair["retain"], *(retain[j] for j in drawn)]}


class OrthoGrad(UnlearningSteps, UnlearnTrainer):
    """Takes the steps of `projgrad.OrthoGrad` on the framework's batches.

    Args:
        retain_per_forget: retain samples for each forget sample of a batch; n of a step is this times the batch size,
            the accumulation steps and the processes. The framework's own data set has one.
        method, options: method of `UnlearningTrainer`, and its options, such as alpha.
        args, kwargs: of the framework's trainers.
    """

    def __init__(
        self, *args: Any, retain_per_forget: int = 1, method: str = "orthograd", options: Any = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        if retain_per_forget > 1:
            self.train_dataset = RetainSamples(self.train_dataset, retain_per_forget - 1)
            self.data_collator = _sides(self.data_collator)
        self.unlearn_by(method, dict(options or {}))

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        sides = {side: {name: inputs[side][name] for name in USED} for side in ("forget", "retain")}
        return super().training_step(model, sides, *args, **kwargs)


def _sides(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], dict[str, Any]]:
    """Return a collator for lists of samples of each side."""

    def both(items: list[dict[str, list[Any]]]) -> dict[str, Any]:
        return {side: collate([sample for item in items for sample in item[side]]) for side in ("forget", "retain")}

    return both
