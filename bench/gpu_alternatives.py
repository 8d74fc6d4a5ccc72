"""What the ops on the factors of a layer are compared with: one line per alternative in `ALTERNATIVES`.

Each is called with a [n, t, i], b [n, t, o] and `other` (u [o, i] for linear_dot, c [n] for linear_combine, else None);
for basis_project with D [o, i], M [i, k] and None. "library" is what a user would write; "route", "kernel" and
"composed", made of library products, are pieces of projgrad, also where it would not choose them. `route` says whose
flops count.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import projgrad
from projgrad.ops import linear_impl as layer
from projgrad.ops.registration import FALLBACKS


class Alternative(NamedTuple):
    call: Callable[[Tensor, Tensor, Tensor | None], object]
    route: str = ""


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y with a float32 result, x [..., r, k] and y [..., k, c] of any dtype."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return x.float() @ y.float()
    return (torch.mm if x.ndim == 2 else torch.bmm)(x, y, out_dtype=torch.float32)


def tokens_gram(a: Tensor, b: Tensor, _: None = None) -> Tensor:
    """Both token products [n t, n t] whole, as one would write them."""
    n, t, _ = a.shape
    A, B = a.flatten(0, 1), b.flatten(0, 1)
    return product(A, A.mT).mul_(product(B, B.mT)).view(n, t, n, t).sum((1, 3))


def gradients(a: Tensor, b: Tensor) -> Tensor:
    """All per-sample gradients [n, o i] in the dtype of the factors."""
    return torch.bmm(b.mT, a).flatten(1)


def gradients_gram(a: Tensor, b: Tensor, _: None = None) -> Tensor:
    G = gradients(a, b)
    return product(G, G.mT)


def forced(name: str) -> Callable[[Tensor, Tensor, None], Tensor]:
    """A route of ours, whatever the cost model says."""

    def call(a: Tensor, b: Tensor, _: None = None) -> Tensor:
        route = layer.gram_route(a, b, only=name)
        if name == "factors":
            return layer.token_gram(a, b, False, route.rows)
        return layer.gram_of_chunks(a, b, b.new_empty(0, b.shape[2], a.shape[2]), False, route)[0]

    return call


def composed_gram(a: Tensor, b: Tensor, _: None = None) -> Tensor:
    return FALLBACKS["token_gram"](a, b, False, layer.gram_route(a, b, only="factors").rows)


def gram_kernel(a: Tensor, b: Tensor, _: None = None) -> Tensor:
    from projgrad.kernels.linear_gram import linear_gram

    return linear_gram(a, b)


def dot_kernel(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    from projgrad.kernels.linear_dot import linear_dot

    return linear_dot(a, b, u[None])[:, 0]


def composed_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return FALLBACKS["linear_dot_pass"](a, b, u[None], False)[:, 0]


def combine_kernel(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    from projgrad.kernels.linear_combine import linear_combine_

    return added(linear_combine_, a, b, c)


def added(combine_: Callable, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    out = torch.zeros(b.shape[2], a.shape[2], device=a.device)
    combine_(out, a, b, c)
    return out.to(a.dtype)


def moments_kernel(a: Tensor, b: Tensor, _: None = None) -> tuple[Tensor, Tensor]:
    from projgrad.kernels.linear_moments import linear_moments

    return linear_moments(a, b)


def products_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return product(a.flatten(0, 1), u.mT).mul_(b.flatten(0, 1)).view(a.shape[0], -1).sum(1)


def gradients_dot(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return product(gradients(a, b), u.flatten()[:, None])[:, 0]


def products_combine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (b * c.to(b.dtype)[:, None, None]).flatten(0, 1).mT @ a.flatten(0, 1)


def gradients_combine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (c.to(a.dtype)[None] @ gradients(a, b)).view(b.shape[2], a.shape[2])


def gradients_moments(a: Tensor, b: Tensor, _: None = None) -> tuple[Tensor, Tensor]:
    G = gradients(a, b).view(a.shape[0], b.shape[2], a.shape[2])
    return G.sum(0), G.square().sum(0)


ALTERNATIVES: dict[str, dict[str, Alternative]] = {
    "linear_gram": {
        "projgrad": Alternative(lambda a, b, _: projgrad.linear_gram(a, b)),
        "kernel, factors": Alternative(gram_kernel, "factors"),
        "route factors": Alternative(forced("factors"), "factors"),
        "route chunks": Alternative(forced("chunks"), "chunks"),
        "composed, factors": Alternative(composed_gram, "factors"),
        "library, factors": Alternative(tokens_gram, "factors"),
        "library, gradients": Alternative(gradients_gram, "chunks"),
    },
    "linear_dot": {
        "projgrad": Alternative(lambda a, b, u: projgrad.linear_dot(a, b, u)),
        "kernel": Alternative(dot_kernel),
        "composed": Alternative(composed_dot),
        "library, factors": Alternative(products_dot),
        "library, gradients": Alternative(gradients_dot),
    },
    "linear_combine": {
        "projgrad": Alternative(lambda a, b, c: projgrad.linear_combine(a, b, c)),
        "kernel": Alternative(combine_kernel),
        "composed": Alternative(lambda a, b, c: added(FALLBACKS["linear_combine_pass_"], a, b, c)),
        "library, factors": Alternative(products_combine),
        "library, gradients": Alternative(gradients_combine),
    },
    "linear_moments": {
        "projgrad": Alternative(lambda a, b, _: projgrad.linear_moments(a, b)),
        "kernel": Alternative(moments_kernel),
        "composed": Alternative(lambda a, b, _: FALLBACKS["linear_moments_pass"](a, b)),
        "library, gradients": Alternative(gradients_moments),
    },
    "basis_project": {
        "projgrad": Alternative(lambda D, M, _: projgrad.basis_project(D, M)),
        "library": Alternative(lambda D, M, _: D - (D @ M) @ M.mT),
    },
}
