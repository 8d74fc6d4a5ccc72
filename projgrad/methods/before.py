"""What a step may change, as it was before, to be put back where the step fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..tape.weighted_union import aside
from .protocol import SteppingOptimizer


class Before:
    """Copies of some parameters, of the optimizer's state and settings, and of a gradient scaler; in host memory.

    params: the copies by name; what is not in it any more is not put back.
    """

    def __init__(
        self, optimizer: SteppingOptimizer, params: Mapping[str, Tensor], scaler: torch.amp.GradScaler | None
    ) -> None:
        self.params = {name: aside(p) for name, p in params.items()}
        self._of, self._scaler = params, scaler
        self._scale = scaler.state_dict() if scaler is not None else {}
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._settings = list(zip(optimizer.param_groups, map(_kept, groups), strict=True))
        self._state = _kept(getattr(optimizer, "state", {}))

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything what it was: the same tensors hold the same bits."""
        for name, value in self.params.items():
            self._of[name].copy_(value)
        self._state()
        for group, settings in self._settings:
            group.update(settings())
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scale)


def _kept(value: Any) -> Callable[[], Any]:
    """Return a function that makes a value what it is now, and returns it."""
    if isinstance(value, Tensor):
        held = aside(value)
        return lambda: value.copy_(held)
    if not isinstance(value, dict):
        held = copy.deepcopy(value)
        return lambda: held
    parts = {key: _kept(part) for key, part in value.items()}

    def put_back() -> dict:
        before = {key: part() for key, part in parts.items()}
        value.clear()
        value.update(before)
        return value

    return put_back
