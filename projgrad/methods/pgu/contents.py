"""What a file of PGU must hold to be taken: whoever can write it may have written anything, with the right checksum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .input_moments import View

PARTS = ("fitted", "vectors", "values")


def check_models(about: Mapping[str, Any]) -> None:
    """Check that a description names two models; raises ValueError."""
    models = about.get("models")
    _need(isinstance(models, list) and len(models) == 2 and all(isinstance(m, str) for m in models), "models")


def check_contents(about: Mapping[str, Any], tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Check types, names, shapes and ranges of a description and of tensors; raises ValueError with what is wrong.

    params: of the model that both are said to belong to, by name.
    """
    n, views = about.get("n"), about.get("views")
    _need(type(n) is int and 0 <= n < 1 << 63, "n")
    _need(_is_size(about.get("eps")), "eps")
    _need(isinstance(views, dict) and views.keys() <= params.keys(), "views")
    for key in ("arithmetic", "refused", "noise"):
        _need(isinstance(about.get(key), dict) and about[key].keys() <= params.keys(), key)
    kinds = about["arithmetic"].values()
    _need(about["arithmetic"].keys() == views.keys(), "arithmetic")
    _need(all(isinstance(some, list) and all(isinstance(kind, str) for kind in some) for some in kinds), "arithmetic")
    _need(all(isinstance(why, str) for why in about["refused"].values()), "refused")
    _need(all(map(_is_size, about["noise"].values())), "noise")
    names = {f"{part}/{name}" for part in PARTS for name in views}
    _need(tensors.keys() - {"samples"} == names, "names of tensors")
    samples = tensors.get("samples")
    _need(samples is None or (samples.dtype == torch.int64 and samples.shape == (n,)), "samples")
    for name, view in views.items():
        p = params[name]
        fitted, vectors, values = (tensors[f"{part}/{name}"] for part in PARTS)
        is_view = isinstance(view, list) and len(view) == 2 and type(view[0]) is int and type(view[1]) is bool
        _need(is_view and p.ndim >= 2 and 1 <= view[0] <= len(p) and len(p) % view[0] == 0, f"views of {name}")
        _need(fitted.shape == p.shape and fitted.dtype == p.dtype, f"fitted/{name}")
        g, i = view[0], View(*view).matrix(p).shape[2]
        _need(vectors.shape == (g, i, i) and vectors.dtype == torch.float64, f"vectors/{name}")
        _need(values.shape == (g, i) and values.dtype == torch.float64, f"values/{name}")
        # Descending, not negative, finite; nothing of this holds for NaN.
        in_order = bool((values[:, 1:] <= values[:, :-1]).all() and (values >= 0).all() and (values < math.inf).all())
        _need(in_order and bool(vectors.isfinite().all()), f"numbers of {name}")


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"its {what} cannot be that of a cache of PGU")
