"""A model that is lent: whatever is done to it is taken back, bit for bit."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..._torch_private import keeping_versions, version
from ...tape.weighted_union import aside


class RandomStates:
    """The states of the generators that closures usually draw from: torch's, `random`, and numpy's if it is loaded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if self.device else None
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = numpy and numpy.random.get_state()

    def put_back(self) -> None:
        torch.set_rng_state(self.torch)
        if self.device:
            torch.cuda.set_rng_state(self.cuda, self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class Unchanged:
    """A context after which a model is what it was before, also after an error or Ctrl-C.

    The same tensors hold the same bits: the given parameters, and all buffers. Every p.grad is None meanwhile and is
    put back as it was, and so are requires_grad, training modes and random states. Graphs made before can still be
    differentiated. Copies are held in host memory. Frozen parameters are not copied: a warning names the first one
    that something else changed. Of writes through `.data` those are noticed that change one of up to 64 numbers.

    params: what may be moved, by name. values: the copies. states: the random states at the start.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
        self.model, self.params = model, params
        self.values = {name: aside(p) for name, p in params.items()}
        self.states = RandomStates(next(iter(params.values())).device)
        others = {name: p for name, p in model.named_parameters() if name not in params}
        self._frozen = [(name, p, version(p), _some(p)) for name, p in others.items() if not p.is_inference()]
        self._buffers = [
            (module, name, buffer, version(buffer), aside(buffer))
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        self._flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._versions = keeping_versions(list(params.values()))

    def __enter__(self) -> Unchanged:
        self._versions.__enter__()
        try:
            for p, _, _ in self._flags:
                p.grad = None
        except BaseException:
            _without_interruption(self._put_back)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        _without_interruption(self._put_back)
        changed = [
            name for name, p, before, some in self._frozen if version(p) != before or not torch.equal(_some(p), some)
        ]
        if changed:
            warnings.warn(f"a closure changed {changed[0]} in place, which is frozen and not put back", stacklevel=3)

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, value in self.values.items():
            self.params[name].copy_(value)
        for module, name, buffer, before, value in self._buffers:
            if version(buffer) != before or not torch.equal(buffer.cpu(), value):  # expanded ones cannot be written to
                buffer.copy_(value)
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
        for p, flag, grad in self._flags:
            p.requires_grad_(flag)
            p.grad = grad
        for module, mode in self._modes:
            module.training = mode
        self.states.put_back()
        self._versions.__exit__(None, None, None)


def _some(p: Tensor) -> Tensor:
    """Return up to 64 numbers of a tensor, as bytes."""
    if type(p.data) is not Tensor:  # of a quantized one nobody knows what can be indexed
        return torch.empty(0)
    return p.detach().reshape(-1)[:: p.numel() // 64 + 1].clone().view(torch.uint8).cpu()


def _without_interruption(put_back: Callable[[], None]) -> None:
    """Do something that may be repeated until it is done; a Ctrl-C meanwhile is raised afterwards."""
    interruption = None
    while True:
        try:
            put_back()
            break
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption
