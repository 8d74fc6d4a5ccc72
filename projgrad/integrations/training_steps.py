"""The steps of a transformers Trainer, made by an unlearning method: a mixin for any subclass of it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .._torch_private import BatchNorm
from .methods import METHODS, Losses, Method, Numbers, Window, inner
from .token_losses import sample_losses

LOGGED = ("forget_loss", "retain_loss", "rank", "preserved_norm", "residual", "kept", "iterations")


class UnlearningSteps:
    """Takes steps on batches {"forget": batch, "retain": batch} where a Trainer takes them on a loss.

        class MyTrainer(UnlearningSteps, transformers.Trainer): ...

    Call `unlearn_by` once, after the Trainer's own `__init__`. All the rest, such as clipping, the optimizer's step,
    schedules, logs, evaluation and checkpoints, stays the Trainer's. Micro-batches of gradient accumulation are
    held until the last one and taken as one step. What a step tells is in the logs, beside the loss.
    """

    unlearning_method: Method | None = None
    makes_batches = False  # of both sides, and shows the method all samples before the first step

    def unlearn_by(
        self, method: str, method_options: Mapping[str, Any] | None = None, losses: Losses | None = None
    ) -> None:
        """Choose the method, and check that it fits; arguments and errors as those of `UnlearningTrainer`."""
        order = type(self).__mro__
        if order.index(UnlearningSteps) > order.index(transformers.Trainer):
            raise TypeError(f"UnlearningSteps has to come before the Trainer in the bases of {type(self).__name__}")
        if not hasattr(self, "accelerator"):
            raise RuntimeError("call unlearn_by after the Trainer's own __init__")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed steps inside its own backward(): it is not supported; use DDP or FSDP2")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would split every batch (DataParallel): launch one process per "
                "GPU with torchrun or accelerate launch, or let CUDA_VISIBLE_DEVICES name one"
            )
        if losses is None and type(self).compute_loss is not transformers.Trainer.compute_loss:
            raise ValueError(
                f"{type(self).__name__}.compute_loss is not called in a step, which is made of losses of samples: give "
                "`losses`, a function of model and batch that returns one loss per sample, (n,)"
            )
        if losses is None and (
            self.args.label_smoothing_factor or getattr(self, "compute_loss_func", None) is not None
        ):
            raise ValueError("label_smoothing_factor and compute_loss_func make no losses of samples: give `losses`")
        given = getattr(self.args, "gradient_checkpointing_kwargs", None) or {}
        if self.args.gradient_checkpointing and given.get("use_reentrant", transformers.__version__ < "5"):
            raise ValueError(
                "checkpointing with use_reentrant=True cannot give the gradients of a batch apart: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("no parameter of the model requires a gradient: thaw some, or add adapters")
        self.unlearning_method = METHODS[method](method, method_options or {}, losses or sample_losses)
        if self.unlearning_method.starts and not self.makes_batches:
            raise ValueError(f"method={method!r} reads all samples before the first step: use UnlearningTrainer")
        if self.args.remove_unused_columns and not self.makes_batches:
            raise ValueError("set remove_unused_columns=False: the Trainer would take both sides out of the batches")
        self.unlearning_method.check(self)
        self._window, self._numbers = [], []

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **options)
        if self.unlearning_method is None:
            raise RuntimeError("call unlearn_by before train")
        self.unlearning_method.check_optimizer(inner(optimizer))
        return optimizer

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> Tensor:
        """Hold a micro-batch; with the last one of a step set every `.grad`. Returns the step's loss, or 0."""
        if self.unlearning_method is None:
            raise RuntimeError("call unlearn_by before train")
        needed = {"forget", "retain"} if self.unlearning_method.needs_retain else {"forget"}
        if not needed <= set(inputs):
            raise ValueError(
                f'batches must be {{"forget": batch, "retain": batch}}; got {", ".join(inputs)}: give a data_collator '
                "that makes them"
            )
        model.train()
        for module in model.modules():
            if isinstance(module, BatchNorm):  # the statistics of a batch make every gradient depend on all samples
                module.eval()
        if callable(getattr(self.optimizer, "train", None)):  # of optimizers without a schedule
            self.optimizer.train()
        self._window.append(send_to_device(inputs, self.args.device))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        held, self._window = self._window, []
        sides = [[batch.get(name) for batch in held] for name in ("forget", "retain", "positions")]
        self._numbers.append(self.unlearning_method.write_gradients(self, model, Window(*sides)))
        return torch.tensor(self._numbers[-1]["loss"], device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log with what the steps since the last time tell: the largest residual, and means of the rest."""
        if "loss" in logs:
            told = dict(_summary(self._numbers))
            if told and self.args.world_size > 1:  # plain losses are of this process's samples
                values = torch.tensor(list(told.values()), device=self.args.device)
                told = dict(zip(told, self.accelerator.reduce(values, "mean").tolist(), strict=True))
            logs |= told
            if self.unlearning_method.steps:
                logs.pop("grad_norm", None)
            self._numbers = []
        super().log(logs, *args, **options)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return the operations of plain passes over both batches."""
        sides = [inputs[side] for side in ("forget", "retain") if side in inputs]
        return sum(super(UnlearningSteps, self).floating_point_ops(side) for side in sides)


def _summary(steps: list[Numbers]) -> Iterator[tuple[str, float]]:
    for name in LOGGED:
        values = [float(step[name]) for step in steps if step.get(name) is not None]
        values = [value for value in values if not math.isnan(value)]  # a scaler skipped the others
        if values and (any(values) or name != "iterations"):
            yield name, max(values) if name == "residual" else sum(values) / len(values)
