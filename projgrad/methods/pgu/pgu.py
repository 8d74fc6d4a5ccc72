"""PGU: gradient steps on the forget set, off the subspace in which the training data's layer inputs lie."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._options import check_callable, check_choice, check_flag, check_max_norm, within
from ..closures import Closures
from ..common import check_alone, loss_value, scalar_loss, trainable_parameters
from ..protocol import SteppingOptimizer
from .batches import Forward, check_same_samples, logits_and_labels, read_input_moments
from .cache import Cache
from .fingerprints import Form, change_of, fingerprint, forms_of
from .loss import unlearning_loss
from .schedule import PGURecord, Run, expected_change, run
from .spectra import RULES, Basis, Projected, check_gamma, exposed, project_


class PGU:
    """Projected-gradient unlearning: updates that leave the main directions of every layer's training inputs alone.

    D ← D - D M Mᵀ,    C = Σ x xᵀ = U Λ Uᵀ,    M = the first k columns of U

    for every weight of a linear layer or convolution, D (o, i) its gradient, x (i,) the rows (patches) that enter it
    over the whole training set. What a layer makes of inputs in span(M) does not change. Everything else is frozen:
    embeddings and weights tied to them, biases, norms, and, with a warning, weights that are used in another way.

    k = #{ j : cumsum(s)_j / sum(s) ≤ γ } with s = √λ (rule="singular", published) or λ (rule="energy"): for √λ_j = 1/j
    in 1152 dimensions and γ = 0.9, 46.6 % of the directions against 0.4 %. A first direction that holds more than γ
    alone leaves k = 0: nothing is protected, and a warning says so.

    `fit` reads the training data once; a deletion request, `forget`, needs the forget samples only. Requests follow
    one another. `save` and `load` keep that between processes, for any γ and rule.

    Narrow inputs have no weak directions to spare. The second matrix B of a LoRA adapter of rank 8 has eight inputs:
    six or seven directions are protected, and the rest can hold a tenth of Σ ‖x‖² (`exposed`). New adapters have
    B = 0, so the first step goes through B alone. Start them with A = 0 and a random B instead, and give B γ = 1.

    Args:
        model: its weights that require gradients and belong to `optimizer` are updated.
        optimizer: a projected gradient stays projected only under SGD without weight decay, as published; adaptive
            optimizers rescale it coordinate by coordinate.
        gamma: share of the spectrum to protect, in (0, 1], or one for each parameter name, with "default" for the
            others. 1 freezes the layer.
        rule: "singular" or "energy".
        soft: ours, not published: the kept directions are weighted by λ / (λ + soft · mean(λ)), so that the weaker
            among them may be used a little. 0 removes all of them wholly.
        ascend: whether `step` maximises a scalar that its closure returns.
        max_norm: clip the norm of the projected gradient, or None; infinity clips nothing.
        forward: function (model, batch) that runs the model. By default a tensor is given to the model, a dictionary
            as keywords, and of a tuple or list the first element in the same way: what follows are labels.
        check_samples: keep 64 bits for each fitted sample and refuse to forget what was not fitted. They are of the
            inputs (with `forward`, of all tensors of a batch), so switch it off where a loader pads differently.

    Raises as `OrthoGrad`; ValueError for γ of an unknown name, and a model that is spread over processes.

    frozen: name and reason of every parameter that the optimizer holds and this leaves alone.
    exposed: share of Σ ‖x‖² over the training data that updates can still act on, by name of the projected weight.

    Source: arXiv 2312.04095, section 3.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 2
        >>> pgu = projgrad.PGU(model, torch.optim.SGD(model.parameters(), lr=0.1), gamma=0.6).fit([x])
        >>> pgu = pgu.forget([x[:4]])  # from here on only these are needed
        >>> record = pgu.step(lambda: (model(x[:4]), y[:4]))
        >>> record.residual < 1e-5, 0 < record.rank < record.width
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SteppingOptimizer,
        gamma: float | Mapping[str, float] = 0.9,
        rule: str = "singular",
        *,
        soft: float = 0.0,
        ascend: bool = True,
        max_norm: float | None = None,
        forward: Forward | None = None,
        check_samples: bool = True,
    ) -> None:
        self.model, self.optimizer, self.rule, self.forward = model, optimizer, rule, forward
        weights = self._weights()
        check_choice("PGU: rule", rule, RULES)
        if forward is not None:
            check_callable("PGU: forward", forward, "a function (model, batch), or None")
        self.soft, self.max_norm = within("PGU: soft", soft, "[0, inf)"), check_max_norm(max_norm)
        self.ascend = check_flag("PGU: ascend", ascend)
        self.check_samples = check_flag("PGU: check_samples", check_samples)
        if not weights:
            raise ValueError("PGU: the optimizer holds no weight with two or more dimensions that requires a gradient")
        self.gamma = check_gamma(gamma, weights)
        self.cache: Cache | None = None
        self.bases: dict[str, Basis] = {}
        self.frozen: dict[str, str] = {}
        self._fitted: dict[str, Form] = {}  # all parameters, as they were in fit() or load()

    def fit(self, batches: Iterable) -> PGU:
        """Read the whole training data once, in the view (without augmentation) in which requests will come.

        Every position counts, padding too. Neither gradients nor labels are used. Memory: a float64 matrix (i, i) for
        every layer, a second one in `forget`. The model must compute each sample alike: no batch norm in training mode,
        no dropout. The graph of the forward pass, without its activations, tells whether all uses of a weight were
        seen. One that was not, as in a scripted module or another thread, freezes the weight, with a warning.

        Raises:
            ValueError: no samples, batch norm in training mode, a forward pass that draws random numbers or makes no
                graph, no weight of a linear layer.
            FloatingPointError: NaN or Inf in a layer's inputs.
        """
        weights = self._weights()
        moments, n, samples = read_input_moments(self.model, batches, weights, self.forward, self.check_samples, "fit")
        cache = Cache.of(self.model, weights, moments, n, samples)
        self._adopt(cache)
        unexpected = [f"{name} ({why})" for name, why in cache.refused.items() if why != "embedding"]
        if unexpected:
            warnings.warn(f"PGU leaves these weights frozen: {', '.join(unexpected)}", stacklevel=2)
        return self

    def forget(self, batches: Iterable) -> PGU:
        """Take samples out of what is protected: C ← U Λ Uᵀ - Σ x xᵀ over them, with the weights that fit() saw.

        An error leaves everything as it was.

        Raises:
            ValueError: nothing fitted, another model, other arithmetic (autocast, float32 precision) than in fit(), no
                samples, a sample that was not fitted or is forgotten already, more samples than are left, an eigenvalue
                negative beyond rounding, or one that is not 0 without any sample left.
        """
        cache = self._current_cache("forget")
        weights = {name: self.model.get_parameter(name) for name in cache.spectra}
        with cache.as_fitted(self.model):
            moments, n, samples = read_input_moments(
                self.model, batches, weights, self.forward, self.check_samples, "forget", cache
            )
        self._adopt(cache.without(moments, n, samples))
        return self

    def project_(self) -> Projected:
        """Project every `.grad` that the optimizer holds for the model, in place; set it to None where frozen.

        Raises:
            ValueError: nothing fitted, a parameter that was replaced, cast or moved since then, or no gradient.
            FloatingPointError: NaN or Inf in a gradient; nothing was changed.
        """
        cache = self._current_cache("project_")
        params = trainable_parameters(self.model, self.optimizer)
        weights = {name: p for name, p in params.items() if name in self.bases and p.grad is not None}
        if not weights:
            raise ValueError("project_: no projected weight has a gradient: call backward() first")
        projected = project_(weights, self.bases, cache.views)
        for name, p in params.items():
            if name not in weights:
                p.grad = None
        return projected

    def step(self, forget: Callable[[], Tensor | tuple[Tensor, Tensor]]) -> PGURecord:
        """Update the weights once. The first step after `fit`, `forget` or `load` warns if it is `blocked`.

        An error before the optimizer steps leaves the model and the optimizer as they were, with every `.grad` set to
        None.

        Args:
            forget: returns logits (n, classes) and labels (n,) of forget samples, for `unlearning_loss`; or a scalar,
                whose sign is flipped unless ascend=False.

        Raises:
            ValueError: nothing fitted, a parameter that was replaced, cast or moved since then, every weight frozen.
            FloatingPointError: NaN or Inf in the loss or a gradient.
            Others: as `OrthoGrad.step`.
        """
        start = time.perf_counter()
        cache = self._current_cache("step")
        with Closures(self.model, self.optimizer, batch_statistics=False, forget=forget) as closures:
            weights = {name: p for name, p in closures.params.items() if name in self.bases}
            if not weights:
                raise ValueError("step: every weight that the optimizer holds is frozen; lower gamma, or see `frozen`")
            with closures.watch("forget"):
                returned = forget()
                is_pair = isinstance(returned, (tuple, list)) and len(returned) == 2
                loss = scalar_loss(lambda: unlearning_loss(*returned) if is_pair else returned)
            value = loss_value(loss)
            sign = -1.0 if self.ascend and not is_pair else 1.0
            torch.autograd.backward(loss, torch.full_like(loss, sign), inputs=list(weights.values()))
            reached = {name: p for name, p in weights.items() if p.grad is not None}
            if not reached:
                raise ValueError("forget() returned a loss that depends on no projected weight")
            projected = project_(reached, self.bases, cache.views)
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(list(reached.values()), self.max_norm)
            self.optimizer.step()
        record = PGURecord(
            rank=sum(b.rank for b in self.bases.values()),
            width=sum(b.M.shape[0] * b.M.shape[1] for b in self.bases.values()),
            ranks={name: b.rank for name, b in self.bases.items()},
            expected_change=expected_change(self.optimizer, projected.gradient_norm, self.max_norm),
            forget_loss=value,
            unit=float(is_pair),
            seconds=time.perf_counter() - start,
            **projected._asdict(),
        )
        if self._is_first:
            self._is_first = False
            record.warn_if_blocked()
        return record

    @property
    def exposed(self) -> dict[str, float]:
        return {name: exposed(self.cache.spectra[name], b) for name, b in self.bases.items()}

    def run(self, batches: Iterable, validate: Callable[[], tuple[float, float]], **options: Any) -> Run:
        """Follow the published schedule until a stop rule holds; options: see `projgrad.methods.pgu.schedule.run`."""
        self._current_cache("run")
        self._weights()  # refuses a model that is spread over processes, before anything is measured
        weights = {name: self.model.get_parameter(name) for name in self.bases}

        def step(batch: object) -> PGURecord:
            return self.step(lambda: logits_and_labels(self.model, batch, self.forward))

        return run(step, self.optimizer, weights, batches, validate, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Write what was fitted, less what was forgotten, to a safetensors file; it holds no γ.

        The file is complete or is not there: a process that dies meanwhile leaves the one that was there before, and
        perhaps files `.NAME.*.tmp` or `.tmp*` beside it. It carries a checksum, by which `load` knows damage.
        """
        self._current_cache("save").save(path, fingerprint(self.model))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: nn.Module,
        optimizer: SteppingOptimizer,
        *args: Any,
        data: Iterable | None = None,
        **options: Any,
    ) -> PGU:
        """Go on from a file of `save`.

        Args:
            model: with the weights that it had when it was fitted, or when the file was saved.
            data: batches to compare with the samples that are left in the file, or None.
            args, options: those of `PGU`.

        Raises FileNotFoundError; ValueError for another model, other data, and a file that is no cache, of an earlier
        version, or changed in any bit.
        """
        pgu = cls(model, optimizer, *args, **options)
        cache = Cache.load(path, model)
        if data is not None:
            check_same_samples(cache, data, pgu.forward, path)
        pgu._adopt(cache)
        return pgu

    def _weights(self) -> dict[str, nn.Parameter]:
        """Return what may be projected, by name, of a model that nothing spreads over processes."""
        params = trainable_parameters(self.model, self.optimizer)
        check_alone(self.model, params, self.optimizer)
        return {name: p for name, p in params.items() if p.ndim >= 2}

    def _current_cache(self, method: str) -> Cache:
        """Return the cache, if the parameters are still those that it belongs to."""
        if self.cache is None:
            raise ValueError(f"{method}: nothing is fitted; call fit() with the training data, or PGU.load()")
        now = forms_of(self.model)
        for name in {**self._fitted, **now}:
            if (change := change_of(self._fitted.get(name), now.get(name))) is not None:
                raise ValueError(
                    f"{method}: {name} {change}, so that what is protected is not of this model. Put the model back as "
                    "it was, or call fit() again"
                )
        return self.cache

    def _adopt(self, cache: Cache) -> None:
        """Choose the kept directions of a cache, and take it over if all is well."""
        params = trainable_parameters(self.model, self.optimizer)
        bases, frozen = cache.bases(params, self.gamma, self.rule, self.soft)
        self.cache, self.bases, self.frozen, self._fitted = cache, bases, frozen, forms_of(self.model)
        self._is_first = True
        empty = [name for name, b in bases.items() if not b.rank and cache.spectra[name].values.any()]
        if empty:
            warnings.warn(
                f"PGU protects nothing of {', '.join(empty)}: the first direction alone holds more than gamma. "
                "Use a larger gamma",
                stacklevel=3,
            )
