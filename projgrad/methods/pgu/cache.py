"""What PGU keeps of the training data: spectra, the weights they belong to, and a hash of every sample."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..common import copies, write_
from . import file as pgu_file
from .contents import check_contents, check_models
from .fingerprints import fingerprint
from .input_moments import InputMoments, View
from .spectra import Basis, Spectrum, basis, decompose

DESCRIBED = ("n", "eps", "views", "arithmetic", "refused", "noise")  # fields that are kept as JSON


@dataclass(frozen=True)
class Cache:
    """What is kept of the samples that were fitted, less those that were deleted since.

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

    @staticmethod
    def of(
        model: nn.Module, weights: Mapping[str, Tensor], moments: InputMoments, n: int, samples: Counter[int] | None
    ) -> Cache:
        """Return the cache of n samples with these moments, which are overwritten, and hashes.

        Raises ValueError where no weight can be projected.
        """
        unused = {name: "the model did not use it" for name in weights if name not in moments.views}
        refused = unused | moments.refused
        if len(refused) == len(weights):
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
            raise ValueError(f"PGU: no weight can be projected ({reasons}). A compiled model must be fitted uncompiled")
        spectra, _ = decompose(moments.moments)
        return Cache(
            spectra=spectra,
            views={name: moments.views[name] for name in spectra},
            fitted=copies({name: weights[name] for name in spectra}),
            fingerprint=fingerprint(model),
            n=n,
            samples=samples,
            eps=moments.eps,
            arithmetic={name: sorted(moments.arithmetic[name]) for name in spectra},
            refused=refused,
        )

    def save(self, path: str | os.PathLike, current: str) -> None:
        """Write all of it to a file that is complete or not there. current: fingerprint of the model as it is now."""
        about = {"models": [self.fingerprint, current]} | {name: getattr(self, name) for name in DESCRIBED}
        tensors = {f"fitted/{name}": w for name, w in self.fitted.items()}
        for name, spectrum in self.spectra.items():
            tensors |= {f"vectors/{name}": spectrum.vectors, f"values/{name}": spectrum.values}
        if self.samples is not None:
            tensors["samples"] = torch.tensor(sorted(self.samples.elements()), dtype=torch.int64)
        pgu_file.write(path, about, tensors)

    @staticmethod
    def load(path: str | os.PathLike, model: nn.Module) -> Cache:
        """Read a file of `save`. Tensors go where the model's parameters are. Raises as `PGU.load`."""
        about, tensors = pgu_file.read(path)
        with _of_file(path):
            check_models(about)
        if fingerprint(model) not in about["models"]:
            raise ValueError(
                f"{path} belongs to another model: names, shapes, dtypes or numbers differ from the model as it was "
                "fitted and as it was when the cache was saved. Load those weights, or call fit() for these"
            )
        with _of_file(path):
            check_contents(about, tensors, dict(model.named_parameters()))
        samples = tensors.pop("samples", None)
        parts: dict[str, dict[str, Tensor]] = {"fitted": {}, "vectors": {}, "values": {}}
        for key, t in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = t.to(model.get_parameter(name).device)
        about["views"] = {name: View(*view) for name, view in about["views"].items()}
        return Cache(
            spectra={name: Spectrum(U, parts["values"][name]) for name, U in parts["vectors"].items()},
            fitted=parts["fitted"],
            fingerprint=about["models"][0],
            samples=None if samples is None else Counter(samples.tolist()),
            **{name: about[name] for name in DESCRIBED},
        )

    def bases(
        self, params: Mapping[str, nn.Parameter], gamma: Mapping[str, float], rule: str, soft: float
    ) -> tuple[dict[str, Basis], dict[str, str]]:
        """Choose the kept directions; gamma: by name, with "default" for the others.

        Returns the bases by name, and for every other parameter why it is frozen. Raises ArithmeticError as `basis`.
        """
        bases, frozen = {}, {}
        for name, p in params.items():
            if p.ndim < 2:
                frozen[name] = "biases and the parameters of norms are not updated"
            elif name not in self.spectra:
                frozen[name] = self.refused.get(name, "it was not fitted")
            elif (share := gamma.get(name, gamma.get("default"))) == 1:
                frozen[name] = "gamma is 1"
            else:
                dtype = torch.promote_types(p.dtype, torch.float32)
                try:
                    bases[name] = basis(self.spectra[name], share, rule, soft, dtype)
                except ArithmeticError as error:
                    raise ArithmeticError(f"PGU: {name}: {error}") from None
        return bases, frozen

    @contextmanager
    def as_fitted(self, model: nn.Module) -> Iterator[None]:
        """Give the model the weights that the inputs were taken with; afterwards it has its own again."""
        params = {name: model.get_parameter(name) for name in self.fitted}
        own = copies(params)
        frozen = [p for p in params.values() if not p.requires_grad]
        try:
            write_(params, self.fitted)
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
            write_(params, own)

    def without(self, moments: InputMoments, n: int, samples: Counter[int] | None) -> Cache:
        """Return the cache without n samples of these moments and hashes: C ← U Λ Uᵀ - Σ x xᵀ, decomposed again.

        Raises ValueError for a weight that is used otherwise than before, or an eigenvalue negative beyond rounding.
        """
        eta = max(self.eps, moments.eps) * sum(math.sqrt(s.values.shape[1]) for s in self.spectra.values())
        remaining, noise = {}, {}
        for name, (U, values) in self.spectra.items():
            self._check_use(name, moments)
            deleted = moments.moments[name] if name in moments.moments else torch.zeros_like(U)
            # A row x with a relative error η, of √i roundings for each layer up to it, is off by 2 η ‖x‖² in C; two
            # decompositions and the product add i roundings of float64 each. What earlier requests left behind remains.
            trace, largest = float(deleted.diagonal(dim1=1, dim2=2).sum(1).max()), float(values.max())
            now = 2 * eta * trace + 4 * U.shape[1] * torch.finfo(torch.float64).eps * largest
            noise[name] = self.noise.get(name, 0.0) + now
            remaining[name] = deleted.baddbmm_(U * values[:, None], U.mT, beta=-1)
        spectra, lowest = decompose(remaining)
        for name, value in lowest.items():
            if value < -noise[name]:
                before = float(self.spectra[name].values.max())
                raise ValueError(
                    f"forget: what is left of {name} has an eigenvalue of {value:.1e}, where the largest was "
                    f"{before:.1e}, and below zero by more than rounding ({noise[name]:.1e}): the samples were not "
                    "fitted, or not in this view. Pass them as they were passed to fit(), without augmentation and "
                    "padded alike"
                )
        if n == self.n:
            for name, (_, values) in spectra.items():
                if values.max() > 2 * noise[name]:  # rounding, and what clamping made of it
                    raise ValueError(
                        f"forget: all {n} samples are gone, but something is left of {name}: other inputs were fitted, "
                        "or the samples are not along dimension 0 of the first tensor of a batch"
                    )
                values.zero_()
        samples = None if samples is None else self.samples - samples
        return replace(self, spectra=spectra, n=self.n - n, samples=samples, noise=noise)

    def _check_use(self, name: str, moments: InputMoments) -> None:
        """Check that inputs meet a weight as they did in fit(), in the same arithmetic."""
        if name in moments.refused or moments.views.get(name, self.views[name]) != self.views[name]:
            why = moments.refused.get(name, "inputs are multiplied with it in another way")
            raise ValueError(f"forget: {name} is used otherwise than when it was fitted: {why}")
        other = moments.arithmetic.get(name, set()) - set(self.arithmetic[name])
        if other:
            now, then = (" and ".join(sorted(kinds)) for kinds in (other, self.arithmetic[name]))
            raise ValueError(
                f"forget: {name} gets its inputs in {now}, and got them in {then} in fit(): what would be subtracted "
                "is not what was added. Call forget() under the same autocast and precision settings as fit(), or "
                "fit() again under these"
            )


@contextmanager
def _of_file(path: str | os.PathLike) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is damaged or forged: {error}. {pgu_file.AGAIN}") from None
