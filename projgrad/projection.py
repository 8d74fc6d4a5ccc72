"""The projection of a model's forget gradient, on explicit per-sample gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .explicit import ExplicitGradients
from .ops.flat import _gram, _gram_solve, _subtract, gram, project_out


class Projected(NamedTuple):
    """What one projection did: independent rows used (None: not known), ‖u_perp‖ / ‖u‖ and max_j |cos(g_j, u_perp)|."""

    rank: int | None
    preserved_norm: float
    residual: float


def project(
    u: dict[str, Tensor],
    samples: ExplicitGradients,
    *,
    per_tensor: bool = False,
    damping: float = 0.0,
    rtol: float | None = None,
    max_bytes: int | None = None,
    projector: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Projected]]:
    """u_perp by name, and what was done: one entry per tensor, or a single one for the whole vector.

    Raises:
        ArithmeticError: an undamped projection at default tolerance left more of a row than rounding explains.
    """
    groups = [[name] for name in u] if per_tensor else _groups(samples, list(u), max_bytes)
    u_perp, done = {}, {}
    if per_tensor or len(groups) == 1:
        for names in groups:
            flat, done[", ".join(names)] = _project_flat(_flat(u, names), samples.rows(names), damping, rtol, projector)
            u_perp |= _unflat(flat, u, names)
    else:
        u_perp, done["all parameters"] = _project_groups(u, samples, groups, damping, rtol)
    if not damping and rtol is None and projector is None:
        _check_residual(u, samples.n, done)
    return u_perp, done


def _project_flat(
    u: Tensor, G: Tensor, damping: float, rtol: float | None, projector: Callable | None
) -> tuple[Tensor, Projected]:
    u = u.to(G.dtype)
    if projector is None:
        out, info = project_out(u, G, damping=damping, rtol=rtol, return_info=True)
        return out, Projected(int(info.rank), float(info.preserved_norm), float(info.residual))
    out = projector(u, G)
    K, r = gram(G, out[None])
    squares = torch.stack([u.double().square().sum(), out.double().square().sum()])[:, None]
    return out, Projected(None, _preserved(squares), float(reference.cosines(K, r, squares, torch.zeros_like(r)).max()))


def _project_groups(
    u: dict[str, Tensor], samples: ExplicitGradients, groups: list[list[str]], damping: float, rtol: float | None
) -> tuple[dict[str, Tensor], Projected]:
    """The global projection with the columns of one group of G in memory at a time, made anew for every pass."""

    def products(wide: bool) -> tuple[Tensor, Tensor]:
        passes = []
        for names in groups:
            G = samples.rows(names)
            passes.append(_gram(G, _flat(u, names).to(G.dtype)[None], wide))
        K, b = zip(*passes, strict=True)
        return sum(K), sum(b)

    def apply(c: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        u_perp, passes = {}, []
        for names in groups:
            G = samples.rows(names)
            out, *sums = _subtract(_flat(u, names).to(G.dtype)[None], G, c)
            u_perp |= _unflat(out[0], u, names)
            passes.append(sums)
        r, squares = zip(*passes, strict=True)
        return u_perp, sum(r), sum(squares)

    dtype = functools.reduce(torch.promote_types, (g.dtype for g in u.values()))
    u_perp, _, rank, worst, squares = reference.refined(samples.n, products, apply, dtype, damping, rtol, _gram_solve)
    return u_perp, Projected(int(rank), _preserved(squares), float(worst))


def _preserved(squares: Tensor) -> float:
    before, after = squares.sqrt().flatten().tolist()
    return after / before if before else 1.0


def _groups(samples: ExplicitGradients, names: list[str], max_bytes: int | None) -> list[list[str]]:
    """Consecutive parameters whose rows of G fit into max_bytes together; at least one a group."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        need = samples.n * samples.params[name].numel() * samples.params[name].element_size()
        size += need
        if max_bytes is not None and groups[-1] and size > max_bytes:
            groups.append([])
            size = need
        groups[-1].append(name)
    return groups


def _flat(grads: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([grads[name].flatten() for name in names])


def _unflat(flat: Tensor, like: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    parts = flat.split([like[name].numel() for name in names])
    return {name: part.view_as(like[name]).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}


def _check_residual(u: dict[str, Tensor], n: int, done: dict[str, Projected]) -> None:
    """A dependent row may keep the sine that the rank tolerance allows; anything well above it is a wrong answer.

    Where next to nothing of u is left, what it has in common with a row is compared with u: the rounding of the sum.
    """
    rounding = max(reference.first_pass(n, g.dtype, None)[1] for g in u.values())
    limit = max(10 * reference.default_rtol(n, torch.float64) ** 0.5, 2 * rounding)
    rounded = 1000 * reference.default_rtol(n, torch.float64)
    for name, some in done.items():
        if not (some.residual <= limit or some.residual * some.preserved_norm <= rounded):
            raise ArithmeticError(
                f"the projection left {some.residual:.1e} of a retain gradient (limit {limit:.0e}) in {name[:80]}; "
                "nothing was changed. Please report this with the shapes and dtypes of your model"
            )
