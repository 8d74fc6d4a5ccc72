"""Steps whose applied change is orthogonal, whatever the optimizer: `OrthoGrad(..., metric="optimizer")`.

The derivation is in docs/optimizer_metric.md. Letters: u the forget part of a gradient, M its momentum, R that of all
the rest, D the diagonal by which the optimizer scaled gradients in this step, F the forgetting part of the change that
it made.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._options import outside
from .._torch_private import drop_step_hooks, version
from ..ops.numerics import product_dtype
from ..recording.host_reads import lengths, to_host
from ..tape.project import check_gradients
from ..tape.weighted import RetainSide
from .before import Before
from .common import clip_, is_sharded, lay_out_grads, stepping, whole
from .protocol import SteppingOptimizer
from .responses import SGD, Custom, Diagonal, State, known_response, response_of
from .written import Written

FLOOR = 0.1  # of the root mean square of 1 / D in a tensor, which the metric adds to 1 / D
MOMENTUM = "forget_momentum"  # the name of M in the state of the optimizer, and so in its state_dict
LEFT_OUT = ("squares", "samples", "passes")  # of a projection, in the record of a step

_followed: weakref.WeakSet[SteppingOptimizer] = weakref.WeakSet()  # optimizers whose steps are followed
_stepping: weakref.WeakSet[SteppingOptimizer] = weakref.WeakSet()  # those that a `MetricStep` calls now


def follow(optimizer: SteppingOptimizer) -> None:
    """Let M decay in steps that somebody else takes with an optimizer: nothing is forgotten in them."""
    if known_response(optimizer) is not None and optimizer not in _followed:
        _followed.add(optimizer)
        optimizer.register_step_post_hook(_decay)


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, _: object, __: object) -> None:
    if optimizer in _stepping:
        return
    response = response_of(optimizer)
    skips = getattr(optimizer, "found_inf", None)  # by which a scaler tells a fused optimizer to leave all as it is
    for group in optimizer.param_groups:
        decay = response.decay(group)
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if p.grad is not None and MOMENTUM in state:
                M = state[MOMENTUM]
                M.mul_(decay if skips is None else torch.where(skips.to(M.device) > 0, 1.0, decay))


class MetricStep:
    """One step: everything that can be refused is, before the optimizer steps; then its change is corrected.

    Args:
        params: what is updated, by name; p.grad holds the forget part of the gradient, and the whole one from here on.
        hold: takes the retain side and adds its part to every p.grad.
        clip: scales all p.grad so that their norm is at most what it is given, and returns by what.
        norms: of p.grad of some parameters, by name; [number of names]. same: checks that all processes have one value.
        mask: the coordinates that forgetting may change, by name and laid out like the parameters; empty: all.

    Raises as `hold`, and ValueError for parameter groups that make no usable diagonal.
    """

    def __init__(
        self,
        optimizer: SteppingOptimizer,
        params: Mapping[str, nn.Parameter],
        hold: Callable[[], RetainSide],
        clip: Callable[[float], Tensor | float] | None = None,
        norms: Callable[[list[str]], Tensor] | None = None,
        same: Callable[[str, object], None] = lambda what, value: None,
        *,
        mask: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.optimizer, self.params, self.response = optimizer, params, response_of(optimizer)
        self.clip = clip or functools.partial(clip_, list(params.values()))
        self.norms = norms or (lambda names: lengths([params[name].grad for name in names]))
        self.same, self.mask = same, mask or {}
        self._look_at_groups()
        follow(optimizer)
        self.change: dict[str, Tensor] = {}  # F
        self.uncorrected = False  # whether the optimizer stepped, or is about to, and was not corrected
        self.floors: dict[str, Tensor] = {}  # what is added to 1 / D of a parameter
        self.before: Before | None = None
        if self.mask:
            check_gradients(params)  # which refuses sparse ones
        for name, m in self.mask.items():
            if params[name].grad is not None:
                params[name].grad.mul_(m)  # NaN stays NaN, and is refused
        self.held = hold()

    def _look_at_groups(self) -> None:
        """Find the group of every parameter: loading a state_dict puts others in their place."""
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self.groups = {name: group_of[id(p)] for name, p in self.params.items()}
        for group in self.optimizer.param_groups:
            _check_group(group)
        half = next((name for name, p in self.params.items() if p.dtype == torch.float16), None)
        if half and "eps" in self.groups[half] and not isinstance(self.response, Custom):
            raise ValueError(
                f'metric="optimizer" cannot know what {type(self.optimizer).__name__} does to {half}, which is '
                "float16: squares of its gradients vanish there. Keep float32 weights under autocast, or bfloat16"
            )
        for name, p in self.params.items():
            if type(self.response) is SGD and self.groups[name].get("fused") and p.is_cpu and p.itemsize == 2:
                raise ValueError(
                    f"torch.optim.SGD(fused=True) leaves most elements of {name} where they are: of 16-bit weights on "
                    "a CPU it moves the last few alone. Use fused=False"
                )

    def finish(
        self, scaler: torch.amp.GradScaler | None, max_norm: float | None, damping: float, rtol: float | None
    ) -> dict[str, Any]:
        """Clip, step and correct; return the fields of the record. `.grad` holds F afterwards."""
        with stepping(scaler, self.optimizer) as step:
            scale, fields = self._clip(scaler, max_norm), {}
            lay_out_grads(self.params)
            with_hooks = hasattr(self.optimizer, "register_step_pre_hook")
            if with_hooks:  # other hooks may change `.grad`
                stop = self.follow_(damping, rtol, nullcontext, fields.update, scale, scaler)
            else:
                self._before_step(scaler, scale)
                stop = functools.partial(_stepping.discard, self.optimizer)
            try:
                step()
            except BaseException as error:  # an interrupt in the optimizer's own code, too
                self._undo(error)
                raise
            finally:
                stop()
        return fields if with_hooks else self._after_step(damping, rtol)

    def follow_(
        self,
        damping: float,
        rtol: float | None,
        around: Callable[[], AbstractContextManager[object]],
        done: Callable[[dict[str, Any]], object],
        scale: Tensor | float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Callable[[], None]:
        """Correct the optimizer's next step, whoever takes it, and call `done` with the fields of the record then.

        What was to be corrected before is not any more. A step on other gradients than those that are in place now is
        somebody else's, and left alone.

        Args:
            around: makes the context of what is done then.
            scale: by what p.grad was multiplied so far. scaler: whose state is put back after an error.

        Returns:
            A function after which nothing is corrected.
        """
        written, scales, handles = Written(self.params, self.norms), [], []
        getattr(self.optimizer, "stop_correction", lambda: None)()

        def before(_: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            kept = written.kept()
            with around():
                self.same("whether .grad is still what OrthoGrad wrote", [any(kept), all(kept)])
                if not any(kept):
                    stop()
                    warnings.warn(
                        "the optimizer steps on other gradients than OrthoGrad wrote to `.grad`: this step is not "
                        "corrected. Scale them in place",
                        stacklevel=outside(),
                    )
                    return
                if any(value is not None for value in (*args[1:], *kwargs.values())):
                    raise ValueError('with metric="optimizer" give optimizer.step no closure: it would change `.grad`')
                if getattr(self.optimizer, "grad_scale", None) is not None:
                    raise ValueError(
                        'with metric="optimizer" call scaler.unscale_(optimizer) before scaler.step(optimizer)'
                    )
                ratio = written.factor()
                rates = [group.get("lr") for group in self.optimizer.param_groups]
                rates = [None if isinstance(rate, Tensor) else rate for rate in rates]  # that one would be waited for
                self.same("by what .grad was multiplied, or the learning rates", [ratio, rates])
                scales.append(scale * ratio)
                self._before_step(scaler, scales[-1])

        def after(_: torch.optim.Optimizer, __: object, ___: object) -> None:
            try:
                stop()
                if not scales:
                    raise RuntimeError("backward was called inside optimizer.step(closure): that step is not corrected")
                with around():
                    done(self._after_step(damping, rtol))  # of a step that failed before it, too
            except BaseException as error:
                self._undo(error)
                raise

        def stop() -> None:
            _stepping.discard(self.optimizer)
            drop_step_hooks(self.optimizer, (before, after))
            for handle in handles:
                handle.remove()
            if getattr(self.optimizer, "stop_correction", None) is stop:
                del self.optimizer.stop_correction

        self.optimizer.stop_correction = stop  # first: after Ctrl-C in here the next step calls it
        handles.append(self.optimizer.register_step_pre_hook(before))
        handles.append(self.optimizer.register_step_post_hook(after))
        return stop

    def _before_step(self, scaler: torch.amp.GradScaler | None, scale: Tensor | float) -> None:
        """Note what has to be known before the optimizer steps; scale: by what both parts of p.grad were multiplied."""
        self._look_at_groups()
        may_fail = self.held.reruns or isinstance(self.response, Custom)  # whether D can be used shows after the step
        self.before = Before(self.optimizer, self.params, scaler) if may_fail else None
        if self.before is not None:
            self.held.weights = self.before.params
        self.moving = [name for name, p in self.params.items() if p.grad is not None]
        self.first = {name: self.response.starts_with_gradient(self._state(name)) for name in self.moving}
        self._mask_momentum()
        momenta = {k: self._state(k)[MOMENTUM] for k in self.moving if MOMENTUM in self._state(k)}
        self.versions = {name: version(self.params[name]) for name in self.moving}
        self.updated = {name: version(M) for name, M in momenta.items()}
        self.change, self.scale, self.uncorrected = {}, scale, True
        _stepping.add(self.optimizer)

    @torch.no_grad()
    def _mask_momentum(self) -> None:
        """Take out of the momentum what steps without this mask forgot outside of it."""
        for name in self.mask.keys() & set(self.moving):
            M = self._state(name).get(MOMENTUM)
            if M is not None and self.response.has_momentum(self.groups[name]):
                self.response.take_out(M - M * self.mask[name], M, self._state(name))

    def _after_step(self, damping: float, rtol: float | None) -> dict[str, Any]:
        """Correct what the optimizer did."""
        try:
            with torch.no_grad():
                return self._correct(self.moving, damping, rtol)
        except BaseException as error:
            self._undo(error)
            raise

    @torch.no_grad()
    def _undo(self, error: BaseException) -> None:
        """Make everything what it was before the optimizer stepped, if that was kept; else take F out."""
        uncorrected, self.uncorrected = self.uncorrected, False
        if self.before is not None:
            self.before.put_back()
            return
        stepped = uncorrected and all(version(self.params[k]) != v for k, v in self.versions.items())
        if not stepped:
            return
        try:
            for name in self.moving:
                if name not in self.change:
                    self._forgetting(name)
                self.params[name].sub_(self.change[name])
            note = (
                "the optimizer had stepped already. The forgetting part of its step was taken out of the parameters; "
                "the rest of it (retain part, weight decay) stands, and so does the optimizer's state"
            )
        except BaseException as second:
            note = (
                "the optimizer had stepped already, and its step could not be corrected nor taken out again "
                f"({type(second).__name__}): it may go along retain gradients. Load a checkpoint"
            )
            warnings.warn(note, RuntimeWarning, stacklevel=outside())
        getattr(error, "add_note", warnings.warn)(note)  # Python 3.10 has no notes

    def _clip(self, scaler: torch.amp.GradScaler | None, max_norm: float | None) -> Tensor | float:
        """Unscale and clip p.grad; return by what it was multiplied, and with it both of its parts."""
        scale: Tensor | float = 1.0
        if scaler is not None:
            scale = 1.0 / scaler.get_scale()
            scaler.unscale_(self.optimizer)
        if max_norm is not None:
            scale = scale * self.clip(max_norm)
        return scale

    def _correct(self, moving: list[str], damping: float, rtol: float | None) -> dict[str, Any]:
        if isinstance(self.response, Custom):
            self._check_diagonals(moving)
        for name in moving:
            self._forgetting(name)
        projection = self.held.correct_(self.change, self._metric, self._carry, damping, rtol)
        self.uncorrected, change, self.change = False, self.change, {}
        fields = {name: value for name, value in vars(projection).items() if name not in LEFT_OUT}
        for name, F in change.items():
            if F is not self.params[name].grad:
                self.params[name].grad.copy_(F)
        return fields

    def _forgetting(self, name: str) -> None:
        """Put F of a parameter into `change`, and bring M up to date; again where an error came in between."""
        p, state, group = self.params[name], self._state(name), self.groups[name]
        u = self.held.forgotten.get(name)
        u = torch.zeros_like(p.grad) if u is None else u
        if not isinstance(self.scale, float) or self.scale != 1:
            u = u * self.scale  # not in place: an error may come before u is used
        M = self._momentum(name) if self.response.has_momentum(group) else None
        updates = 0 if M is None else version(M) - self.updated.setdefault(name, version(M))
        if updates not in (0, self.response.updates):
            raise RuntimeError("M was changed in part")
        F = self.response.change(u, p.grad, M, self._diagonal(name), self.first[name], state, group, bool(updates))
        self.change[name] = F
        if F.dtype == p.grad.dtype:  # the gradient has done its work
            p.grad.copy_(F)
            F = p.grad
        self.change[name] = F.contiguous()
        self.held.forgotten.pop(name, None)

    def _state(self, name: str) -> State:
        """Return the optimizer's state of a parameter, empty where it has none."""
        return getattr(self.optimizer, "state", {}).get(self.params[name], {})

    def _diagonal(self, name: str) -> Diagonal:
        return self.response.diagonal(self.params[name], self._state(name), self.groups[name])

    def _metric(self, name: str) -> Diagonal:
        """Return P: D with its largest elements bounded, and 0 where forgetting may change nothing."""
        D = self._bounded(name)
        return D if name not in self.mask else self.mask[name].to(product_dtype(self.params[name].dtype)).mul_(D)

    def _bounded(self, name: str) -> Diagonal:
        """Return D with its largest elements bounded: those would take the whole correction."""
        D = self._diagonal(name)
        if not isinstance(D, Tensor) or not D.ndim:
            return D
        inverse = 1 / D
        if name not in self.floors:  # whole, else shards would exchange it at every look
            self.floors[name] = whole(FLOOR / max(1, D.numel()) ** 0.5 * inverse.norm())
        del D
        return inverse.add_(self.floors[name]).reciprocal_()

    def _momentum(self, name: str) -> Tensor:
        state = self._state(name)
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(self.params[name], memory_format=torch.preserve_format)
        return state[MOMENTUM]

    def _carry(self, name: str, delta: Tensor) -> None:
        group, D = self.groups[name], self._diagonal(name)
        if self.response.has_momentum(group):
            D = torch.as_tensor(D, dtype=delta.dtype, device=delta.device)
            share = delta.div_(D.clamp_min(torch.finfo(D.dtype).tiny))  # 0 of 0 is 0
            self.response.carry(self._momentum(name), share, self._state(name), group)

    def _check_diagonals(self, names: list[str]) -> None:
        """Check what an optimizer says of itself, in one transfer."""
        numbers, zero = [], torch.zeros((), dtype=torch.float64)
        for name in names:
            p, D = self.params[name], self._diagonal(name)
            if isinstance(D, Tensor) and D.ndim and D.shape != p.shape:
                raise ValueError(
                    f"diagonal() returned shape {tuple(D.shape)} for {name}, which has {tuple(p.shape)}; "
                    "nothing was changed"
                )
            moved = [zero] * 4 if is_sharded(p) else self._unexplained(name, D)
            D = whole(torch.as_tensor(D, device=p.device))
            numbers += [D.amin().double(), D.amax().double()] if D.numel() else [zero + 1] * 2
            numbers += moved
        values = iter(to_host(*numbers))
        totals = [0.0] * 4
        for name, low, high, *moved in zip(names, *[values] * 6, strict=True):
            usable = 0 < low <= high < float("inf") or (low == high == 0 and self.groups[name].get("lr") == 0)
            if not usable:
                raise ValueError(
                    f"the optimizer's diagonal of {name} must be positive and finite; got values from {low} to {high}. "
                    "Nothing was changed"
                )
            totals = [total + one for total, one in zip(totals, moved, strict=True)]
        said, error, product, rounding = totals
        if error > 1e-4 * said + rounding and product**2 > 0.25 * said * error:
            raise ValueError(
                "the optimizer did not move the parameters by -diagonal() * gradient, but by about "
                f"{1 - product / said:.3g} times that: its method diagonal() is wrong, or it has momentum. "
                "Nothing was changed"
            )

    def _unexplained(self, name: str, D: Diagonal) -> list[Tensor]:
        """Return ‖s‖², ‖e‖², ⟨e, s⟩ and the square of the rounding of e, for the change s - e of a parameter.

        s is what D says it is. What lies along the parameter is in neither: it may be weight decay.
        """
        p = self.params[name]
        before = self.before.params[name].to(p.device, torch.float64)
        s = torch.as_tensor(D, device=p.device).double() * -p.grad.double()
        e = s - (p.double() - before)
        square = before.square().sum()
        for t in (s, e):
            t -= (t * before).sum() / square.clamp_min(1e-300) * before
        return [s.square().sum(), e.square().sum(), (e * s).sum(), (4 * torch.finfo(p.dtype).eps) ** 2 * square]


def _check_group(group: State) -> None:
    """Check what makes the diagonal of a parameter group: it has no zeros and no infinities then."""
    lr, eps = group.get("lr", 0.0), group.get("eps", 1.0)
    if not isinstance(lr, Tensor) and not 0 <= lr < float("inf"):
        raise ValueError(f'metric="optimizer" needs learning rates that are finite and not negative; got {lr}')
    if not isinstance(eps, Tensor) and not eps > 0:
        raise ValueError(
            f'metric="optimizer" needs eps > 0: with {eps} the diagonal is infinite where no gradient ever was'
        )
