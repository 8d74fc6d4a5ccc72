"""Memory and operations that a computation would take, counted on tensors that have shapes and no elements."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..._torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    conversions_of_fakes,
    flops,
    storage_id,
    tree_leaves,
)

BLOCK = 512  # bytes: torch's allocator on a GPU rounds up to a multiple of it


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that live, of most that ever lived together, and floating-point operations.

    live, peak: in bytes. While it is a context, every tensor that an operation returns is counted until it dies.
    flops: of products of matrices and attention. torch's FlopCounterMode is not used: it hooks into all modules, which
    is slow, and its hooks hold the graph beyond a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t)
        self.flops += flops(function, args, kwargs or {}, result)
        return result

    def _count(self, t: Tensor) -> None:
        key, storage = storage_id(t), t.untyped_storage()
        if key in self._sizes:
            return
        self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class OnGPU(TorchFunctionMode):
    """Lets attention with dropout take the fused kernel, which a GPU has for it and a CPU has not."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.nn.functional.scaled_dot_product_attention:
            args, kwargs = args[:4], kwargs | {"dropout_p": 0.0}
        return function(*args, **kwargs)


@contextmanager
def imagined(device: str) -> Iterator[Ledger]:
    """Make a context in which tensors have no elements; give what counts their bytes and operations.

    device: "cpu", or "cuda" for what a GPU would hold.
    """
    gpu = OnGPU() if device == "cuda" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger, conversions_of_fakes(), gpu:
        yield ledger
