"""The closures of a step: run out of sight of every `.grad`, and looked after for what they changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .._options import kind
from .._torch_private import sequence_number, version
from .common import check_alone, check_replicas, clear_grads, distributed, trainable_parameters

_running: list[tuple[Closures, str]] = []  # the closures that run now, from the outermost on


class Closures:
    """The closures of one step, which starts with every `.grad` that the optimizer sees set to None.

    An error inside the context, or here, leaves them so.

    While a closure runs no parameter has a `.grad`; what the step holds there is put back afterwards. So `zero_grad()`
    in a closure does no harm, and what is found there after it is what the closure left behind.

    params: what is updated, by name.

    Args:
        model, optimizer: of the method.
        given: what `step` was given, by name.

    Raises:
        TypeError: what was given cannot be called.
        ValueError: no parameter to update, or a model that is spread over processes.
        RuntimeError: called from a closure of another step that updates the same parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, **given: object) -> None:
        clear_grads(optimizer)
        for name, closure in given.items():
            if not callable(closure) or isinstance(closure, nn.Module):
                raise TypeError(
                    f"{name} must be a function without arguments that runs the model and returns its loss, such as "
                    f"`lambda: cross_entropy(model(x), y)`; got {kind(closure)}"
                )
        self.params, self.optimizer = trainable_parameters(model, optimizer), optimizer
        every = [p for group in optimizer.param_groups for p in group["params"]]
        mine = set(map(id, self.params.values()))
        others = {f"parameter {k} of the optimizer": p for k, p in enumerate(every) if id(p) not in mine}
        self.watched = self.params | others
        self._ids = {id(p): name for name, p in self.watched.items()}
        for other, closure in _running:
            shared = [name for key, name in self._ids.items() if key in other._ids]
            if shared:
                raise RuntimeError(
                    f"step was called inside {closure}() of another step, which updates {shared[0]} too: a closure "
                    "returns losses and no more. Take one step after the other"
                )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step needs gradients: call it outside torch.inference_mode()")
        check_alone(model, self.params, optimizer)
        self.changed: dict[str, dict[str, Tensor]] = {}  # by closure: what it changed in place, as it was afterwards
        self._inside = False

    def __enter__(self) -> Closures:
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if error is None:
            return
        clear_grads(self.optimizer)
        if self._inside or not isinstance(error, RuntimeError):
            return
        if "backward through the graph a second time" in str(error):
            raise ValueError(
                "a closure returned a loss whose graph was used before, by an earlier step or the other closure: the "
                "forward pass has to be made inside each closure, anew in every step"
            ) from error
        changed = {name for some in self.changed.values() for name in some}
        if "modified by an inplace operation" in str(error) and changed:
            self._refuse(" or ".join(f"{name}()" for name, some in self.changed.items() if some), sorted(changed))

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Around the call of a closure, with gradients enabled.

        Raises:
            ValueError: it left a gradient behind, or froze a parameter.
        """
        held = [(p, p.grad) for p in self.watched.values()]
        held = [(p, grad) for p, grad in held if grad is not None]
        for p, _ in held:
            p.grad = None
        versions = [version(p) for p in self.params.values()]
        running = self, name
        _running.append(running)
        self._inside = True
        self._start = _last_operation()
        try:
            with torch.enable_grad(), self._alone(name) if distributed() else nullcontext():
                yield
        finally:
            _running.remove(running)
        found = [some for some, p in self.watched.items() if p.grad is not None]
        left = [some for some in found if _any(self.watched[some].grad)]
        for some in found:  # zeros
            self.watched[some].grad = None
        if left:
            raise ValueError(
                f"{name}() left a gradient in {left[0]}.grad: a closure returns losses, which the step differentiates. "
                "For an attack on the inputs use torch.autograd.grad(loss, x) instead of loss.backward(), or call "
                "optimizer.zero_grad() before returning"
            )
        frozen = [some for some, p in self.params.items() if not p.requires_grad]
        if frozen:
            raise ValueError(f"{name}() set requires_grad of {frozen[0]} to False: freeze parameters between steps")
        for p, grad in held:
            p.grad = grad
        later = bool(self.changed)
        self.changed[name] = {
            some: p.detach() if later else p.detach().clone()
            for (some, p), before in zip(self.params.items(), versions, strict=True)
            if version(p) != before
        }
        self._inside = False

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Refuses a forward pass through a wrapper that shares gradients of these parameters with other processes."""

        def look(module: nn.Module, _) -> None:
            if isinstance(module, DistributedDataParallel) and any(id(p) in self._ids for p in module.parameters()):
                check_replicas(module, f"what {name}() runs")

        hook = register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def compare(self, losses: Tensor, forgotten: Callable[[list[str]], Sequence[Tensor | None]]) -> None:
        """Whether both closures saw the same weights: those that a forward pass normalises come out alike in both.

        Where a gradient is zero its weight was not used: the rows of a table that only the other closure reads.

        Args:
            losses: what the second closure returned.
            forgotten: gradients of the first one's loss, by name; asked only for what the second one changed.

        Raises:
            ValueError: they did not.
        """
        first, second = self.changed.values()
        alone = [name for name in first if name not in second]
        if alone:
            used = {id(node.variable) for node in _nodes(losses) if hasattr(node, "variable")}
            self._refuse("forget()", [name for name in alone if id(self.params[name]) in used])
        if second:
            grads = zip(second, forgotten(list(second)), strict=True)
            moved = [name for name, grad in grads if grad is not None and _moved(first.get(name), second[name], grad)]
            self._refuse(f"{list(self.changed)[1]}()", moved)

    def _refuse(self, who: str, names: list[str]) -> None:
        if names:
            raise ValueError(
                f"{who} changed {names[0]} in place, so that the two gradients would belong to different weights: "
                "change weights before the step, or in the forward pass of both closures alike"
            )

    def check_made_inside(self, losses: Tensor, closure: Callable[[], Tensor], name: str = "retain") -> None:
        """Whether the forward pass was made by the closure that was called last.

        Operations are numbered, by thread: a low number is reason enough to look whether the closure, called again,
        returns the same graph.

        Raises:
            ValueError: it was made before.
        """
        old = {node for node in _nodes(losses) if sequence_number(node) <= self._start}
        if not old:
            return
        with self.watch(name):
            again = closure()
        if not old.isdisjoint(_nodes(again)):
            raise ValueError(
                f"{name}() returned losses of a forward pass that was made before it was called: that pass has to "
                f"be made inside the {name} closure, anew in every step"
            )


def _last_operation() -> int:
    """The number of the last operation that autograd recorded in this thread."""
    with torch.enable_grad():
        return sequence_number(torch.zeros((), requires_grad=True, device="cpu").clone().grad_fn)


def _nodes(losses: Tensor) -> set:
    """All nodes of the graph of the losses."""
    seen, nodes = set(), [losses.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return seen


def _any(grad: Tensor) -> bool:
    return grad.layout != torch.strided or bool(grad.any())


def _moved(before: Tensor | None, after: Tensor, grad: Tensor) -> bool:
    """Whether a weight that the gradient depends on is another one than before, by more than its rounding."""
    if before is None:
        return _any(grad)
    limit = 16 * torch.finfo(after.dtype).eps * after.abs().amax() if after.numel() else 0.0
    return bool((((after - before).abs() > limit) & (grad != 0)).any())
