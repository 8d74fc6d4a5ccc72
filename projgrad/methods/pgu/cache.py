"""What PGU keeps of the training data: spectra, the weights they belong to, and a fingerprint of every sample."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import file as pgu_file
from .input_moments import InputMoments, View
from .spectra import Spectrum, decompose


@dataclass(frozen=True)
class Cache:
    """Of the samples that were fitted, less those that were deleted since.

    spectra, views: by name of the weight. fitted: these weights as the inputs were taken with.
    fingerprint: of the model at that time. n: samples. samples: a hash of each, or None where they are not checked.
    eps: of the coarsest arithmetic that the inputs came from. arithmetic: what each weight's inputs were computed in.
    refused: weights without a spectrum, and why.
    noise: by name, how far rounding may have moved an eigenvalue in the requests so far.
    """

    spectra: dict[str, Spectrum]
    views: dict[str, View]
    fitted: dict[str, Tensor]
    fingerprint: str
    n: int
    samples: Counter[int] | None
    eps: float
    arithmetic: dict[str, list[str]]
    refused: dict[str, str]
    noise: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | os.PathLike, current: str) -> None:
        """To a file that is complete or not there. current: fingerprint of the model as it is now."""
        about = {
            "models": [self.fingerprint, current],
            "n": self.n,
            "eps": self.eps,
            "arithmetic": self.arithmetic,
            "refused": self.refused,
            "noise": self.noise,
            "views": {name: [view.groups, view.transposed] for name, view in self.views.items()},
        }
        tensors = {f"fitted/{name}": w for name, w in self.fitted.items()}
        for name, spectrum in self.spectra.items():
            tensors |= {f"vectors/{name}": spectrum.vectors, f"values/{name}": spectrum.values}
        if self.samples is not None:
            tensors["samples"] = torch.tensor(sorted(self.samples.elements()), dtype=torch.int64)
        pgu_file.write(path, about, tensors)

    @staticmethod
    def load(path: str | os.PathLike, model: nn.Module) -> Cache:
        """Tensors go where the model's parameters are.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no cache of this format, is not as it was written, or belongs to another model.
        """
        header, tensors = pgu_file.read(path)
        if fingerprint(model) not in header["models"]:
            raise ValueError(
                f"{path} belongs to another model: names, shapes, dtypes or numbers differ from the model as it was "
                "fitted and as it was when the cache was saved. Load those weights, or call fit() for these"
            )
        where = {name: p.device for name, p in model.named_parameters()}
        samples = tensors.pop("samples", None)
        parts: dict[str, dict[str, Tensor]] = {"fitted": {}, "vectors": {}, "values": {}}
        for key, t in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = t.to(where[name])
        return Cache(
            spectra={name: Spectrum(v, parts["values"][name]) for name, v in parts["vectors"].items()},
            views={name: View(*view) for name, view in header["views"].items()},
            fitted=parts["fitted"],
            fingerprint=header["models"][0],
            n=header["n"],
            samples=None if samples is None else Counter(samples.tolist()),
            eps=header["eps"],
            arithmetic=header["arithmetic"],
            refused=header["refused"],
            noise=header["noise"],
        )

    @contextmanager
    def as_fitted(self, model: nn.Module) -> Iterator[None]:
        """The model with the weights that the inputs were taken with; afterwards with its own again."""
        params = {name: model.get_parameter(name) for name in self.fitted}
        own = {name: p.detach().clone() for name, p in params.items()}
        frozen = [p for p in params.values() if not p.requires_grad]
        try:
            _write(params, self.fitted)
            for p in frozen:
                p.requires_grad_(True)  # so that its uses are in the graph, as they were in fit()
            if fingerprint(model) != self.fingerprint:
                raise ValueError(
                    "forget: something besides the projected weights has changed since fit(), so the inputs of the "
                    "layers can no longer be subtracted. Restore the model, or call fit() again"
                )
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)
            _write(params, own)

    def without(self, moments: InputMoments, n: int, samples: Counter[int] | None) -> Cache:
        """After the deletion of n samples with these moments and hashes: C ← U Λ Uᵀ - Σ x xᵀ, decomposed again.

        Raises:
            ValueError: a weight that is used otherwise than before, or an eigenvalue negative beyond rounding.
        """
        eta = max(self.eps, moments.eps) * sum(math.sqrt(s.values.shape[1]) for s in self.spectra.values())
        less, bounds = {}, {}
        for name, (U, values) in self.spectra.items():
            if name in moments.refused or moments.views.get(name, self.views[name]) != self.views[name]:
                why = moments.refused.get(name, "inputs are multiplied with it in another way")
                raise ValueError(f"forget: {name} is used otherwise than when it was fitted: {why}")
            other = moments.arithmetic.get(name, set()) - set(self.arithmetic[name])
            if other:
                raise ValueError(
                    f"forget: {name} gets its inputs in {_listed(other)}, and got them in "
                    f"{_listed(self.arithmetic[name])} in fit(): what would be subtracted is not what was added. Call "
                    "forget() under the same autocast and precision settings as fit(), or fit() again under these"
                )
            taken = moments.moments[name] if name in moments.moments else torch.zeros_like(U)
            # A row x with a relative error η, of √i roundings for each layer up to it, is off by 2 η ‖x‖² in C; two
            # decompositions and the product add i roundings of float64 each. What earlier requests left behind remains.
            trace, largest = float(taken.diagonal(dim1=1, dim2=2).sum(1).max()), float(values.max())
            now = 2 * eta * trace + 4 * U.shape[1] * torch.finfo(torch.float64).eps * largest
            bounds[name] = self.noise.get(name, 0.0) + now
            less[name] = taken.baddbmm_(U * values[:, None], U.mT, beta=-1)
        spectra, lowest = decompose(less)
        for name, value in lowest.items():
            if value < -bounds[name]:
                before = float(self.spectra[name].values.max())
                raise ValueError(
                    f"forget: what is left of {name} has an eigenvalue of {value:.1e}, where the largest was "
                    f"{before:.1e}, and below zero by more than rounding ({bounds[name]:.1e}): the samples were not "
                    "fitted, or not in this view. Pass them as they were passed to fit(), without augmentation and "
                    "padded alike"
                )
        if n == self.n:
            for name, (_, values) in spectra.items():
                if values.max() > 2 * bounds[name]:  # rounding, and what clamping made of it
                    raise ValueError(
                        f"forget: all {n} samples are gone, but something is left of {name}: other inputs were fitted, "
                        "or the samples are not along dimension 0 of the first tensor of a batch"
                    )
            spectra = {name: Spectrum(U, torch.zeros_like(values)) for name, (U, values) in spectra.items()}
        left = None if samples is None else self.samples - samples
        return replace(self, spectra=spectra, n=self.n - n, samples=left, noise=bounds)


def _listed(kinds: Iterable[str]) -> str:
    return " and ".join(sorted(kinds))


@torch.no_grad()
def _write(params: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, p in params.items():
        p.copy_(values[name])


def _bytes(t: Tensor) -> memoryview:
    """Of a contiguous tensor on the CPU, which must outlive them."""
    size = t.numel() * t.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(t.data_ptr()) if size else b"")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, dtypes, shapes, numbers."""
    digest = hashlib.sha256()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        host = t.detach().cpu().contiguous()
        digest.update(f"{name} {host.dtype} {tuple(host.shape)};".encode())
        digest.update(_bytes(host))
    return digest.hexdigest()


Held = tuple[nn.Parameter, torch.dtype, torch.Size, torch.device]


def parameters_of(model: nn.Module) -> dict[str, Held]:
    """Which they are, and what a cast or a move would change in place."""
    return {name: (p, p.dtype, p.shape, p.device) for name, p in model.named_parameters()}


def changed(before: Held | None, now: Held | None) -> str | None:
    """What happened to a parameter since fit() or load(), if anything did; its numbers do not count."""
    if before is None:
        return "is new in the model"
    if now is None:
        return "is no longer in the model"
    for old, new in zip(before[1:], now[1:], strict=True):
        if old != new:
            old, new = (tuple(x) if isinstance(x, torch.Size) else x for x in (old, new))
            return f"was {old} when it was fitted and is {new} now"
    return None if before[0] is now[0] else "is another parameter than the one that was fitted"


def tensors_of(batch: object) -> list[Tensor]:
    """All in tuples, lists and dictionaries, in these by name: the order in which they were filled is chance."""
    if isinstance(batch, Mapping):
        batch = [batch[key] for key in sorted(batch, key=str)]
    if isinstance(batch, (tuple, list)):
        return [t for part in batch for t in tensors_of(part)]
    return [batch] if isinstance(batch, Tensor) else []


def sample_hashes(tensors: list[Tensor]) -> list[int]:
    """64 bits for every sample, along dimension 0 of all tensors."""
    hosts = [t.detach().cpu().contiguous() for t in tensors]
    views = [(f"{t.dtype} {tuple(t.shape[1:])};".encode(), _bytes(t), t[:1].numel() * t.element_size()) for t in hosts]
    found = []
    for j in range(len(hosts[0])):
        digest = hashlib.blake2b(digest_size=8)
        for kind, data, size in views:
            digest.update(kind)
            digest.update(data[j * size : (j + 1) * size])
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return found
