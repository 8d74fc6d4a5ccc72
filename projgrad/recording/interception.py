"""Interception: which calls of a forward pass use a followed tensor, and who handles them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_private import are_overriding, enter_beneath, is_parallel_hook, leave, uncompiled
from . import functional as pf
from . import torch_names as names
from .compiled import compiled
from .functional.elementwise import add_, spread, sub_, vmap_batch_first, vmap_broadcast
from .functional.lookups import lookup
from .functional.recurrent import CELLS, recurrent, recurrent_cell
from .recording import Recorder, Recording
from .sites import Source
from .torch_names import behind, is_in_place, is_wrapper, opened, tensors_in

HANDLERS: dict[str, Callable[..., Any]] = {
    **{name: getattr(pf, name) for name in pf.__all__},
    **dict.fromkeys(("mm", "bmm", "mv", "__matmul__"), pf.matmul),
    "__rmatmul__": lambda a, b, *, tape: pf.matmul(b, a, tape=tape),
    "baddbmm": pf.addmm,
    **dict.fromkeys(("__add__", "__radd__"), pf.add),
    **dict.fromkeys(("__sub__", "subtract"), pf.sub),
    **dict.fromkeys(("__mul__", "__rmul__", "multiply"), pf.mul),
    **dict.fromkeys(("add_", "__iadd__"), add_),
    **dict.fromkeys(("sub_", "__isub__"), sub_),
    **{name: functools.partial(recurrent, name) for name in CELLS},
    **{f"{name}_cell": functools.partial(recurrent_cell, f"{name}_cell") for name in CELLS},
}


class Interception(TorchFunctionMode):
    """While active, every torch function that meets a followed tensor reports to the recording."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.tables = _is_ordinary, recording.sources, *recording.constants  # for C++

    def __enter__(self) -> Interception:
        uncompiled.__enter__()
        try:
            enter_beneath(self, lambda mode: not isinstance(mode, Interception))
        except BaseException:
            uncompiled.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        uncompiled.__exit__()
        leave(self)

    def __torch_function__(self, func, _, args=(), kwargs=None):
        recording = self.recording
        if _is_ordinary(func) and not recording.meets(args) and not (kwargs and recording.meets(kwargs.values())):
            out = func(*args, **kwargs) if kwargs else func(*args)
            # One tensor that depends on the samples is enough to tell: most calls end here.
            first = args[0] if args else None
            if (not isinstance(first, Tensor) or recording.is_constant(first)) and isinstance(out, Tensor):
                self.settle(out, args, kwargs)
            return out
        return self.special(func, args, kwargs)

    def settle(self, out: Tensor, args: tuple, kwargs: dict | None) -> None:
        """Note a result as constant if all tensors are that it was made of."""
        tensors = tensors_in(args, kwargs or {})
        if tensors and all(map(self.recording.is_constant, tensors)):
            self.recording.note_constant(out)

    def special(self, func, args: tuple, kwargs: dict | None):
        """Handle a call that meets a followed tensor, or that matters in another way."""
        recording = self.recording
        if isinstance(func, types.FunctionType):
            func = behind(func, _caller())
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if _is_ordinary(func):
            return self._handle(func, name, args, kwargs)
        if func == names.GRAD_FN:  # whoever asks for a node may register a hook on it
            recording.hooked = True
        if name == "register_hook" and torch.is_grad_enabled() and not is_parallel_hook(args[-1]):
            recording.hooked = True
        if is_in_place(name) and args and isinstance(args[0], Tensor):
            return self._in_place(func, name, args, kwargs)
        if func in names.BACKWARD:  # what checkpointing runs again in there is to be seen
            with self:
                return opened(func)(*args, **kwargs)
        return self._handle(func, name, args, kwargs)

    def _in_place(self, func, name: str, args: tuple, kwargs: dict):
        """Handle a call that changes its first argument; once the samples did that, it depends on them."""
        target, others = args[0], tensors_in(args[1:], kwargs)
        alone = all(self.recording.source(t) is not None or self.recording.is_constant(t) for t in others)
        source, constant = self.recording.source(target), self.recording.is_constant(target)
        out = self._handle(func, name, args, kwargs)
        if source is not None and not alone and torch.is_grad_enabled():  # else it is the same leaf with other numbers
            self.recording.forget(target)
        elif constant and not all(self.recording.is_constant(t) for t in others):
            self.recording.forget_constant(target)
        return out

    def _handle(self, func, name: str, args: tuple, kwargs: dict):
        recording = self.recording
        tensors = tensors_in(args, kwargs)
        followed = [recording.sources[id(t)] for t in tensors if id(t) in recording.sources]
        if not followed or not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            made = tensors or name in names.FACTORIES
            if isinstance(out, Tensor) and made and all(map(recording.is_constant, tensors)):
                recording.note_constant(out)
            return out
        if are_overriding(tensors):  # torch asks these, and then this mode for what they call
            return NotImplemented
        if name == "__get__":  # a property: x.T, x.shape
            out = func(*args, **kwargs)
            return recording.derive(out, followed, "T") if isinstance(out, Tensor) and out.grad_fn is not None else out
        if all(map(recording.is_constant, [t for t in tensors if id(t) not in recording.sources])):
            return self._derived(func, name, followed, args, kwargs)
        handler, python = _handler(func), isinstance(func, types.FunctionType)
        if python and _is_replaced_inside(name):
            handler = None
        try:
            if handler is not None:
                return handler(*args, **kwargs, tape=recording)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            handler = None  # a call signature that the drop-in does not have
        if name in names.ALIGNED:
            return vmap_broadcast(func, args, kwargs, tape=recording)
        if name in names.FIRST:
            return vmap_batch_first(func, args, kwargs, tape=recording)
        if _picks_rows(name, args):
            return _index(func, *args, tape=recording)
        if name == "index_select":
            weight, dim, ids = _index_select(*args, **kwargs)
            if dim % weight.ndim == 0:
                return _index(lambda w, ids: torch.index_select(w, 0, ids), weight, ids, tape=recording)
        if python:  # look inside
            with self:
                return opened(func)(*args, **kwargs)
        call = recording.call(name, *tensors)
        return call.unknown(func(*args, **kwargs))

    def _derived(self, func, name: str, followed: list[Source], args: tuple, kwargs: dict):
        """Handle a call that mixes parameters and constants only: its result is followed too."""
        recording = self.recording
        if name in names.BROADCAST and len(followed) == 1 and _grows(followed[0].tensor, args):  # perhaps over samples
            return recording.derive(HANDLERS[name](*args, **kwargs, tape=recording), followed, name)
        if name in names.SPREAD:
            return recording.derive(spread(func, *args, **kwargs, tape=recording), followed, name)
        known = isinstance(func, types.FunctionType) and not _is_replaced_inside(name)
        if name == "embedding" and known and kwargs.get("max_norm") is None:
            out = pf.embedding(*args, **kwargs, tape=recording)
            ids = args[0] if kwargs.get("padding_idx") is None else None
            return recording.derive(out, followed, name, ids)
        if _picks_rows(name, args):
            return recording.derive(_index(func, *args, tape=recording), followed, name, args[1])
        out = func(*args, **kwargs)
        if name == "__setitem__":
            out = args[0]
        for result in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(result, Tensor) and result.grad_fn is not None:
                recording.derive(result, followed, name)
            elif isinstance(result, Tensor) and not result.requires_grad:
                recording.note_constant(result)
        return None if name == "__setitem__" else out


in_python = Interception.__torch_function__
if compiled is not None:
    Interception.__torch_function__ = compiled.torch_function


@functools.lru_cache(4096)
def _handler(func: Callable) -> Callable | None:
    """Return the drop-in of a function, None where there is none or its name has two meanings."""
    name = getattr(func, "__name__", "")
    python = isinstance(func, types.FunctionType)
    if python != (name in names.PYTHON) and name in (*names.PYTHON, "embedding_bag"):
        return None  # of the same name, with other arguments
    return HANDLERS.get(name)


@functools.lru_cache(4096)  # of some users' functions, too
def _is_ordinary(func: Callable) -> bool:
    """Return whether a function that meets no followed tensor does nothing that matters but to make its result."""
    name = getattr(func, "__name__", "")
    special = func in names.BACKWARD or func == names.GRAD_FN or name == "register_hook"
    return not (special or is_wrapper(func) or is_in_place(name) or name in names.FACTORIES)


def _is_replaced_inside(name: str) -> bool:
    """Return whether somebody replaced the builtin that a function of torch.nn.functional of the same name calls."""
    return name in names.PYTHON and not isinstance(getattr(torch, name), types.BuiltinFunctionType)


def _caller() -> types.FrameType:
    """Return the frame that asks the mode."""
    frame = inspect.currentframe().f_back.f_back  # of whoever called `special`
    return frame.f_back if frame.f_code is in_python.__code__ else frame


def _picks_rows(name: str, args: tuple) -> bool:
    return name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype in (torch.int64, torch.int32)


def _index_select(input: Tensor, dim: int, index: Tensor) -> tuple[Tensor, int, Tensor]:
    return input, dim, index


def _grows(t: Tensor, args: tuple) -> bool:
    shapes = [a.shape for a in args if isinstance(a, Tensor)]
    return torch.broadcast_shapes(*shapes).numel() > t.numel()


def _index(func, weight: Tensor, ids: Tensor, *, tape: Recorder) -> Tensor:
    call = tape.call("index", weight, ids)
    return lookup(call, func(weight, ids), ids, weight)
