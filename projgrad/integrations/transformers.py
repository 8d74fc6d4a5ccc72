"""A transformers Trainer that unlearns: `UnlearningTrainer`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

try:
    from accelerate.utils import send_to_device
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, TrainingArguments
    from transformers.utils.logging import tqdm
except ImportError as error:
    raise ImportError("projgrad.integrations.transformers needs transformers: pip install 'projgrad[hf]'") from error

from .methods import Losses
from .pairs import PairCollator, PairedBatches, Pairs, columns_of
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
        forget_dataset, retain_dataset: samples by number, as dictionaries or what data_collator takes.
        method: "orthograd", "pgu", "feasible", "grad_ascent", "graddiff", "neggrad", "npo", "simnpo" or "finetune".
        method_options: options of the method, such as {"alpha": 0.8, "scope": "per_tensor"}: those of `OrthoGrad`, of
            `PGU` or of `FeasibleUpdates`; alpha and gamma, weights of the retain and of the forget loss, of graddiff,
            npo (also beta) and simnpo (beta, delta); alpha of neggrad. OrthoGrad's metric is "optimizer" unless
            given: what AdamW applies is orthogonal.
        retain_batch_size: retain samples n of a micro-batch in a process; default: per_device_train_batch_size.
        losses: function (model, batch) that returns the loss of every sample, (n,).

    Raises:
        TypeError, ValueError: an unknown method or option; data sets that are empty, not indexed by number, or whose
            samples have no labels; a tokenizer without pad token; a method that does not fit the model, the optimizer
            or the arguments.

    Source: the place of a projection in a Trainer is `training_step`; see docs/transformers.md.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        *,
        forget_dataset: Any,
        retain_dataset: Any,
        method: str = "orthograd",
        method_options: Mapping[str, Any] | None = None,
        retain_batch_size: int | None = None,
        losses: Losses = sample_losses,
        **options: Any,
    ) -> None:
        if "train_dataset" in options:
            raise TypeError("UnlearningTrainer takes forget_dataset and retain_dataset, no train_dataset")
        self.pairs = Pairs(forget_dataset, retain_dataset)
        if data_collator is None:
            data_collator = _collator(options.get("processing_class"))
        super().__init__(model, args, data_collator, self.pairs, **options)
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy not in ("random", "sequential") or getattr(self.args, "group_by_length", False):
            raise ValueError(f"samples are drawn at random or in sequence; got train_sampling_strategy={strategy!r}")
        if self.args.auto_find_batch_size:
            raise ValueError("auto_find_batch_size changes one of two batch sizes: give per_device_train_batch_size")
        columns = columns_of(self.model) if self.args.remove_unused_columns else None
        self.collate_pairs = PairCollator(self.data_collator, self.pairs, columns)
        self.batches = PairedBatches(
            self.pairs,
            self.args.per_device_train_batch_size,
            retain_batch_size or self.args.per_device_train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=self._epoch,
            shuffle=strategy == "random",
            drop_last=self.args.dataloader_drop_last,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        self._is_prepared = False
        self._check_samples(losses)
        self.unlearn_by(method, method_options, losses)

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of one epoch: dictionaries of a forget and a retain batch."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.pairs,
            batch_sampler=self.batches,
            collate_fn=self.collate_pairs,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as `Trainer.train`; what a method needs of the model before it unlearns comes first."""
        self.window, self.numbers = [], []
        if not self._is_prepared:
            self.method.prepare(self, self._one_by_one("forget"), self._one_by_one("retain"))
            self._is_prepared = True
        return super().train(*args, **options)

    def _one_by_one(self, side: str) -> Iterator[Batch]:
        """Yield the samples of one side in batches of one, which need no padding."""
        first, device = len(self.pairs), next(self.model.parameters()).device
        positions = range(first) if side == "forget" else range(first, first + len(self.pairs.retain))
        for k in tqdm(positions, f"Reading the {side} set", disable=self.args.disable_tqdm):
            yield send_to_device(self.collate_pairs([self.pairs[k]])[side], device)

    def _epoch(self) -> int:
        updates = -(-len(self.batches) // self.args.gradient_accumulation_steps)
        return self.state.global_step // updates

    def _check_samples(self, losses: Losses) -> None:
        """Check that the first sample of each side can be collated, and has labels."""
        if losses is not sample_losses:
            return
        for name, position, side in ("forget_dataset", 0, "forget"), ("retain_dataset", len(self.pairs), "retain"):
            _, sample = self.pairs[position]
            columns = self.collate_pairs.columns
            if isinstance(sample, Mapping) and columns is not None and columns.isdisjoint(sample):
                raise ValueError(
                    f"samples of {name} have none of the model's arguments; they have {', '.join(sample)}. Tokenize "
                    "them, or set remove_unused_columns=False where a data_collator does it"
                )
            batch = self.collate_pairs([(position, sample)])[side]
            if batch.get("labels") is None:
                raise ValueError(
                    f"samples of {name} have no labels: the collator made {', '.join(batch)} of the first one. Add "
                    "labels (-100 where a token does not count), or a data_collator that does"
                )


def _collator(tokenizer: object) -> Callable[[list[Any]], Batch] | None:
    """Return a collator that pads labels too; None, for the Trainer's own, without a tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token")
    return DataCollatorForSeq2Seq(tokenizer)
