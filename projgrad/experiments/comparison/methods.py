"""Every compared method under one interface: a function of one forget batch and one retain batch that makes a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim import Optimizer

from ...evaluate.problem import Part, Problem, pieces
from ...methods import projectors
from ...methods.baselines import SCRUB, NegGradPlus, PCGrad, SalUn
from ...methods.feasible_updates import FeasibleUpdates
from ...methods.language_losses import npo_loss, simnpo_loss
from ...methods.orthograd import OrthoGrad
from ...methods.pgu.pgu import PGU

MAX_NORM = 1.0  # every method's update is clipped to this norm: ascent alone grows without bound
DELTA = 0.05

Step = Callable[[Part, Part], object]


@dataclass(frozen=True)
class Setting:
    """lr at the first step, number of steps, retain samples a step, and the method's own parameter."""

    lr: float
    steps: int
    n: int
    value: float | None = None


@dataclass(frozen=True)
class Context:
    """What a method is made from; the model is a copy of the original that may be changed."""

    problem: Problem
    model: nn.Module
    optimizer: Optimizer
    setting: Setting
    generator: torch.Generator

    def loss(self, part: Part) -> Callable[[], torch.Tensor]:
        return lambda: self.problem.losses(self.model, part).mean()

    def losses(self, part: Part) -> Callable[[], torch.Tensor]:
        return lambda: self.problem.losses(self.model, part)


@dataclass(frozen=True)
class Method:
    """make(context) -> step. values: what the search tries for the method's own parameter, called `symbol`; with the
    symbol "steps" they are multiples of the scenario's number of steps. is_orthograd: OrthoGrad or a variant of it.
    needs_sgd: what it takes out of the gradient any other optimizer would bring back."""

    title: str
    make: Callable[[Context], Step]
    symbol: str
    values: tuple[float, ...]
    is_orthograd: bool = False
    needs_sgd: bool = False


def _closures(method) -> Callable[[Context], Step]:
    """Make the steps of a method that takes an ordinary forget loss and one retain loss per sample."""

    def make(context: Context) -> Step:
        unlearner = method(context)
        return lambda forget, retain: unlearner.step(context.loss(forget), context.losses(retain))

    return make


def _neggrad(alpha: float | None = None) -> Callable[[Context], Step]:
    return _closures(
        lambda c: NegGradPlus(c.model, c.optimizer, c.setting.value if alpha is None else alpha, max_norm=MAX_NORM)
    )


def _orthograd(**options) -> Callable[[Context], Step]:
    return _closures(lambda c: OrthoGrad(c.model, c.optimizer, c.setting.value, max_norm=MAX_NORM, **options))


def _pcgrad(c: Context) -> PCGrad:
    return PCGrad(c.model, c.optimizer, c.setting.value, max_norm=MAX_NORM)


def _salun(c: Context) -> Step:
    whole = c.problem.forget
    unlearner = SalUn(c.model, c.optimizer, c.loss(whole), c.setting.value, max_norm=MAX_NORM)

    def step(forget: Part, retain: Part) -> object:
        return unlearner.step(c.loss(c.problem.relabelled(forget, c.generator)), c.losses(retain))

    return step


def _scrub(c: Context) -> Step:
    teacher = copy.deepcopy(c.model).requires_grad_(False)
    unlearner = SCRUB(c.model, c.optimizer, round(c.setting.value * c.setting.steps), max_norm=MAX_NORM)

    def objective(part: Part, weight: float) -> torch.Tensor:
        with torch.no_grad():
            target = log_softmax(c.problem.logits(teacher, part)[0], 1)
        logits, labels = c.problem.logits(c.model, part)
        divergence = kl_div(log_softmax(logits, 1), target, reduction="batchmean", log_target=True)
        return divergence + weight * cross_entropy(logits, labels) if weight else divergence

    def step(forget: Part, retain: Part) -> object:
        return unlearner.step(lambda: objective(forget, 0.0), lambda: objective(retain, 1.0))

    return step


def _npo(c: Context) -> Step:
    teacher = copy.deepcopy(c.model).requires_grad_(False)

    def objective(part: Part) -> torch.Tensor:
        with torch.no_grad():
            reference = _log_probs(c.problem, teacher, part)
        return npo_loss(_log_probs(c.problem, c.model, part), reference, c.setting.value).mean()

    return _with_retain(c, objective)


def _simnpo(c: Context) -> Step:
    def objective(part: Part) -> torch.Tensor:
        return simnpo_loss(_log_probs(c.problem, c.model, part), c.problem.lengths(part), c.setting.value).mean()

    return _with_retain(c, objective)


def _with_retain(c: Context, objective: Callable[[Part], torch.Tensor]) -> Step:
    """Make steps that minimise the mean of a forget objective and the retain loss."""
    unlearner = NegGradPlus(c.model, c.optimizer, 0.5, ascend=False, max_norm=MAX_NORM)
    return lambda forget, retain: unlearner.step(lambda: objective(forget), c.losses(retain))


def _log_probs(problem: Problem, model: nn.Module, part: Part) -> torch.Tensor:
    """Compute the log-probability of each sample's labels (n,)."""
    return -problem.losses(model, part) * problem.lengths(part)


def _pgu(c: Context) -> Step:
    def forward(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> object:
        return c.problem.logits(model, Part(batch[:-1], batch[-1]))

    def tensors(part: Part) -> Iterator[tuple[torch.Tensor, ...]]:
        return ((*piece.inputs, piece.labels) for piece in pieces(part, c.problem.batch))

    unlearner = PGU(c.model, c.optimizer, gamma=c.setting.value, max_norm=MAX_NORM, forward=forward)
    unlearner.fit(tensors(Part.joined(c.problem.retain, c.problem.forget)))
    unlearner.forget(tensors(c.problem.forget))
    return lambda forget, retain: unlearner.step(lambda: c.problem.logits(c.model, forget))


def _feasible(c: Context) -> Step:
    inner = NegGradPlus(c.model, c.optimizer, 0.0, max_norm=MAX_NORM)
    unlearner = FeasibleUpdates(c.model, inner, delta=c.setting.value)
    return lambda forget, retain: unlearner.step(c.loss(forget), c.losses(retain))


def _orthograd_feasible(c: Context) -> Step:
    inner = OrthoGrad(c.model, c.optimizer, c.setting.value, max_norm=MAX_NORM)
    unlearner = FeasibleUpdates(c.model, inner, delta=DELTA)
    return lambda forget, retain: unlearner.step(c.loss(forget), c.losses(retain))


ALPHAS = (0.5, 0.95, 0.995)  # mean-gradient methods need the largest, OrthoGrad on a class the smallest
METHODS = {
    "ascent": Method("gradient ascent", _neggrad(0.0), "steps", (0.25, 0.5, 1.0)),
    "finetune": Method("fine-tuning", _neggrad(1.0), "steps", (1.0, 2.5, 5.0)),
    "neggrad": Method("NegGrad+", _neggrad(), "α", ALPHAS),
    "graddiff": Method("GradDiff", _neggrad(0.5), "steps", (0.5, 1.0, 2.0)),
    "npo": Method("NPO", _npo, "β", (0.05, 0.1, 0.5)),
    "simnpo": Method("SimNPO", _simnpo, "β", (1.0, 2.5, 4.5)),
    "pcgrad": Method("PCGrad", _closures(_pcgrad), "α", ALPHAS),
    "salun": Method("SalUn", _salun, "α", ALPHAS),
    "scrub": Method("SCRUB", _scrub, "ascending share", (0.1, 0.3, 0.9)),
    "orthograd": Method("OrthoGrad", _orthograd(), "α", ALPHAS, True),
    "orthograd-tensor": Method("OrthoGrad, per tensor", _orthograd(scope="per_tensor"), "α", ALPHAS, True),
    "pgu": Method("PGU", _pgu, "γ", (0.8, 0.9, 0.95), needs_sgd=True),
    "feasible": Method("feasible ascent", _feasible, "δ", (0.05, 0.2, 0.45)),
    "orthograd-feasible": Method("OrthoGrad, then feasible", _orthograd_feasible, "α", ALPHAS, True),
    "orthograd-qr": Method("OrthoGrad, QR", _orthograd(projector=projectors.qr), "α", ALPHAS, True),
    "orthograd-metric": Method("OrthoGrad, metric", _orthograd(metric="optimizer"), "α", ALPHAS, True),
}
LANGUAGE = ("graddiff", "npo", "simnpo", "orthograd-metric")  # searched on language models alone
TUNED_AS = {"orthograd-qr": "orthograd"}  # the same method: it takes its settings
TITLES = {"original": "original", "retrained": "retrained", **{name: m.title for name, m in METHODS.items()}}


def optimizer_of(problem: Problem, method: str, model: nn.Module, lr: float) -> Optimizer:
    make = torch.optim.SGD if METHODS[method].needs_sgd else problem.optimizer
    return make([p for p in model.parameters() if p.requires_grad], lr)


def batches(part: Part, size: int, generator: torch.Generator) -> Iterator[Part]:
    """Yield endless random batches without repetition inside one; all of the part where it is smaller."""
    while True:
        order = torch.randperm(len(part), generator=generator).to(part.labels.device)
        for rows in order.split(size)[: max(1, len(order) // size)]:
            yield part[rows]
