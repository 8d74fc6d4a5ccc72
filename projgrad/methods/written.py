"""What `.grad` was when it was written, and by what it was multiplied since."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .._torch_private import version
from ..recording.host_reads import to_host


class Written:
    """The p.grad of some parameters as they are now, by identity, length, and one element; and the weights of now.

    params: by name. norms: of p.grad of some of them, by name; [number of names].
    """

    def __init__(self, params: Mapping[str, nn.Parameter], norms: Callable[[list[str]], Tensor]) -> None:
        self.params, self.norms = params, norms
        self.names = [name for name, p in params.items() if p.grad is not None]
        self.grads = [weakref.ref(params[name].grad) for name in self.names]
        self.versions = [version(p) for p in params.values()]
        self.lengths = self._lengths()
        self.longest, self.index = "", None
        if self.names:
            self.longest = self.names[max(range(len(self.names)), key=self.lengths.__getitem__)]
            flat = self._flat()
            self.index = int(flat.abs().argmax()) if flat.numel() else None
        self.element = self._element()

    def _lengths(self) -> list[float]:
        return to_host(self.norms(self.names)) if self.names else []

    def _flat(self) -> Tensor:
        """Return what this process holds of the longest p.grad."""
        grad = self.params[self.longest].grad
        return getattr(grad, "to_local", lambda: grad)().flatten()

    def _element(self) -> float:
        """Return the element of the longest p.grad that was the largest; its sign tells what lengths do not."""
        return 0.0 if self.index is None else float(self._flat()[self.index])

    def kept(self) -> list[bool]:
        """Return for each of them whether p.grad is the same tensor."""
        grads = [self.params[name].grad for name in self.names]
        return [now is not None and now is then() for now, then in zip(grads, self.grads, strict=True)]

    def factor(self) -> float:
        """Return by what all p.grad were multiplied since.

        Raises ValueError where it is no positive factor, the same for all, or the weights have changed.
        """
        if not all(self.kept()):
            self._refuse()
        if self.versions != [version(p) for p in self.params.values()]:
            raise ValueError("weights were changed between the gradients and the optimizer's step on them")
        lengths, sign = self._lengths(), self.element * self._element()
        if lengths == self.lengths and sign >= 0:
            return 1.0
        coarse = max(torch.finfo(self.params[name].grad.dtype).eps for name in self.names)
        least = 1e-6 * max(self.lengths)
        ratios = [new / old for old, new in zip(self.lengths, lengths, strict=True) if old > least]
        if sign < 0 or any(not abs(ratio - ratios[0]) <= 64 * coarse * ratios[0] for ratio in ratios):
            self._refuse()
        return ratios[0] if ratios else 1.0

    def _refuse(self) -> None:
        raise ValueError(
            '`.grad` is not what OrthoGrad wrote, times one positive factor: metric="optimizer" has to know which part '
            "of it is that of the forget loss. Before the optimizer's step only scale it, all of it alike; or call "
            "zero_grad() to give it up"
        )
