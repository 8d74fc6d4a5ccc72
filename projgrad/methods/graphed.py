"""A step whose gradients come from one CUDA graph: the host launches it, reads what came out, and calls the optimizer.

Everything up to the update in `.grad` is captured once: both forward and backward passes, the products, the solution
and the correction. What the host decides by is read once a step, when all of that is done, and the decisions are gone
through again with the new numbers. Where they ask for anything but what was captured, nothing has been applied yet, and
the step is made without the graph. The optimizer steps outside of it: learning rates, clipping and scalers stay what
they are.
"""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_private import tree_flatten, tree_unflatten
from ..recording.host_reads import Differs, Impossible, Script


class GraphedStep:
    """A step for batches of fixed shapes; made by `OrthoGrad.graphed`.

    Calling it with a forget and a retain batch makes one update, as `step` does, and returns its record. Batches of
    other shapes, and steps in which the projection needs more than the captured passes, are made by `step` itself.

    What the functions read besides their batch stays as it was at the capture: numbers of Python, switches, tensors
    made anew. A changed option of the unlearner, `train()` or `eval()`, weights that were replaced or frozen, and other
    ratios of learning rates are noticed, and captured anew. Dropout draws new numbers in every step.

    Attributes:
        reason: why there is no graph, "" where there is one: the model is not on a GPU, a loss that is not torch's own
            (its samples are looked for in every step), a function that waits for the device.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        write: Callable[..., Any],
        finish: Callable[..., Any],
        state: Callable[[], Hashable],
        functions: tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]],
        batches: tuple[Any, Any],
    ) -> None:
        self._step, self._write, self._finish, self._state = step, write, finish, state
        self._functions, self.reason = functions, ""
        self._capture(batches)

    def __call__(self, forget_batch: Any, retain_batch: Any) -> Any:
        """Make one update; raises what `step` raises."""
        start, batches = time.perf_counter(), (forget_batch, retain_batch)
        if not self.reason and self._captured_state != self._state():
            self._capture(batches)
        if self.reason or not self._fill(batches):
            return self._without(batches)
        self._graph.replay()
        try:
            projection = self._script.replay()
        except (Differs, ArithmeticError, ValueError):  # another way, or refused: `step` takes it, or says why
            return self._without(batches)
        for p, grad in self._grads:
            p.grad = grad
        return self._finish(projection, self._script.losses, start)

    def _without(self, batches: tuple[Any, Any]) -> Any:
        return self._step(*self._closures(batches))

    def _closures(self, batches: tuple[Any, Any]) -> list[Callable[[], Tensor]]:
        return [lambda f=f, batch=batch: f(batch) for f, batch in zip(self._functions, batches, strict=True)]

    def _fill(self, batches: tuple[Any, Any]) -> bool:
        """Copy batches into the static ones; return False where they are of another kind."""
        values, form = tree_flatten(batches)
        if form != self._form or [_kind(x) for x in values] != self._kinds:
            return False
        for value, static in zip(values, self._inputs, strict=True):
            if isinstance(value, Tensor):
                static.copy_(value)
        return True

    def _capture(self, batches: tuple[Any, Any]) -> None:
        values, self._form = tree_flatten(batches)
        self._kinds, self._captured_state = [_kind(x) for x in values], self._state()
        self._inputs = [x.clone() if isinstance(x, Tensor) else x for x in values]
        closures = self._closures(tree_unflatten(self._inputs, self._form))
        self._graph = self._script = None  # free the last one first
        try:
            capture = captured(lambda script: self._write(*closures, script), self._inputs)
            (self._script, self._graph, self._grads), self.reason = capture, ""
        except Impossible as error:
            self.reason = str(error)
            warnings.warn(f"there is no CUDA graph of the step: {self.reason}", stacklevel=4)


def _kind(x: Any) -> object:
    """Return what has to be alike in all batches."""
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x


def captured(write: Callable[[Script | None], dict[str, nn.Parameter]], inputs: list[Any]) -> tuple:
    """Return script, graph and the gradients that it fills, by parameter, of a function that writes `.grad`.

    Raises Impossible, and what the function raises outside a capture.
    """
    devices = {x.device for x in inputs if isinstance(x, Tensor)}
    if not devices or {device.type for device in devices} != {"cuda"}:
        raise Impossible("the batches are not tensors on a GPU")
    script, stream = Script(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), told_of_a_capture():
        write(None)  # inspects the graph and compiles kernels
        write(script)
        script.capture()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a capture that fails leaves torch's random generator in disorder
        try:
            write(script)
        except RuntimeError as error:
            raise Impossible(f"{_place(error)} waits for the device") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # graphs of autograd that are still alive would tie the capture to other streams
    torch.cuda.empty_cache()  # the graph has memory of its own
    script.capture()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            params = write(script).values()
            grads = [(p, p.grad) for p in params if p.grad is not None]
    except RuntimeError as error:
        raise Impossible(f"the capture failed ({str(error).splitlines()[0]})") from error
    for p, _ in grads:
        p.grad = None
    return script, graph, grads


@contextmanager
def told_of_a_capture() -> Iterator[None]:
    """Tell those who ask that a capture is under way: transformers then makes masks without looking at numbers."""
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked


def _place(error: BaseException) -> str:
    """Name the line that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"
