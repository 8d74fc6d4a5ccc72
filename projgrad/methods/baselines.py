"""What projections are compared with: unlearning steps that use only the mean retain gradient.

All have the interface of `projgrad.OrthoGrad`: step(forget, retain) from two closures, the forget loss a scalar, the
retain losses a scalar or one per sample (their mean is used). They own no mathematics beyond a few lines each.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _options
from ..recording.losses import instead
from .closures import Closures
from .common import clear_grads, copies, loss_value, scalar_loss, trainable_parameters, write_
from .protocol import Closure, SteppingOptimizer

Gradients = Sequence[Tensor | None]  # in the order of the parameters; None for what a loss does not depend on


@dataclass(frozen=True)
class BaselineRecord:
    """Losses before the step, None where a closure was not called, and the wall seconds of the step."""

    forget_loss: float | None
    retain_loss: float | None
    seconds: float


class NegGradPlus:
    """Ascent on the forget loss and descent on the mean retain loss at once.

    update = α mean_j(g_j) - (1 - α) u

    alpha = 1 is fine-tuning and alpha = 0 plain gradient ascent: a closure of weight 0 is not called.

    Args:
        model, optimizer: the model's parameters that require gradients and belong to the optimizer are updated.
        alpha: weight of the mean retain gradient, in [0, 1].
        ascend: False: the forget loss is an objective to minimise.
        max_norm: clip the norm of the whole update, or None.

    Raises:
        TypeError: a wrong type of model, optimizer, option or closure.
        ValueError: an option out of its range, no trainable parameter in the optimizer, a loss that is not one scalar,
            a closure that leaves gradients behind or changes the weights that the other one used.
        FloatingPointError (step): NaN or Inf in a loss or the update; nothing was changed.

    Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880, section 5 (NegGrad+).

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> method = projgrad.baselines.NegGradPlus(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.9)
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> loss = torch.nn.functional.cross_entropy
        >>> method.step(lambda: loss(model(-x), y), lambda: loss(model(x), y)).retain_loss > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SteppingOptimizer,
        alpha: float = 0.95,
        *,
        ascend: bool = True,
        max_norm: float | None = None,
    ) -> None:
        trainable_parameters(model, optimizer)
        self.model, self.optimizer, self.max_norm = model, optimizer, _options.check_max_norm(max_norm)
        self.alpha = _options.within("alpha weighs the mean retain gradient and", alpha, "[0, 1]")
        self.sign = -1.0 if _options.check_flag("ascend", ascend) else 1.0

    def step(self, forget: Closure, retain: Closure) -> BaselineRecord:
        """Update the weights once. What was in `.grad` before is dropped.

        An error leaves the model and the optimizer as they were, with every `.grad` set to None.
        """
        start = time.perf_counter()
        with Closures(self.model, self.optimizer, forget=forget, retain=retain) as closures, torch.enable_grad():
            losses = self._update(forget, retain, closures)
        return BaselineRecord(*losses, time.perf_counter() - start)

    def _update(self, forget: Closure, retain: Closure, closures: Closures) -> tuple[float | None, float | None]:
        """Change the weights, and return both losses."""
        params = list(closures.params.values())
        weight = self.sign * (1 - self.alpha)
        u = _loss(forget, closures, "forget") if self.alpha < 1 else None
        # Both forward passes may normalise weights in place: the graph of the forget loss does not outlive the second.
        early = u is not None and self.alpha > 0 and bool(closures.changed["forget"])
        if early:
            torch.autograd.backward(weight * u, inputs=params)

        def forgotten(names: list[str]) -> Gradients:
            asked = [closures.params[name] for name in names]
            return [p.grad for p in asked] if early else _gradients(u, asked, retain_graph=True)

        r = _loss(retain, closures, "retain") if self.alpha > 0 else None
        if u is not None and r is not None:
            closures.compare(r, forgotten)
        losses = None if u is None else loss_value(u, "forget"), None if r is None else loss_value(r, "retain")
        terms = (self.alpha, r), (weight, None if early else u)
        update = torch.autograd.grad(sum(w * loss for w, loss in terms if loss is not None), params, allow_unused=True)
        if early:
            update = [_add(p.grad, g) for p, g in zip(params, update, strict=True)]
        self._apply(params, update)
        return losses

    def _apply(self, params: list[nn.Parameter], update: Gradients) -> None:
        """Clip the update, and let the optimizer step with it."""
        norm = torch.nn.utils.get_total_norm([g for g in update if g is not None])
        if not norm.isfinite():
            raise FloatingPointError("NaN or Inf in the update; nothing was changed")
        clear_grads(self.optimizer)
        for p, g in zip(params, update, strict=True):
            p.grad = g
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(params, self.max_norm)
        self.optimizer.step()


class PCGrad(NegGradPlus):
    """NegGrad+ whose two gradients lose their conflicting parts: what in one points against the mean of the other.

    With r the mean retain gradient and d = -u what forgetting descends on: where ⟨d, r⟩ < 0,
    d' = d - ⟨d, r⟩ r / ‖r‖² and r' = r - ⟨d, r⟩ d / ‖d‖²; update = α r' + (1 - α) d'.

    This is one projection with the *mean* retain gradient, where `OrthoGrad` takes out the gradient of every sample.
    Arguments and errors as `NegGradPlus`.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782; GDR-GMA rectifies the direction in
    the same way, without its adjustment of magnitudes here.
    """

    def _update(self, forget: Closure, retain: Closure, closures: Closures) -> tuple[float, float]:
        params = list(closures.params.values())
        u = _loss(forget, closures, "forget")
        d = dict(zip(closures.params, _gradients(self.sign * u, params), strict=True))
        mean_loss = _loss(retain, closures, "retain")
        closures.compare(mean_loss, lambda names: [d[name] for name in names])
        d, r = list(d.values()), _gradients(mean_loss, params)
        losses = loss_value(u, "forget"), loss_value(mean_loss, "retain")
        conflict = min(_dot(d, r), 0.0)
        # In d and r: α (r - conflict d / ‖d‖²) + (1 - α) (d - conflict r / ‖r‖²).
        weight_d = (1 - self.alpha) - (self.alpha * conflict / _dot(d, d) if conflict else 0.0)
        weight_r = self.alpha - ((1 - self.alpha) * conflict / _dot(r, r) if conflict else 0.0)
        self._apply(params, [weight_d * a + weight_r * b for a, b in zip(d, r, strict=True)])
        return losses


class SalUn(NegGradPlus):
    """Random labels on the forget set and the retain loss, for the parameters with the largest forget gradients only.

    update = m ∘ (α mean_j(g_j) + (1 - α) g_random), m = 1 where |∂L_f/∂θ| is in the top `share` of the whole model

    Args:
        saliency: closure of the ordinary forget loss, over the whole forget set; called once, here.
        share: kept share of the parameters, in (0, 1].
        Others as `NegGradPlus`. The forget closure of `step` returns the loss on randomly relabelled forget samples,
        which is minimised.

    Source: Fan et al., "SalUn", arXiv 2310.12508, equations 3 to 5.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SteppingOptimizer,
        saliency: Closure,
        alpha: float = 0.5,
        *,
        share: float = 0.5,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(model, optimizer, alpha, ascend=False, max_norm=max_norm)
        share = _options.within("share of the parameters to update", share, "(0, 1]")
        with Closures(model, optimizer, saliency=saliency) as closures:
            loss = _loss(saliency, closures, "saliency")
            sizes = [g.abs() for g in _gradients(loss, list(closures.params.values()))]
        flat = torch.cat([g.flatten() for g in sizes])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.topk(max(1, round(share * len(flat)))).indices] = True
        parts = kept.split([g.numel() for g in sizes])
        self.masks = [(p, m.view_as(p)) for p, m in zip(closures.params.values(), parts, strict=True)]

    def _apply(self, params: list[nn.Parameter], update: Gradients) -> None:
        if list(map(id, params)) != [id(p) for p, _ in self.masks]:
            raise ValueError("there are other parameters than when the saliency was found: make a new SalUn")
        super()._apply(params, [None if g is None else g * m for g, (_, m) in zip(update, self.masks, strict=True)])


class SCRUB(NegGradPlus):
    """Away from the original model on the forget set, towards it on the retain set, in turns.

    For the first `max_steps` steps: one step up the forget divergence KL(original ‖ model), then one down the retain
    objective (α KL + γ cross-entropy, the caller's retain closure); afterwards only down. The paper takes turns by
    epochs. An error restores the parameters; the state of an optimizer with momentum may have advanced.

    Args:
        max_steps: steps that also ascend.
        model, optimizer, max_norm: as `NegGradPlus`.

    Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880, section 3.
    """

    def __init__(
        self, model: nn.Module, optimizer: SteppingOptimizer, max_steps: int, *, max_norm: float | None = None
    ) -> None:
        super().__init__(model, optimizer, max_norm=max_norm)
        self.max_steps, self.steps = _options.check_integer("max_steps", max_steps, 0), 0

    def _update(self, forget: Closure, retain: Closure, closures: Closures) -> tuple[float | None, float]:
        ascends = self.steps < self.max_steps
        before = copies(closures.params) if ascends else {}
        try:
            forget_loss = self._descend(forget, closures, "forget", -1.0) if ascends else None
            retain_loss = self._descend(retain, closures, "retain", 1.0)
        except BaseException:
            write_(closures.params, before)
            raise
        self.steps += 1
        return forget_loss, retain_loss

    def _descend(self, closure: Closure, closures: Closures, name: str, sign: float) -> float:
        """Take one step down (sign = 1) or up (-1) the loss of a closure, and return the loss."""
        params, loss = list(closures.params.values()), _loss(closure, closures, name)
        value = loss_value(loss, name)
        self._apply(params, torch.autograd.grad(sign * loss, params, allow_unused=True))
        return value


def _loss(closure: Closure, closures: Closures, name: str) -> Tensor:
    """Return the scalar loss of a closure; of retain losses the mean."""

    def mean() -> Tensor:
        losses = closure()
        if not isinstance(losses, Tensor):
            raise ValueError(f"retain() must return losses, of shape () or (n,); got {instead(losses, 'losses')}")
        return losses.mean()

    with closures.watch(name):
        return scalar_loss(mean if name == "retain" else closure, name)


def _gradients(loss: Tensor, params: Sequence[nn.Parameter], retain_graph: bool = False) -> tuple[Tensor, ...]:
    """Return the gradient of every parameter, zeros where the loss does not depend on it."""
    return torch.autograd.grad(loss, params, retain_graph=retain_graph, materialize_grads=True, allow_unused=True)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(torch.stack([(x.double() * y).sum() for x, y in zip(a, b, strict=True)]).sum())  # one wait
