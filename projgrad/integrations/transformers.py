"""A transformers Trainer that unlearns: `UnlearningTrainer`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

try:
    from accelerate.utils import send_to_device
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        PreTrainedTokenizerBase,
        Trainer,
        TrainingArguments,
    )
    from transformers.utils.logging import tqdm
except ImportError as error:
    raise ImportError("projgrad.integrations.transformers needs transformers: pip install 'projgrad[hf]'") from error

from .. import _options
from .methods import Losses
from .pairs import PairCollator, PairedBatches, Pairs, columns_of
from .sample_checks import check_columns, check_labels, check_loss, has_labels, warn_of_company
from .token_losses import Batch, sample_losses, token_sums
from .training_steps import UnlearningSteps

__all__ = ["UnlearningSteps", "UnlearningTrainer", "sample_losses", "token_sums"]


class UnlearningTrainer(UnlearningSteps, Trainer):
    """A Trainer whose steps forget one data set and keep what another one holds.

    Everything else is as in `transformers.Trainer`: batch sizes, accumulation, bf16, checkpoints, clipping, schedules,
    evaluation, callbacks, resuming, adapters of peft, several processes. An epoch passes over the forget set
    once. Logs hold forget_loss, retain_loss, and of projections rank, preserved_norm and residual.

    Args:
        model, args, data_collator, eval_dataset, processing_class and others: as for `transformers.Trainer`.
            data_collator makes a batch with "labels" of samples of one side; the default pads them, with -100.
        forget_dataset, retain_dataset: samples by number, as dictionaries or what data_collator takes. Gradient ascent
            needs no retain_dataset.
        method: "orthograd", "pgu", "feasible", "grad_ascent", "graddiff", "neggrad", "npo", "simnpo" or "finetune".
        method_options: options of the method, such as {"alpha": 0.8, "scope": "per_tensor"}: those of `OrthoGrad`, of
            `PGU` or of `FeasibleUpdates`; alpha and gamma, weights of the retain and of the forget loss, of graddiff,
            npo (also beta) and simnpo (beta, delta); alpha of neggrad. OrthoGrad's metric is "optimizer" unless
            given: what AdamW applies is orthogonal.
        retain_batch_size: retain samples n of a micro-batch in a process; default: per_device_train_batch_size.
        losses: function (model, batch) that returns the loss of every sample, (n,); default: `sample_losses`.

    Raises:
        TypeError, ValueError: an unknown method or option; data sets that are empty, not indexed by number, or whose
            samples have no labels; a tokenizer without pad token; a method that does not fit the model, the optimizer
            or the arguments.

    Source: the place of a projection in a Trainer is `training_step`; see docs/transformers.md.
    """

    makes_batches = True

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        *,
        forget_dataset: Any,
        retain_dataset: Any = None,
        method: str = "orthograd",
        method_options: Mapping[str, Any] | None = None,
        retain_batch_size: int | None = None,
        losses: Losses | None = None,
        **options: Any,
    ) -> None:
        if "train_dataset" in options:
            raise TypeError("UnlearningTrainer takes forget_dataset and retain_dataset, no train_dataset")
        self._pairs = Pairs(forget_dataset, retain_dataset)
        if data_collator is None:
            data_collator = _collator(options.get("processing_class"))
        super().__init__(model, args, data_collator, self._pairs, **options)
        strategy = _strategy(self.args)
        if retain_batch_size is None:
            retain_batch_size = self.args.per_device_train_batch_size
        columns = columns_of(self.model) if self.args.remove_unused_columns else None
        self._collate = PairCollator(self.data_collator, self._pairs, columns)
        self._batches = PairedBatches(
            self._pairs,
            self.args.per_device_train_batch_size,
            0 if retain_dataset is None else _options.check_integer("retain_batch_size", retain_batch_size, 1),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=self._epoch,
            shuffle=strategy == "random",
            drop_last=self.args.dataloader_drop_last,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        self._is_prepared = False
        if losses is None:
            self._check_samples("forget_dataset", forget_dataset, "forget", 0)
            if retain_dataset is not None:
                self._check_samples("retain_dataset", retain_dataset, "retain", len(self._pairs))
        self.unlearn_by(method, method_options, losses)
        if retain_dataset is None and self.unlearning_method.needs_retain:
            raise ValueError(f"method={method!r} takes its steps on retain samples too: give retain_dataset")
        if self.unlearning_method.starts and self.model_init is not None:
            raise ValueError(f"method={method!r} reads the model before it unlearns: give model, not model_init")

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of one epoch: dictionaries of a forget and a retain batch."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self._pairs,
            batch_sampler=self._batches,
            collate_fn=self._collate,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as `Trainer.train`; what a method needs of the model before it unlearns comes first."""
        self._window, self._numbers = [], []
        if not self._is_prepared:
            self.unlearning_method.prepare(self, self._one_by_one("forget"), self._one_by_one("retain"))
            self._is_prepared = True
        return super().train(*args, **options)

    def _one_by_one(self, side: str) -> Iterator[Batch]:
        """Yield the samples of one side in batches of one, which need no padding."""
        first, device = len(self._pairs), next(self.model.parameters()).device
        positions = range(first) if side == "forget" else range(first, first + len(self._pairs.retain))
        for k in tqdm(positions, f"Reading the {side} set", disable=self.args.disable_tqdm):
            yield send_to_device(self._collate([self._pairs[k]])[side], device)

    def _epoch(self) -> int:
        updates = -(-len(self._batches) // self.args.gradient_accumulation_steps)
        return self.state.global_step // updates

    def _check_samples(self, name: str, data: Any, side: str, position: int) -> None:
        """Check the samples of one side; their losses are tried on the first one and on two of different lengths.

        position: in the pairs, of one of the side.
        """
        device = next(self.model.parameters()).device

        def collate(samples: list[Any]) -> Batch:
            return send_to_device(self._collate([(position, sample) for sample in samples])[side], device)

        check_columns(name, data, self._collate.columns, self.model)
        samples = [data[k] for k in range(min(8, len(data)))]
        batch = collate(samples[:1])
        for sample in samples[1:]:  # a collator that masks at random may leave a short one without labels
            if has_labels(self.model, batch):
                break
            batch = collate([sample])
        check_labels(name, batch, self.model)
        if not self.is_fsdp_enabled and device.type != "meta":  # else the weights may not be here yet
            check_loss(self.model, batch)
            warn_of_company(self.model, collate, samples)


def _strategy(args: TrainingArguments) -> str:
    """Return how samples are drawn; raises ValueError for what is made for batches of one data set."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential") or getattr(args, "group_by_length", False):
        raise ValueError(
            f"samples are drawn at random or in sequence, not by {strategy!r}: leave out what orders them by length"
        )
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size changes one of two batch sizes: give per_device_train_batch_size")
    if getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False):
        raise ValueError("include_num_input_tokens_seen does not count the tokens of two batches: leave it out")
    return strategy


def _collator(tokenizer: object) -> Callable[[list[Any]], Batch] | None:
    """Return a collator that pads labels and token_weights too; None, for the Trainer's own, without a tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token")
    pad_with_labels, pad = DataCollatorForSeq2Seq(tokenizer), DataCollatorWithPadding(tokenizer)

    def collate(samples: list[Any]) -> Batch:
        labels = torch.as_tensor(samples[0].get("labels", samples[0].get("label", 0)))
        if not labels.ndim or labels.is_floating_point():  # of a sample as a whole
            return pad(samples)
        weights = [list(sample["token_weights"]) for sample in samples if "token_weights" in sample]
        plain = [{name: value for name, value in sample.items() if name != "token_weights"} for sample in samples]
        batch = pad_with_labels(plain)
        if weights:
            fills = [[0.0] * (batch["labels"].shape[1] - len(row)) for row in weights]
            is_right = tokenizer.padding_side == "right"
            rows = [row + fill if is_right else fill + row for row, fill in zip(weights, fills, strict=True)]
            batch["token_weights"] = torch.tensor(rows, dtype=torch.float32)
        return batch

    return collate
