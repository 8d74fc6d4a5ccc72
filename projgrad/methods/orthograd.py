"""OrthoGrad: ascend on the forget loss, orthogonally to the gradient of every retain sample."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import _options
from ..recording.losses import check_shape, check_values
from ..tape.factors import ForgetFactors
from ..tape.per_sample import per_sample
from ..tape.records import Projection
from .closures import Closures
from .common import check_batch_norm, clear_grads, learning_rates, loss_value, scalar_loss, trainable_parameters
from .optimizer_metric import MetricStep, response_of


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step.

    rank: independent retain gradients that were projected out, summed over tensors with scope="per_tensor"; None with a
        custom projector.
    preserved_norm: ‖u_perp‖ / ‖u‖ over all parameters: near 1 the projection did nothing, near 0 nothing is left to
        forget with.
    residual: max_j |cos(g_j, u_perp)|, the largest over tensors with scope="per_tensor"; of what is written to `.grad`,
        not of what the optimizer makes of it. With metric="optimizer" u_perp is the forgetting part of the change that
        the parameters really made, here and in preserved_norm.
    refinements: times the result was projected again because the first answer left more than rounding.
    discrepancy: of the self-check: how far the per-sample gradients and plain autograd are apart, relative.
    forget_loss, retain_loss: before the step; the retain loss is the mean over samples.
    seconds: wall time of the whole step.
    skipped: a gradient scaler found NaN or Inf: nothing was updated but its scale.
    tensors: the same for every parameter, with scope="per_tensor"; empty otherwise.
    """

    rank: int | None
    preserved_norm: float
    residual: float
    refinements: int
    discrepancy: float
    forget_loss: float
    retain_loss: float
    seconds: float
    skipped: bool = False
    tensors: dict[str, Projection] = field(default_factory=dict)


SKIPPED = {"rank": None, "refinements": 0, "discrepancy": 0.0, "skipped": True}
SKIPPED |= dict.fromkeys(("preserved_norm", "residual", "forget_loss", "retain_loss"), float("nan"))


class OrthoGrad:
    """Unlearning steps whose forgetting part is orthogonal to every per-sample retain gradient.

    update = α mean_j(g_j) - (1 - α) u_perp,    u_perp = u - Gᵀ (G Gᵀ)⁺ G u

    with u the gradient of the forget loss and G (n, p) the per-sample gradients of the retain losses. The update is
    written to `.grad` and the optimizer steps.

    Args:
        model: its parameters that require gradients and belong to `optimizer` are updated.
        optimizer: any torch optimizer, built after the last change of the model's layers. The applied update is
            orthogonal only for SGD without momentum or weight decay; adaptive ones rescale it coordinate by coordinate,
            unless `metric` says otherwise.
            Where parameter groups have different learning rates, scope="global" makes the update orthogonal after
            them, lr ∘ u_perp: inner products, and the lengths in the record, weigh every parameter by its rate.
        alpha: weight of the mean retain gradient, in [0, 1]; 0 is pure projected ascent.
        scope: "global" projects the concatenated gradient once. "per_tensor" projects every tensor on its own, as the
            published code does: it implies global orthogonality but removes up to n dimensions from *each* tensor, so
            a tensor with at most n elements (small biases, norm scales) is not updated by forgetting at all.
        ascend: True: the forget loss is an ordinary loss and is maximised. False: it is a forget objective to minimise
            (random labels, distillation to a neutral target).
        damping, rtol: see `projgrad.project_out`.
        max_norm: clip the norm of the whole update, or None; infinity clips nothing.
        keep_output_gradients: with scope="global": make the update from the gradients at all layers' outputs, kept
            from the one backward pass over the retain batch; the graph is freed meanwhile, so that takes no more memory
            than plain training. Plain autograd checks all of it when the model's graph is new, and one tensor a step.
            False runs a second, ordinary backward pass for the update: more time, and every step checks every tensor.
        scaler: a `torch.amp.GradScaler`: losses are scaled, and its own rule decides on steps with NaN or Inf. One
            that is not enabled counts as None.
        projector: function (u (p,), G (n, p)) -> u_perp (p,) instead of projgrad's, such as `projgrad.projectors.qr`;
            with scope="per_tensor" called once for each tensor. All of G takes n times the memory of the parameters: a
            reference to compare with, without `damping`, `rtol`, `keep_output_gradients` and `scaler`.
        metric: "gradient" projects the gradient. "optimizer" makes the forgetting part of what the optimizer applies
            orthogonal, for SGD, Adam, AdamW, RMSprop in all variants, or one with a method
            `diagonal(param, state, group) -> Tensor`; `.grad` then holds that part. See docs/optimizer_metric.md.

    Raises:
        TypeError: a wrong type of model, optimizer or option.
        ValueError: an option out of its range (alpha in [0, 1], damping ≥ 0 and finite, rtol in [0, 1), max_norm > 0),
            an unknown scope or metric, no trainable parameter in the optimizer, a projector with damping, rtol or a
            scaler; LBFGS, an optimizer with maximize=True; with metric="optimizer" one whose diagonal is not known, a
            projector, or keep_output_gradients=False.

    Source: arXiv 2503.02312, section 3 and algorithm 1.

    Example:
        >>> model = torch.nn.Linear(8, 2)
        >>> unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5)
        >>> x, y = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
        >>> loss = torch.nn.functional.cross_entropy
        >>> record = unlearner.step(lambda: loss(model(-x), y), lambda: loss(model(x), y, reduction="none"))
        >>> record.residual < 1e-6
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        alpha: float = 0.5,
        *,
        scope: str = "global",
        ascend: bool = True,
        damping: float = 0.0,
        rtol: float | None = None,
        max_norm: float | None = None,
        keep_output_gradients: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        projector: Callable[[Tensor, Tensor], Tensor] | None = None,
        metric: str = "gradient",
    ) -> None:
        trainable_parameters(model, optimizer)
        alpha = _options.within("alpha weighs the mean retain gradient and", alpha, "[0, 1]")
        _options.check_choice("scope", scope, ("global", "per_tensor"))
        damping, rtol = _options.check_solver("", damping, rtol)
        keep_output_gradients = _options.check_flag("keep_output_gradients", keep_output_gradients)
        if scaler is not None and not hasattr(scaler, "unscale_"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler; got {_options.kind(scaler)}")
        if projector is not None and not callable(projector):
            raise TypeError(f"projector must be a function of u and G; got {_options.kind(projector)}")
        scaler = scaler if scaler is None or scaler.is_enabled() else None
        ignored = {"damping": damping, "rtol": rtol is not None, "scaler": scaler}
        unused = [name for name, is_given in ignored.items() if is_given]
        if projector is not None and unused:
            raise ValueError(f"projector replaces the whole projection: it cannot be used with {', '.join(unused)}")
        self.model, self.optimizer, self.alpha, self.scope = model, optimizer, alpha, scope
        self.sign = -1.0 if _options.check_flag("ascend", ascend) else 1.0
        self.damping, self.rtol, self.max_norm = damping, rtol, _options.check_max_norm(max_norm)
        self.keep_output_gradients, self.scaler, self.projector = keep_output_gradients, scaler, projector
        _options.check_choice("metric", metric, ("gradient", "optimizer"))
        self.metric = metric
        if metric == "optimizer":
            response_of(optimizer)
            if projector is not None or not keep_output_gradients:
                raise ValueError('metric="optimizer" cannot be used with projector or keep_output_gradients=False')
        self._factors_help = False  # whether the factors of the forget gradient saved work in the step before
        self._factors = ForgetFactors()

    def step(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> StepRecord:
        """Make one update.

        An error before the optimizer steps leaves the model and the optimizer as they were, with every
        `.grad` set to None; what a closure itself changes stays changed.

        What was accumulated in `.grad` before is dropped. Each closure makes its forward pass itself, in every step
        anew, and returns losses: it may call `zero_grad()`, but must leave no gradients behind (attack inputs with
        `torch.autograd.grad`) and change no weights, unless the forward pass does so in both closures alike. Changes
        through `.data` cannot be seen.

        `.grad` holds the update afterwards, so another `optimizer.step()` would apply it again. That is what happens
        inside `training_step` of a transformers `Trainer`, which steps by itself: take the steps in a loop of your own,
        or call `optimizer.zero_grad()` after each.

        Args:
            forget: returns the scalar forget loss.
            retain: returns the losses of the n retain samples, shape (n,): each one's gradient is protected. Sample j
                must depend on nothing that the other samples hold.

        Raises:
            TypeError: something other than a closure.
            ValueError: a loss of the wrong shape, batch norm in training mode (per-sample gradients do not exist),
                retain losses that share terms between samples; a closure that leaves gradients behind, changes the
                weights that the other one used or returns losses of a forward pass made before; a model that is spread
                over processes.
            RuntimeError: called inside a closure of another step on the same parameters.
            FloatingPointError: NaN or Inf in a loss or a gradient.
            ArithmeticError: the projection contradicts plain autograd, or a second backward pass the first one.
        """
        start = time.perf_counter()
        with Closures(self.model, self.optimizer, forget=forget, retain=retain) as closures:
            check_batch_norm(self.model)
            try:
                loss = self._forget(forget, closures)
                numbers = self._retain(loss, retain, closures)
            except FloatingPointError:
                if self.scaler is None:
                    raise
                clear_grads(self.optimizer)
                p = next(iter(closures.params.values()))  # infinite: the scaler skips this step and scales less
                p.grad = torch.full_like(p, float("inf"))
                numbers = dict(SKIPPED)
            metric_step = numbers.pop("metric_step", None)
            if metric_step is None:
                self._apply(closures.params)
            else:
                numbers |= metric_step.finish(self.scaler, self.max_norm, self.damping, self.rtol)
        return StepRecord(**numbers, seconds=time.perf_counter() - start)

    def _forget(self, forget: Callable[[], Tensor], closures: Closures) -> Tensor:
        """Set p.grad to ± (1 - α) u; return the loss, not looked at yet: the device may still be busy with it."""
        tape = per_sample(self.model, closures.params) if self._factors_help else None
        with closures.watch("forget"), tape or nullcontext():
            loss = scalar_loss(forget)
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        weight = self.sign * (1 - self.alpha)
        if tape is None:
            torch.autograd.backward(scaled, torch.full_like(scaled, weight), inputs=list(closures.params.values()))
        else:
            self._factors = tape.accumulate_(scaled, weight)
        return loss.detach()

    def _retain(self, loss: Tensor, retain: Callable[[], Tensor], closures: Closures) -> dict[str, Any]:
        """Set p.grad to ± (1 - α) u_perp + α mean_j(g_j); return the fields of the record."""
        params = closures.params
        with closures.watch("retain"), per_sample(self.model, params) as tape:
            losses = retain()
        check_shape(losses)
        closures.compare(losses, lambda names: [params[name].grad for name in names])
        if not tape.recording.sites:
            closures.check_made_inside(losses, retain)
        values: list[float] = []  # of the forget loss and of the retain losses, once the tape has read them
        reads = tape.recording.host_reads
        reads.defer(loss, lambda numbers: values.append(loss_value(numbers[0])))
        reads.defer(losses, lambda numbers: values.extend(check_values(numbers)))
        if all(p.grad is None for p in params.values()):
            raise ValueError("forget() returned a loss that depends on no parameter that the optimizer holds")
        n, share = len(losses), 1.0
        if self.scaler is not None:  # as small as in their mean, which is what its scale has been found for
            share = 2.0 ** -math.ceil(math.log2(n))
            losses = self.scaler.scale(losses) * share
        add = torch.full((n,), self.alpha / n / share, dtype=torch.float64, device=losses.device)
        if self.metric == "optimizer":
            metric_step = MetricStep(self.optimizer, params, tape, losses, self.scope, add)
            return {"metric_step": metric_step, "forget_loss": values[0], "retain_loss": sum(values[1:]) / n}
        weights = add if self.alpha else None
        rates = learning_rates(self.optimizer, params)
        if self.projector is not None:
            projection = tape.project_with_(losses, self.projector, self.scope, add=weights, rates=rates)
        else:
            factors, self._factors = self._factors, ForgetFactors()
            projection = tape.project_(
                losses,
                self.scope,
                self.damping,
                self.rtol,
                keep_output_gradients=self.keep_output_gradients,
                add=weights,
                rates=rates,
                factors=factors,
            )
            self._factors_help = factors.useful
        fields = {name: value for name, value in vars(projection).items() if name != "squares"}
        return fields | {"forget_loss": values[0], "retain_loss": sum(values[1:]) / n}

    def _apply(self, params: dict[str, nn.Parameter]) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(list(params.values()), self.max_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
