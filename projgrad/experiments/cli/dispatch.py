"""What an op is computed by on a device: asked of torch's dispatcher while the op runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..._torch_private import TorchDispatchMode, has_kernel, name_of, run_kernel
from ...kernels.register import KERNELS
from ...ops.registration import FUNCTIONS

PLAIN, COMPILED, TRITON = "plain PyTorch", "C++ extension", "Triton"


def computed_by(call: Callable[[], Any], device: str) -> dict[str, list[str]]:
    """Run something; return who computed it on "cpu" or "cuda", and which ops of projgrad: {"C++ extension": ["gram"]}.

    An op that only calls other ops of projgrad does not count.
    """
    kinds, found = _kinds(device), {}
    with _Watch(device) as watch:
        call()
    for name, below in watch.seen:
        if kinds.get(name) or not below:
            names = found.setdefault(kinds.get(name, PLAIN), [])
            if name not in names:
                names.append(name)
    return found


class _Watch(TorchDispatchMode):
    """Sees every op of projgrad that runs, also inside of others: its name, and how many it called."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace != "projgrad":
            return op(*args, **(kwargs or {}))
        place = len(self.seen)
        self.seen.append((op.name().removeprefix("projgrad::"), 0))
        with self:
            result = run_kernel(op, self.device, args, kwargs or {})
        self.seen[place] = self.seen[place][0], len(self.seen) - place - 1
        return result


def _kinds(device: str) -> dict[str, str]:
    """Return what computes the ops that have a kernel of their own on a device: of the table, what torch knows too."""
    kinds = {}
    for row in KERNELS:
        if row.device != device or not row.when:
            continue
        name = name_of(row.op) if row.op in FUNCTIONS else row.op.name().removeprefix("projgrad::")
        if not has_kernel(f"projgrad::{name}", device):
            raise RuntimeError(f"{name} has a kernel for {device} in the table, and none in torch")
        if isinstance(row.kernel, str):
            kinds[name] = COMPILED
        elif device == "cuda":
            kinds[name] = TRITON
    return kinds
