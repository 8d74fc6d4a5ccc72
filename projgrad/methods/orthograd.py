"""OrthoGrad: ascend on the forget loss, orthogonally to the gradient of every retain sample."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _options
from .._torch_private import version
from ..recording.fixed import modules_of
from ..recording.host_reads import Impossible, Script
from ..recording.losses import check_shape, check_values
from ..tape.factors import ForgetFactors
from ..tape.per_sample import per_sample
from ..tape.records import Projection
from ..tape.weighted import hold
from .closures import Closures
from .common import (
    clear_grads,
    lay_out_grads,
    learning_rates,
    loss_value,
    restore_shards,
    scalar_loss,
    stepping,
    trainable_parameters,
)
from .forget_mask import check_mask
from .graphed import GraphedStep
from .micro_batches import Closed, MicroBatchOptions, accumulate_forget, closures_of
from .optimizer_metric import MetricStep, follow
from .protocol import Closure
from .replicas import ReplicatedModel
from .responses import response_of
from .spread import spread_model, spread_step
from .step_record import PENDING, SKIPPED, StepRecord, record_fields
from .union import project_union, union_metric_step


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
        union_tolerance, max_passes: of retain sets in micro-batches: how far u_perp may be from the exact result,
            relative, and its cosines from zero; and after how many passes over the set it is taken as it is, with a
            warning.
        progress: show a bar while a retain set in micro-batches is worked on; needs rich.
        forget_reduction: "mean" or "sum" of the losses that the closures of `forget` return.
        process_group: the processes that take the steps together, each with some of the samples. Default: those over
            which the model is spread, by DistributedDataParallel or `fully_shard`; see docs/processes.md.
        metric: "gradient" projects the gradient. "optimizer" makes the forgetting part of what the optimizer applies
            orthogonal, for SGD, Adam, AdamW, RMSprop, Adagrad in all variants, or one with a method
            `diagonal(param, state, group) -> Tensor`; `.grad` then holds that part. See docs/optimizer_metric.md.
        mask: with metric="optimizer": the coordinates that forgetting may change, boolean tensors by the names of the
            parameters, one for each that is updated. u is masked and its projection stays in the mask: m ∘ u_perp is
            orthogonal to every whole g_j. Lengths in the record are those of m ∘ u. The retain part (α) and decay move
            all coordinates. See docs/replacing.md.

    Raises:
        TypeError: a wrong type of model, optimizer or option.
        ValueError: an option out of its range (alpha in [0, 1], damping ≥ 0 and finite, rtol in [0, 1), max_norm > 0),
            an unknown scope or metric, no trainable parameter in the optimizer, a projector with damping, rtol or a
            scaler; LBFGS, an optimizer with maximize=True; with metric="optimizer" one whose diagonal is not known, a
            projector, or keep_output_gradients=False; a mask without metric="optimizer", or one that does not fit.

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
        union_tolerance: float = 1e-4,
        max_passes: int = 100,
        progress: bool = False,
        forget_reduction: str = "mean",
        process_group: "dist.ProcessGroup | None" = None,
        metric: str = "gradient",
        mask: Mapping[str, Tensor] | None = None,
    ) -> None:
        restore_shards(model)
        params = trainable_parameters(model, optimizer)
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
        self.micro = MicroBatchOptions(union_tolerance, max_passes, progress, forget_reduction)
        self.process_group, self._spread = process_group, None
        _options.check_choice("metric", metric, ("gradient", "optimizer"))
        self.metric = metric
        if metric == "optimizer":
            response_of(optimizer)
            follow(optimizer)  # steps before the first of ours, with a state that was loaded
            if projector is not None or not keep_output_gradients:
                raise ValueError('metric="optimizer" cannot be used with projector or keep_output_gradients=False')
        self.mask = mask
        self.checked_mask = self._checked_mask(params)
        self._factors_help = False  # whether the factors of the forget gradient saved work in the step before
        self._factors = ForgetFactors()
        self._script: Script | None = None
        self._unused: list[tuple[int, int]] = []  # gradients that backward wrote, and the weights that they are for
        self._stop: Callable[[], None] = _nothing_to_stop  # correcting the optimizer's next step

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: the correction of the optimizer's next step stays with this one."""
        return vars(self) | {"_stop": _nothing_to_stop, "_unused": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.metric == "optimizer":
            follow(self.optimizer)  # of which a copy has no hooks

    def step(self, forget: Closed, retain: Closed) -> StepRecord:
        """Make one update.

        An error before the optimizer steps leaves the model and the optimizer as they were, with every
        `.grad` set to None; what a closure itself changes stays changed. So does one in the closures of `retain` that
        metric="optimizer" runs after it. Another error after it takes the forgetting part of the change out again.

        What was accumulated in `.grad` before is dropped. Each closure makes its forward pass itself, in every step
        anew, and returns losses: it may call `zero_grad()`, but must leave no gradients behind (attack inputs with
        `torch.autograd.grad`) and change no weights, unless the forward pass does so in both closures alike. Changes
        through `.data` cannot be seen.

        `.grad` holds the update afterwards, so another `optimizer.step()` would apply it again. Where the loop is
        somebody else's and steps by itself, as in a transformers `Trainer`, use `backward`.

        Args:
            forget: returns the scalar forget loss. Or an iterable of closures, micro-batches: each returns a scalar,
                or one loss per sample, and `forget_reduction` of all of them is the forget loss.
            retain: returns the losses of the n retain samples, shape (n,): each one's gradient is protected. Sample j
                must depend on nothing that the other samples hold. Or an iterable of such closures: the gradients of
                all their samples are protected, and α weighs the mean over all. Each closure is called once for every
                pass and has to return the same losses each time; random numbers of torch are replayed.
                Over several processes: of this one's samples.

        Raises:
            TypeError: something other than a closure.
            ValueError: a loss of the wrong shape, batch norm with batch statistics (per-sample gradients do not exist),
                retain losses that share terms between samples; a closure that leaves gradients behind, changes the
                weights that the other one used or returns losses of a forward pass made before; a model that is spread
                over processes in a way that is not supported, or processes that disagree.
            RuntimeError: called inside a closure of another step on the same parameters; another process failed, or
                did not answer.
            FloatingPointError: NaN or Inf in a loss or a gradient.
            ArithmeticError: the projection contradicts plain autograd, or a second backward pass the first one.
        """
        start = time.perf_counter()
        self._stop()
        with self._processes(), self._closures(forget, retain) as (closures, forgets, retains):
            numbers, metric_step = self._gradients(closures, forgets, retains)
            if metric_step is None:
                self._apply(closures.params)
            else:
                numbers |= metric_step.finish(self.scaler, self.max_norm, self.damping, self.rtol)
        return StepRecord(**numbers, seconds=time.perf_counter() - start)

    def backward(self, forget: Closed, retain: Closed) -> StepRecord:
        """Write the update to `.grad` and take no step: for loops whose clipping, scaler and steps are somebody else's.

            record = unlearner.backward(forget, retain)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        It stands where a training loop has `loss.backward()`, but what was accumulated in `.grad` before is dropped:
        give lists of closures instead. With a scaler `.grad` is scaled, as after `scaler.scale(loss).backward()`.
        With metric="optimizer" the next step of the optimizer is corrected, and the record complete only after it.
        Until then `.grad` may be scaled, all of it by one factor.

        Args:
            forget, retain: as for `step`.

        Raises as `step`, and ValueError where `max_norm` is set; with metric="optimizer" for an optimizer without
        `register_step_pre_hook`, and at its step where `.grad` was changed by more than a factor.
        """
        if self.max_norm is not None:
            raise ValueError("max_norm clips in step: leave it out, and clip after backward")
        if self.metric == "optimizer" and not hasattr(self.optimizer, "register_step_pre_hook"):
            raise ValueError(
                'with metric="optimizer" backward needs an optimizer with register_step_pre_hook; use step'
            )
        start = time.perf_counter()
        self._stop()
        params = trainable_parameters(self.model, self.optimizer).values()
        if self._unused and self._unused == [(id(p.grad), version(p)) for p in params if p.grad is not None]:
            warnings.warn(
                "backward was called twice without a step of the optimizer, and drops what it wrote before: to "
                "accumulate over micro-batches give it lists of closures, once",
                stacklevel=2,
            )
        with self._processes(), self._closures(forget, retain) as (closures, forgets, retains):
            numbers, metric_step = self._gradients(closures, forgets, retains)
            lay_out_grads(closures.params)
            self._unused = [(id(p.grad), version(p)) for p in closures.params.values() if p.grad is not None]
            if metric_step is None:
                return StepRecord(**numbers, seconds=time.perf_counter() - start)
            record = StepRecord(**PENDING | numbers, seconds=time.perf_counter() - start)

            @contextmanager
            def around() -> Iterator[None]:
                with self._processes(), closures:
                    yield

            self._stop = metric_step.follow_(self.damping, self.rtol, around, vars(record).update)
        return record

    def _checked_mask(self, params: dict[str, nn.Parameter]) -> dict[str, Tensor] | None:
        """Return the mask of what is updated, by the names of `params`."""
        if self.mask is None:
            return None
        if self.metric != "optimizer":
            raise ValueError('mask needs metric="optimizer", which weighs every coordinate by itself, for SGD too')
        return check_mask(self.model, params, self.mask)

    def _processes(self) -> AbstractContextManager[object]:
        """Make the context of work that several processes do together."""
        spread = self._together()
        return nullcontext() if spread is None else spread.together()

    @contextmanager
    def _closures(
        self, forget: Closed, retain: Closed
    ) -> Iterator[tuple[Closures, dict[str, Closure], dict[str, Closure]]]:
        """Make the context in which closures are called, with `.grad` dropped; give them by name."""
        clear_grads(self.optimizer)
        forgets, retains = closures_of("forget", forget), closures_of("retain", retain)
        options = {"spread": self._spread is not None, "batch_statistics": False}
        with Closures(self.model, self.optimizer, **options, **forgets, **retains) as closures:
            yield closures, forgets, retains

    def _gradients(
        self, closures: Closures, forgets: dict[str, Closure], retains: dict[str, Closure]
    ) -> tuple[dict[str, Any], MetricStep | None]:
        """Set every p.grad; return the fields of the record, and with metric="optimizer" the step to finish."""
        _options.within("alpha weighs the mean retain gradient and", self.alpha, "[0, 1]")  # it may have been changed
        self.checked_mask = self._checked_mask(closures.params)  # it and the parameters may have been changed
        try:
            if self._spread is not None:
                numbers = spread_step(self, self._spread, closures, forgets, retains)
            else:
                loss = self._forget(forgets, closures)
                numbers = (self._retain if len(retains) == 1 else self._retain_union)(loss, retains, closures)
        except FloatingPointError:
            if self.scaler is None:
                raise
            clear_grads(self.optimizer)
            p = next(iter(closures.params.values()))  # infinite: the scaler skips this step and scales less
            p.grad = torch.full_like(p, float("inf"))
            numbers = dict(SKIPPED)
        return numbers, numbers.pop("metric_step", None)

    def graphed(
        self,
        forget: Callable[[Any], Tensor],
        retain: Callable[[Any], Tensor],
        forget_batch: Any,
        retain_batch: Any,
    ) -> GraphedStep:
        """Return a step for batches of fixed shapes whose gradients come from one CUDA graph; see `GraphedStep`.

        Args:
            forget: returns the scalar forget loss of a batch. retain: returns the losses (n,) of a batch.
            forget_batch, retain_batch: examples, with the shapes and types of all that follow; tensors on the GPU, in
                any nesting of dictionaries, lists and tuples.

        Returns:
            A function of a forget batch and a retain batch, which makes one update like `step` and returns its record.

        Example:
            >>> step = unlearner.graphed(forget_loss, retain_losses, *next(batches))  # doctest: +SKIP
            >>> for forget_batch, retain_batch in batches:  # doctest: +SKIP
            ...     record = step(forget_batch, retain_batch)
        """
        batches = forget_batch, retain_batch
        return GraphedStep(self.step, self._write, self._finish, self._state, (forget, retain), batches)

    def _write(
        self, forget: Callable[[], Tensor], retain: Callable[[], Tensor], script: Script | None
    ) -> dict[str, nn.Parameter]:
        """Set p.grad to what the optimizer is to apply; return the parameters. script: for `GraphedStep`."""
        if self.projector is not None or not self.keep_output_gradients:
            raise Impossible("a projector, or keep_output_gradients=False, has no graph")
        if self.metric == "optimizer":
            raise Impossible('metric="optimizer" has no graph')
        if self._together() is not None:
            raise Impossible("a model that is spread over processes has no graph")
        given = {"forget": forget, "retain": retain}
        with Closures(self.model, self.optimizer, batch_statistics=False, **given) as closures:
            self._script, self._factors_help = script, False
            try:
                self._retain(self._forget({"forget": forget}, closures), {"retain": retain}, closures)
            finally:
                self._script = None
            return closures.params

    def _finish(self, projection: Projection, losses: Sequence[float], start: float) -> StepRecord:
        """Let the optimizer apply p.grad."""
        self._apply(trainable_parameters(self.model, self.optimizer))
        return StepRecord(**record_fields(projection, losses), seconds=time.perf_counter() - start)

    def _state(self) -> Hashable:
        """Return what a graph holds as it was at the capture."""
        options = self.alpha, self.sign, self.scope, self.damping, self.rtol, id(self.scaler), id(self.projector)
        params = trainable_parameters(self.model, self.optimizer)
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        held = [(name, t.data_ptr(), t.requires_grad, id(params.get(name))) for name, t in tensors]
        training = [module.training for module in modules_of(self.model)]
        rates = learning_rates(self.optimizer, params)
        precision = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cuda")
        return options, tuple(held), tuple(training), tuple(rates.items()), precision

    @property
    def sent(self) -> Counter[str]:
        """Return the bytes that this process sent to the others so far, by purpose, as rings send them."""
        return Counter() if self._spread is None else self._spread.processes.sent

    def _together(self) -> ReplicatedModel | None:
        """Return how the model is spread over processes, found at the first step; None if it is in this one alone."""
        if self._spread is None:
            self._spread = spread_model(self.model, self.process_group)
        return self._spread

    def _forget(self, forgets: dict[str, Closure], closures: Closures) -> Tensor:
        """Set p.grad to ± (1 - α) u; return the loss, not looked at yet: the device may still be busy with it."""
        self._factors = ForgetFactors()  # not those of a step that failed
        if len(forgets) > 1:
            scale, weight = self.scaler.scale if self.scaler else lambda loss: loss, self.sign * (1 - self.alpha)
            return accumulate_forget(closures, forgets, weight, self.micro.forget_reduction, scale)
        (forget,) = forgets.values()
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

    def _retain_union(self, loss: Tensor, retains: dict[str, Closure], closures: Closures) -> dict[str, Any]:
        """Do what `_retain` does for the union of all micro-batches."""
        if self.projector is not None or self.damping or self.rtol is not None or not self.keep_output_gradients:
            raise ValueError(
                "a retain set in micro-batches is solved without projector, damping, rtol and "
                "keep_output_gradients=False: use one closure, or leave them out"
            )
        self._factors, self._factors_help = ForgetFactors(), False
        share = 1 / 16 if self.scaler else 1.0  # as small as in a mean, which is what its scale has been found for
        if self.metric == "optimizer":
            factor = self.scaler.get_scale() * share if self.scaler else 1.0  # the same after the optimizer's step
            fields = union_metric_step(
                self.model,
                closures,
                retains,
                self.micro,
                scope=self.scope,
                alpha=self.alpha / share,
                prepare=lambda losses: losses * factor,
                mask=self.checked_mask,
            )
            return fields | {"forget_loss": loss_value(loss)}
        fields = project_union(
            self.model,
            closures,
            retains,
            self.micro,
            scope=self.scope,
            alpha=self.alpha / share,
            rates=learning_rates(self.optimizer, closures.params),
            prepare=lambda losses: self.scaler.scale(losses) * share if self.scaler else losses,
        )
        return fields | {"forget_loss": loss_value(loss)}

    def _retain(self, loss: Tensor, retains: dict[str, Closure], closures: Closures) -> dict[str, Any]:
        """Set p.grad to ± (1 - α) u_perp + α mean_j(g_j); return the fields of the record."""
        (retain,), params = retains.values(), closures.params
        with closures.watch("retain"), per_sample(self.model, params) as tape:
            losses = retain()
        check_shape(losses)
        closures.compare(losses, lambda names: [params[name].grad for name in names])
        if not tape.recording.sites:
            closures.check_made_inside(losses, retain)
        reads, script = tape.recording.host_reads, self._script
        reads.script = script
        # Of the forget loss and of the retain losses, once the tape has read them.
        values: list[float] = [] if script is None else script.losses
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
            held = lambda: hold(tape.passes, losses, self.scope, add)  # noqa: E731
            metric_step = MetricStep(self.optimizer, params, held, mask=self.checked_mask)
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
        return record_fields(projection, values)

    def _apply(self, params: dict[str, nn.Parameter]) -> None:
        with stepping(self.scaler, self.optimizer) as step:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            if self.max_norm is not None and self._spread is not None:
                self._spread.clip(self.max_norm)
            elif self.max_norm is not None:
                nn.utils.clip_grad_norm_(list(params.values()), self.max_norm)
            lay_out_grads(params)
            step()


def _nothing_to_stop() -> None:
    """Stand in for what stops the correction of a step where there is none."""
