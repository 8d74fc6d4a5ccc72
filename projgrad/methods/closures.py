"""The closures of a step: run where they see no `.grad`, and watched for what they change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .._options import kind
from .._torch_private import BatchNorm, function_modes, sequence_number, uncompiled, version
from ..recording.fixed import modules_of
from ..recording.graph import nodes_of
from ..recording.interception import Interception
from .common import (
    check_alone,
    check_replicas,
    check_statistics,
    clear_grads,
    distributed,
    held_parameters,
    trainable_parameters,
)
from .protocol import Closure, SteppingOptimizer

_running: list[tuple[Closures, str]] = []  # the closures that run now, from the outermost on


class Closures:
    """The closures of one step, a context that begins with every `.grad` of the optimizer set to None.

    An error inside it, or here, leaves them so. While a closure runs no parameter has a `.grad`: `zero_grad()` in it
    does no harm, and what is there afterwards the closure left behind. Python's garbage collector pauses meanwhile: all
    that a step makes dies with it, and would be walked through again and again with all that was ever imported.

    params: what is updated, by name. watched: these and all others that the optimizer holds.
    spread: whether several processes take the step together; else a model that is spread over some is refused.
    batch_statistics: whether batch norms of the model may use them in a closure.
    changed: by closure, the parameters that it changed in place, as they were after it.

    Raises TypeError where what `step` was given cannot be called, ValueError as `trainable_parameters` and
    `check_alone`, RuntimeError inside a closure of another step that updates the same parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SteppingOptimizer,
        *,
        spread: bool = False,
        batch_statistics: bool = True,
        **given: object,
    ) -> None:
        clear_grads(optimizer)
        for name, closure in given.items():
            if not callable(closure) or isinstance(closure, nn.Module):
                raise TypeError(
                    f"{name} must be a function without arguments that runs the model and returns its loss, such as "
                    f"`lambda: cross_entropy(model(x), y)`; got {kind(closure)}"
                )
        self.params, self.optimizer, self.model = trainable_parameters(model, optimizer), optimizer, model
        self._spread, self._given = spread, tuple(given)
        self._norms = [] if batch_statistics else [m for m in modules_of(model) if isinstance(m, BatchNorm)]
        self._look: RemovableHandle | None = None
        updated = set(map(id, self.params.values()))
        held = enumerate(held_parameters(optimizer))
        others = {f"parameter {k} of the optimizer": p for k, p in held if id(p) not in updated}
        self.watched = self.params | others
        self._names = {id(p): name for name, p in self.watched.items()}
        for step, closure in _running:
            shared = [name for key, name in self._names.items() if key in step._names]
            if shared:
                raise RuntimeError(
                    f"step was called inside {closure}() of another step, which updates {shared[0]} too: a closure "
                    "returns losses and no more. Take one step after the other"
                )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step needs gradients: call it outside torch.inference_mode()")
        check_alone(model, self.params, optimizer, spread)
        self.changed: dict[str, dict[str, Tensor]] = {}
        self._inside, self._modes, self._torch_modes = False, [], _torch_modes()
        self._collect: weakref.finalize | None = None

    def __enter__(self) -> Closures:
        self._modes, self._torch_modes = function_modes(), _torch_modes()
        if not gc.isenabled() or len(self._given) > 2:  # with micro-batches a step may last for minutes
            return self
        self._collect = weakref.finalize(self, gc.enable)  # should Ctrl-C keep `__exit__` from it
        try:
            gc.disable()
            return self
        except BaseException:
            gc.enable()
            raise

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if self._collect is not None:
            gc.enable()
            self._collect.detach()
            self._collect = None
        if error is None:
            return
        clear_grads(self.optimizer)
        self._clear_up()
        if self._inside or not isinstance(error, RuntimeError):
            return
        if "backward through the graph a second time" in str(error):
            raise ValueError(
                "a closure returned a loss whose graph was used before, by an earlier step or the other closure: the "
                "forward pass has to be made inside each closure, anew in every step"
            ) from error
        if "modified by an inplace operation" in str(error):
            blamed = " or ".join(f"{closure}()" for closure, names in self.changed.items() if names)
            self._refuse(blamed, sorted({name for names in self.changed.values() for name in names}))

    def _clear_up(self) -> None:
        """Leave what Ctrl-C kept others from leaving: it may come at the first line of what was to clear up."""
        _running[:] = [entry for entry in _running if entry[0] is not self]
        if self._look is not None:
            self._look.remove()
        for mode in function_modes():
            if isinstance(mode, Interception) and mode not in self._modes:
                mode.__exit__(None, None, None)
        grad, autocast, nesting = self._torch_modes
        torch.set_grad_enabled(grad)
        for device, enabled in autocast.items():
            torch.set_autocast_enabled(device, enabled)
        for _ in range(_torch_modes()[2] - nesting):
            torch.autocast_decrement_nesting()

    @contextmanager
    def watch(self, closure: str) -> Iterator[None]:
        """Make the context in which a closure is called, with gradients enabled; put the step's `.grad` back after it.

        Raises ValueError where the closure left a gradient behind, froze a parameter, or ran what it may not run.
        """
        held = [(p, p.grad) for p in self.watched.values() if p.grad is not None]
        for p, _ in held:
            p.grad = None
        versions = [version(p) for p in self.params.values()]
        entry = self, closure
        self._inside = True
        try:
            _running.append(entry)
            self._start = _last_operation()
            with torch.enable_grad(), self._looking_at_modules(closure):
                yield
        finally:
            if entry in _running:
                _running.remove(entry)
        self._check_left_behind(closure)
        for p, grad in held:
            p.grad = grad
        is_second = bool(self.changed)
        self.changed[closure] = {
            name: p.detach() if is_second else p.detach().clone()
            for (name, p), before in zip(self.params.items(), versions, strict=True)
            if version(p) != before
        }
        self._inside = False

    def _check_left_behind(self, closure: str) -> None:
        """Check that a closure left no gradients, and drop those that are zero; and that it froze nothing."""
        grads = {name: p.grad for name, p in self.watched.items() if p.grad is not None}
        for name in grads:
            self.watched[name].grad = None
        name = next((name for name, grad in grads.items() if _any(grad)), None)
        if name is not None:
            raise ValueError(
                f"{closure}() left a gradient in {name}.grad: a closure returns losses, which the step "
                "differentiates. For an attack on the inputs use torch.autograd.grad(loss, x) instead of "
                "loss.backward(), or call optimizer.zero_grad() before returning"
            )
        frozen = [name for name, p in self.params.items() if not p.requires_grad]
        if frozen:
            raise ValueError(f"{closure}() set requires_grad of {frozen[0]} to False: freeze parameters between steps")

    @contextmanager
    def _looking_at_modules(self, closure: str) -> Iterator[None]:
        """Refuse what a closure may not run: whatever mode a batch norm was in before, the closure may change it.

        And wrappers that share gradients of these parameters with other processes.
        """
        alone = distributed() and not self._spread
        if not alone and not self._norms:
            yield
            return

        def check(module: nn.Module, _) -> None:
            if not any(step is self for step, _ in _running):  # a hook that Ctrl-C left behind
                return
            if self._norms:
                check_statistics(module, self.model)
            is_wrapper = alone and isinstance(module, DistributedDataParallel)
            if is_wrapper and any(id(p) in self._names for p in module.parameters()):
                check_replicas(module, f"what {closure}() runs")

        self._look = register_module_forward_pre_hook(check)
        try:
            with uncompiled:  # what was compiled before the step runs no such hook
                yield
        finally:
            self._look.remove()

    def compare(self, losses: Tensor, forgotten: Callable[[list[str]], Sequence[Tensor | None]]) -> None:
        """Check that both closures saw the same weights: those that a forward pass normalises come out alike in both.

        Where a gradient is zero its weight was not used: the rows of a table that only the other closure reads.

        losses: what the second closure returned. forgotten: returns the gradients of the first one's loss, by name;
        asked only for what the second one changed.
        Of more than two closures, micro-batches, none may change a weight.
        Raises ValueError where they did not.
        """
        if len(self.changed) > 2:
            self.check_unchanged()
            return
        (first, before), (second, after) = self.changed.items()
        changed_by_first = [name for name in before if name not in after]
        if changed_by_first:
            used = {id(node.variable) for node in nodes_of(losses) if hasattr(node, "variable")}
            self._refuse(f"{first}()", [name for name in changed_by_first if id(self.params[name]) in used])
        if after:
            grads = zip(after, forgotten(list(after)), strict=True)
            moved = [name for name, grad in grads if grad is not None and _moved(before.get(name), after[name], grad)]
            self._refuse(f"{second}()", moved)

    def check_unchanged(self) -> None:
        """Check that no closure changed a weight in place; raises ValueError."""
        for closure, after in self.changed.items():
            self._refuse(f"{closure}()", list(after))

    def _refuse(self, closure: str, names: list[str]) -> None:
        if names:
            raise ValueError(
                f"{closure} changed {names[0]} in place, so that the two gradients would belong to different weights: "
                "change weights before the step, or in the forward pass of both closures alike"
            )

    def check_made_inside(self, losses: Tensor, closure: Closure | None, name: str = "retain") -> None:
        """Check that the closure that was called last made its forward pass itself; raises ValueError.

        Operations are numbered, by thread: a low number is reason enough to look whether the closure, called again,
        returns the same graph. Where it cannot be called again, and is None, that is reason enough to refuse.
        """
        earlier = {node for node in nodes_of(losses) if sequence_number(node) <= self._start}
        if earlier and closure is not None:
            with self.watch(name):
                again = closure()
            earlier.intersection_update(nodes_of(again))
        if earlier:
            raise ValueError(
                f"{name}() returned losses of a forward pass that was made before it was called: that pass has to "
                f"be made inside the {name} closure, anew in every step"
            )


def _torch_modes() -> tuple[bool, dict[str, bool], int]:
    """Return whether gradients are enabled, whether autocast is, by device, and how deep its contexts are nested."""
    torch.autocast_increment_nesting()
    nesting = torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}, nesting


def _last_operation() -> int:
    """Return the number of the last operation that autograd recorded in this thread."""
    with torch.enable_grad():
        return sequence_number(torch.zeros((), requires_grad=True, device="cpu").clone().grad_fn)


def _any(grad: Tensor) -> bool:
    """Return whether a gradient is not all zeros; of one that is not strided, assume so."""
    return grad.layout != torch.strided or bool(grad.any())


def _moved(before: Tensor | None, after: Tensor, grad: Tensor) -> bool:
    """Return whether a weight that the gradient depends on changed by more than its rounding."""
    if before is None:
        return _any(grad)
    limit = 16 * torch.finfo(after.dtype).eps * after.abs().amax() if after.numel() else 0.0
    return bool((((after - before).abs() > limit) & (grad != 0)).any())
