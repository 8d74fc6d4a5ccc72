"""Checks of tensors that several ops share: a wrong one is named, with its shape, dtype or device."""

import torch
from torch import Tensor

from .. import _options
from .registration import check_reverse_mode

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_dtype(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16; got {x.dtype}")


def check_one_device(op: str, **tensors: Tensor) -> None:
    """Check that two tensors, named as in messages, are on one device."""
    (x, a), (y, b) = tensors.items()
    if a.device != b.device:
        raise ValueError(f"{op}: {x} and {y} must be on one device; got {x} on {a.device} and {y} on {b.device}")


def check_flat(op: str, u: Tensor | None, G: Tensor) -> None:
    """Check G (n, p) and u (p,) or (m, p)."""
    _options.check_tensors(op, G=G, **({} if u is None else {"u": u}))
    if G.ndim != 2:
        raise ValueError(f"{op}: G must be (n, p), one gradient per row; got shape {tuple(G.shape)}")
    check_dtype(op, "G", G)
    if u is None:
        return check_reverse_mode(op, G)
    if u.ndim not in (1, 2) or u.shape[-1] != G.shape[1]:
        raise ValueError(
            f"{op}: u must be (p,) or (m, p) with the p of G (n, p); got u {tuple(u.shape)} and G {tuple(G.shape)}"
        )
    if u.dtype != G.dtype:
        raise TypeError(f"{op}: u and G must have one dtype; got u {u.dtype} and G {G.dtype}: convert one of them")
    check_one_device(op, u=u, G=G)
    check_reverse_mode(op, u, G)
