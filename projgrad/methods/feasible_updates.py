"""Feasible updates: of the change that is proposed, the part that raises no retain loss, as far as samples can tell."""

import inspect
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _options
from .._torch_private import foreach_add_, keeping_versions
from ..recording.losses import check_losses
from ..tape.per_sample import per_sample
from .closures import Closures
from .common import (
    Tensors,
    check_finite_tensors,
    clear_grads,
    copies,
    loss_value,
    scalar_loss,
    trainable_parameters,
    write_,
)
from .masks import Aggregate, Coordinate
from .protocol import Closure, SteppingOptimizer, UnlearningMethod


@dataclass(frozen=True)
class FeasibleRecord:
    """The numbers of one step.

    kept: share of the coordinates that were to move and did.
    level: delta, of one coordinate or, with test="aggregate", of the whole step.
    preserved_norm: ‖mΔ‖ / ‖Δ‖, 1 where nothing was proposed.
    forget_change: ⟨mΔ, u⟩, the first-order change of the forget objective that is minimised.
    retain_change, retain_error: first-order change of the mean retain loss, mean_j⟨g_j, mΔ⟩, and its standard error,
        over the samples that the test used. With test="coordinate" those that chose the coordinates: the change
        is then too low by what was chosen for its noise. With "aggregate" over the half that did not choose.
    forget_loss, retain_loss: before the step; the retain loss is the mean over the samples of the test.
    seconds: wall time of the whole step.
    method: the record of the method that proposed the change; None for a torch optimizer.
    """

    kept: float
    level: float
    preserved_norm: float
    forget_change: float
    retain_change: float
    retain_error: float
    forget_loss: float
    retain_loss: float
    seconds: float
    method: object = None


class FeasibleUpdates:
    """Masks the steps of an optimizer, or of another method, to coordinates worth updating.

    θ ← θ + m ∘ Δ,    ⟨mΔ, u⟩ ≤ 0 and, with a chosen probability, ⟨mΔ, ∇L_retain⟩ ≤ 0

    Δ is the change that the optimizer makes, u the gradient of the forget objective that is minimised, m a mask. From
    the per-sample retain gradients g_j, never stored, at the weights before the step:

    test="coordinate" keeps k iff Δ_k u_k ≤ 0 and Δ_k mean_k + q |Δ_k| s_k / √n ≤ 0 (`projgrad.feasible`). A coordinate
    that raises the retain loss is kept with probability at most delta, each for itself. Their sum may still do harm:
    where every coordinate does, the share delta that is kept does too.

    test="aggregate" keeps the largest of a few nested sets with mean_j⟨g_j, mΔ⟩ + q sd_j / √n ≤ 0. The even samples
    make the sets, by the coordinate test at growing levels; the odd ones test them, from the smallest on until one
    fails. (Sets tested on the samples that made them pass far too often.) So the step as a whole raises the retain loss
    with probability at most delta. If no set passes, nothing moves. A set costs a backward pass without weight
    gradients.

    Both levels hold for samples that are independent, with normal gradients, and for a Δ that does not depend on them.
    OrthoGrad's Δ depends on them when it is made from the same batch: give `step` a `check` with other retain samples.
    Symmetric heavy tails keep the level (0.044 for Student's t with 3 degrees of freedom, n = 8), harm in few samples
    does not: 0.14 and 0.08 for exponential ⟨g_j, Δ⟩ and n = 8 and 64, 0.21 and 0.13 for log-normal ones (simulated,
    delta = 0.05, at mean 0).

    The paper's full text was not available, only its abstract. The constrained view, masking, and taking the noise of
    batch gradients into account so that feasibility holds with a chosen probability are the paper's. Both tests, the
    use of Student's t, the margins for rounding and the split of the samples are our derivation.

    The state of the optimizer (momentum, Adam's moments) sees the unmasked gradient. Memory besides that of the
    optimizer's own step: five times the parameters, six with test="aggregate".

    Args:
        model: its parameters that require gradients and belong to the optimizer are updated.
        optimizer: a torch optimizer, which steps on u; or a method with `step(forget, retain)` or `step(forget)`,
            `model` and `optimizer`, such as `projgrad.OrthoGrad`. A method calls the closures again.
        delta: level, in (0, 0.5].
        test: "coordinate" or "aggregate".
        ascend: True: the forget loss is an ordinary loss and is maximised; must agree with that of the method.

    Raises as `OrthoGrad`; ValueError for a method that is for another model or of the other sense.

    Source: arXiv 2511.02435 (abstract).

    Example:
        >>> model = torch.nn.Linear(8, 2)
        >>> feasible = projgrad.FeasibleUpdates(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> x, y = torch.randn(16, 8), torch.arange(16) % 2
        >>> loss = torch.nn.functional.cross_entropy
        >>> record = feasible.step(lambda: loss(model(-x), y), lambda: loss(model(x), y, reduction="none"))
        >>> record.forget_change <= 0 and record.retain_change <= 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SteppingOptimizer | UnlearningMethod,
        delta: float = 0.05,
        test: str = "coordinate",
        ascend: bool = True,
    ) -> None:
        delta = _options.within("delta is the level of a one-sided test and", delta, "(0, 0.5]")
        _options.check_choice("test", test, ("coordinate", "aggregate"))
        ascend = _options.check_flag("ascend", ascend)
        self.model, self.delta, self.test, self.sign = model, delta, test, -1.0 if ascend else 1.0
        self.method: UnlearningMethod | None = None
        self.optimizer: SteppingOptimizer = optimizer
        if not (isinstance(optimizer, type) or hasattr(optimizer, "param_groups") or hasattr(model, "param_groups")):
            _check_method(optimizer, model, ascend)
            self.method, self.optimizer = optimizer, optimizer.optimizer
            parameters = inspect.signature(optimizer.step).parameters.values()
            self._closures = sum(p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
        trainable_parameters(model, self.optimizer)

    def step(self, forget: Closure, retain: Closure, check: Closure | None = None) -> FeasibleRecord:
        """Make one masked update. What was in `.grad` before it is dropped.

        An error leaves the parameters as they were, with every `.grad` set to None, and the optimizer too unless its
        own step, or something after it, is at fault.

        Args:
            forget: returns the scalar forget loss.
            retain: returns the losses of the n retain samples, shape (n,), n ≥ 2, or n ≥ 4 with test="aggregate", which
                splits them by turns. Sample j must depend on nothing that the other samples hold.
            check: returns losses of other retain samples in the same way: the test uses them instead. Needed for the
                level to hold where the change is made from those of `retain`.

        Raises:
            ValueError: too few samples.
            FloatingPointError: NaN or Inf in a loss, a gradient or the proposed change.
            Others: as `OrthoGrad.step`.
        """
        start = time.perf_counter()
        which, tested = ("retain", retain) if check is None else ("check", check)
        given = {"forget": forget, which: tested}
        with Closures(self.model, self.optimizer, batch_statistics=False, **given) as closures:
            params = closures.params
            forget_loss, u = self._forget(forget, closures)
            with closures.watch(which), per_sample(self.model, params) as tape:
                losses = tested()
            check_losses(losses)
            closures.compare(losses, lambda names: [u[name] for name in names])
            if not tape.recording.sites:
                closures.check_made_inside(losses, tested, which)
            test = (Coordinate if self.test == "coordinate" else Aggregate)(tape, losses, u, self.delta)
            retain_loss = float(losses.detach().double().mean())
            record, change = self._propose(params, u, forget, retain)
            masked, sums = test.choose(change)
            foreach_add_([p.detach() for p in params.values()], [masked[name] for name in params])  # all or none
        return FeasibleRecord(
            kept=sums.kept / sums.moved if sums.moved else 1.0,
            level=self.delta,
            preserved_norm=math.sqrt(sums.kept_squared_norm / sums.squared_norm) if sums.squared_norm else 1.0,
            forget_change=sums.forget_change,
            retain_change=test.mean,
            retain_error=test.error,
            forget_loss=forget_loss,
            retain_loss=retain_loss,
            seconds=time.perf_counter() - start,
            method=record,
        )

    def _forget(self, forget: Closure, closures: Closures) -> tuple[float, dict[str, Tensor | None]]:
        """Return the forget loss and u, by name; None for what the loss does not depend on."""
        params = closures.params
        with closures.watch("forget"):
            loss = scalar_loss(forget)
        value = loss_value(loss)
        grads = torch.autograd.grad(loss, list(params.values()), torch.full_like(loss, self.sign), allow_unused=True)
        used = {name: g for name, g in zip(params, grads, strict=True) if g is not None}
        if not used:
            raise ValueError("forget() returned a loss that depends on no parameter that the optimizer holds")
        check_finite_tensors(used, "the forget gradient")
        return value, dict.fromkeys(params) | used

    def _propose(
        self, params: dict[str, nn.Parameter], u: dict[str, Tensor | None], *closures: Closure
    ) -> tuple[object, Tensors]:
        """Return the method's record and the change that it or the optimizer makes; the parameters end as they were."""
        before = copies(params)
        # The graph of the retain losses is still needed: the weights in it will be what they were.
        with keeping_versions(list(params.values())), torch.no_grad():
            try:
                with torch.enable_grad():
                    record = self._step(params, u, *closures)
                change = {}
                for name, p in params.items():
                    change[name] = p - before[name]
                    p.copy_(before[name])
                    del before[name]  # one copy less at a time, and only what is done with
                check_finite_tensors(change, "the change that the optimizer proposes")
            finally:
                clear_grads(self.optimizer)
                write_(params, before)
        return record, change

    def _step(self, params: dict[str, nn.Parameter], u: dict[str, Tensor | None], *closures: Closure) -> object:
        """Let the method or the optimizer step, and return the method's record."""
        if self.method is not None:
            return self.method.step(*closures[: self._closures])
        for name, p in params.items():
            p.grad = None if u[name] is None else u[name].clone()  # some optimizers write to it
        self.optimizer.step()
        return None


def _check_method(method: object, model: nn.Module, ascend: bool) -> None:
    """Check that a method has what `UnlearningMethod` says, is made for this model and goes the same way."""
    kind = type(method).__name__
    lacking = [name for name in ("step", "model", "optimizer") if not hasattr(method, name)]
    if lacking:
        raise ValueError(f"optimizer must be a torch optimizer or a method; {kind} has no {', '.join(lacking)}")
    if method.model is not model:
        raise ValueError(f"the {kind} was made for another model")
    sign = getattr(method, "sign", None)
    ascends = getattr(method, "ascend", ascend) if sign is None else sign < 0
    if ascends is not ascend:
        raise ValueError(f"ascend={ascend}, but the {kind} has ascend={ascends}: one objective is needed")
