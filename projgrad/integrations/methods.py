"""What each unlearning method does in place of a training loop's backward pass."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..methods.baselines import NegGradPlus
from ..methods.feasible_updates import FeasibleUpdates
from ..methods.orthograd import OrthoGrad
from ..methods.pgu.pgu import PGU
from ..methods.responses import response_of
from ..recording.fixed import evaluating
from .objectives import Terms, finetune, grad_ascent, graddiff, neggrad, npo, simnpo
from .token_losses import Batch, outputs_of, sample_losses, token_sums

Losses = Callable[[nn.Module, Batch], Tensor]
Numbers = dict[str, Any]  # of one step, "loss" among them; or a view of its record, which a later step completes


class Trainer(Protocol):
    """What is used of a transformers Trainer."""

    model: nn.Module
    args: Any
    accelerator: Any
    optimizer: Any


class Window(NamedTuple):
    """The micro-batches of one step, and the positions of their forget samples in the forget set."""

    forgets: list[Batch]
    retains: list[Batch]
    positions: list[Tensor]


class Method:
    """What is common to the methods. Each raises ValueError for options that it does not have or that are out of range.

    options: `method_options` of the trainer. losses: of the samples of a batch, (n,).
    """

    alone = False  # in one process, and without a gradient scaler
    steps = False  # changes the parameters itself, and leaves no gradient
    needs_retain = True  # retain samples in every step
    starts = False  # `prepare` has to see the model, and all samples, before the first step

    def __init__(self, name: str, options: Mapping[str, Any], losses: Losses) -> None:
        self.name, self.options, self.losses = name, dict(options), losses

    def check(self, trainer: Trainer) -> None:
        """Check, before anything is trained, that the method fits the model and the arguments."""
        if self.alone and trainer.args.world_size > 1:
            raise ValueError(
                f"method={self.name!r} takes its steps in one process; there are {trainer.args.world_size}"
            )
        if self.alone and trainer.args.fp16:
            raise ValueError(f"method={self.name!r} does not go with fp16, whose gradients are scaled: use bf16")

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the method fits the optimizer that the trainer made."""

    def prepare(self, trainer: Trainer, forget: Iterable[Batch], retain: Iterable[Batch]) -> None:
        """Do what takes the model as it is before unlearning. The batches hold one sample each, in order."""

    def write_gradients(self, trainer: Trainer, model: nn.Module, window: Window) -> Numbers:
        """Set every `.grad` to what the optimizer is to apply."""
        raise NotImplementedError

    def closures(self, model: nn.Module, batches: list[Batch]) -> list[Callable[[], Tensor]]:
        """Return one closure per batch, which returns the losses of its samples; each call has its own copy of it."""
        return [lambda batch=batch: self.losses(model, copy.copy(batch)) for batch in batches]

    def checked(self, function: Callable[..., object], *given: str) -> Numbers:
        """Return the options; raises ValueError unless they are arguments of a function. given: those that are ours."""
        known = [name for name in inspect.signature(function).parameters if name not in given]
        unknown = [name for name in self.options if name not in known]
        if unknown:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"method={self.name!r} has no option {', '.join(unknown)}; {has}")
        return self.options


class Objective(Method):
    """A loss of both sides, averaged over the micro-batches as a Trainer does with any loss."""

    def __init__(self, terms: Callable[..., Terms], name: str, options: Mapping[str, Any], losses: Losses) -> None:
        super().__init__(name, options, losses)
        self.terms = terms(**self.checked(terms))
        self.reference: list[Tensor] = []  # log-probabilities before unlearning, by position; of packed samples several
        self.starts, self.needs_retain = self.terms.needs_reference, bool(self.terms.retain_weight)
        if self.terms.forget is not None and losses is not sample_losses:
            raise ValueError(f"method={name!r} is made of the losses of tokens: leave out `losses`")

    def prepare(self, trainer: Trainer, forget: Iterable[Batch], retain: Iterable[Batch]) -> None:
        if self.terms.needs_reference:
            with evaluating(trainer.model), torch.no_grad():
                self.reference = [-token_sums(trainer.model, batch).losses for batch in forget]

    def write_gradients(self, trainer: Trainer, model: nn.Module, window: Window) -> Numbers:
        numbers: dict[str, float] = {}
        for k, (forget, retain, positions) in enumerate(zip(*window, strict=True), 1):
            terms = {}
            with nullcontext() if k == len(window.forgets) else trainer.accelerator.no_sync(model):
                if self.terms.forget_weight:
                    terms["forget_loss"] = self._forget(model, forget, positions).mean()
                if self.terms.retain_weight:
                    terms["retain_loss"] = self.losses(model, copy.copy(retain)).mean()
                weights = {"forget_loss": self.terms.forget_weight, "retain_loss": self.terms.retain_weight}
                terms["loss"] = sum(weights[name] * term for name, term in terms.items())
                trainer.accelerator.backward(terms["loss"] / len(window.forgets))
            for name, term in terms.items():
                numbers[name] = numbers.get(name, 0.0) + float(term.detach()) / len(window.forgets)
        return numbers

    def _forget(self, model: nn.Module, batch: Batch, positions: Tensor) -> Tensor:
        if self.terms.forget is None:
            return self.losses(model, copy.copy(batch))
        reference = torch.cat([self.reference[k] for k in positions.tolist()]) if self.reference else None
        return self.terms.forget(token_sums(model, batch), reference)


class Projected(Method):
    """OrthoGrad: the micro-batches' retain samples are protected as one union."""

    unlearner: OrthoGrad | None = None

    def check(self, trainer: Trainer) -> None:
        super().check(trainer)
        if "max_norm" in self.options:
            raise ValueError("max_norm is max_grad_norm of the TrainingArguments")
        options = self.checked(OrthoGrad, "model", "optimizer", "scaler", "max_norm")
        params = [p for p in trainer.model.parameters() if p.requires_grad]
        OrthoGrad(trainer.model, torch.optim.SGD(params, lr=1.0), **options)  # raises

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self._metric(optimizer) == "optimizer":
            try:
                response_of(optimizer)
            except ValueError as error:
                raise ValueError(f'{error}. Or take method_options={{"metric": "gradient"}}') from error

    def write_gradients(self, trainer: Trainer, model: nn.Module, window: Window) -> Numbers:
        optimizer = inner(trainer.optimizer)
        if self.unlearner is None or self.unlearner.model is not model or self.unlearner.optimizer is not optimizer:
            options = {"metric": self._metric(optimizer), **self.options}
            self.unlearner = OrthoGrad(model, optimizer, scaler=trainer.accelerator.scaler, **options)
        forgets, retains = self.closures(model, window.forgets), self.closures(model, window.retains)
        if len(forgets) == 1:
            record = self.unlearner.backward(lambda: forgets[0]().mean(), retains[0])
        else:
            record = self.unlearner.backward(forgets, retains)
        alpha, sign = self.unlearner.alpha, self.unlearner.sign
        vars(record)["loss"] = alpha * record.retain_loss + sign * (1 - alpha) * record.forget_loss
        return vars(record)

    def _metric(self, optimizer: torch.optim.Optimizer) -> str:
        """Return the metric: that of the gradient alone where the optimizer applies nothing else."""
        plain = type(optimizer) is torch.optim.SGD and not any(group["momentum"] for group in optimizer.param_groups)
        return self.options.get("metric", "gradient" if plain else "optimizer")


class ProjectedOntoInputs(Method):
    """PGU: the forget gradient without the main directions of the layers' inputs over the retain set."""

    alone = starts = True
    pgu: PGU | None = None

    def check(self, trainer: Trainer) -> None:
        super().check(trainer)
        self.checked(PGU, "model", "optimizer", "max_norm", "forward", "check_samples")
        if hasattr(trainer.model, "get_base_model") and "gamma" not in self.options:
            raise ValueError(
                'method="pgu" protects directions of a layer\'s inputs, and the second matrix of an adapter of rank r '
                "has only r of them: train whole weights, take another method, or say what share to protect, "
                'method_options={"gamma": ...}'
            )
        self._new(trainer.model)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn of optimizers that bring back what was projected out; momentum of a fixed projection does not."""
        if type(optimizer) is not torch.optim.SGD or any(group["weight_decay"] for group in optimizer.param_groups):
            warnings.warn(
                f'method="pgu" projects the gradient, and {type(optimizer).__name__} or its weight decay changes the '
                'direction after that: what is applied is not projected. Set optim="sgd" and weight_decay=0, and a '
                "learning rate for them",
                stacklevel=2,
            )

    def prepare(self, trainer: Trainer, forget: Iterable[Batch], retain: Iterable[Batch]) -> None:
        with evaluating(trainer.model):
            self.pgu = self._new(trainer.model).fit(retain)

    def write_gradients(self, trainer: Trainer, model: nn.Module, window: Window) -> Numbers:
        sign, forget_loss = -1.0 if self.pgu.ascend else 1.0, 0.0
        for closure in self.closures(model, window.forgets):
            loss = closure().mean() / len(window.forgets)
            (sign * loss).backward()
            forget_loss += float(loss.detach())
        projected = self.pgu.project_()
        return {"loss": sign * forget_loss, "forget_loss": forget_loss, **projected._asdict()}

    def _new(self, model: nn.Module) -> PGU:
        """Make a PGU of all that is trained: there may be no optimizer yet, and this one takes no step."""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        return PGU(model, optimizer, **self.options, forward=outputs_of, check_samples=False)


class Masked(Method):
    """Feasible updates: of what the optimizer does with the forget gradient, the coordinates worth updating.

    The parameters are changed here, and no gradient is left for the loop's own step.
    """

    alone = steps = True
    feasible: FeasibleUpdates | None = None

    def check(self, trainer: Trainer) -> None:
        super().check(trainer)
        self.checked(FeasibleUpdates, "model", "optimizer")
        params = [p for p in trainer.model.parameters() if p.requires_grad]
        self._new(trainer.model, torch.optim.SGD(params, lr=1.0), None)

    def write_gradients(self, trainer: Trainer, model: nn.Module, window: Window) -> Numbers:
        optimizer = inner(trainer.optimizer)
        if self.feasible is None or self.feasible.model is not model or self.feasible.optimizer is not optimizer:
            self.feasible = self._new(model, optimizer, trainer.args.max_grad_norm or None)
        forgets, retains = self.closures(model, window.forgets), self.closures(model, window.retains)
        record = self.feasible.step(
            lambda: torch.cat([closure() for closure in forgets]).mean(),
            lambda: torch.cat([closure() for closure in retains]),
        )
        names = "kept", "preserved_norm", "forget_loss", "retain_loss"
        return {"loss": self.feasible.sign * record.forget_loss, **{name: getattr(record, name) for name in names}}

    def _new(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> FeasibleUpdates:
        ascend = self.options.get("ascend", True)
        ascent = NegGradPlus(model, optimizer, alpha=0.0, ascend=ascend, max_norm=max_norm)
        return FeasibleUpdates(model, ascent, **self.options)


METHODS: dict[str, Callable[[str, Mapping[str, Any], Losses], Method]] = {
    "orthograd": Projected,
    "pgu": ProjectedOntoInputs,
    "feasible": Masked,
    "grad_ascent": functools.partial(Objective, grad_ascent),
    "finetune": functools.partial(Objective, finetune),
    "neggrad": functools.partial(Objective, neggrad),
    "graddiff": functools.partial(Objective, graddiff),
    "npo": functools.partial(Objective, npo),
    "simnpo": functools.partial(Objective, simnpo),
}


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer of torch inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
