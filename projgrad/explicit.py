"""Per-sample gradients as an explicit matrix, from the two closures of a method alone.

The model's one call inside the retain closure is recorded; the gradient of the losses with respect to its output splits
the closure into loss and model, and `vmap` over the samples of the model's inputs gives all rows in the time of a few
backward passes. Whether that split is exact is measured, never assumed: the losses and the rows must reproduce an
ordinary backward pass with unequal weights. Where they do not (dropout, a model called twice, losses that share terms)
every loss is differentiated on its own, batched: exact too, n times slower.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from . import reference
from .ops.flat import gram, project_out


class ExplicitGradients:
    """Rows of G, made on demand for any subset of the parameters.

    Args:
        model: called inside `closure`.
        closure: returns the n losses of the retain samples, shape (n,).
        params: the parameters to differentiate, by name.
        chunk_size: samples differentiated at once; None: all.

    Raises:
        ValueError: the losses are not one per sample.
        FloatingPointError: a loss is NaN or Inf.
    """

    def __init__(
        self,
        model: nn.Module,
        closure: Callable[[], Tensor],
        params: dict[str, Tensor],
        chunk_size: int | None = None,
    ) -> None:
        self.model, self.params, self.chunk_size = model, params, chunk_size
        calls: list[tuple] = []
        handle = model.register_forward_hook(lambda _, args, kw, out: calls.append((args, kw, out)), with_kwargs=True)
        try:
            with torch.enable_grad():
                self.losses = closure()
        finally:
            handle.remove()
        check_losses(self.losses)
        self._cotangents = self._split(calls)

    @property
    def n(self) -> int:
        return len(self.losses)

    def combine(self, weights: Tensor) -> list[Tensor]:
        """Σ_j w_j g_j, one tensor per parameter, by one ordinary backward pass; weights (n,)."""
        return list(self._backward(list(self.params.values()), weights.to(self.losses.dtype)))

    def rows(self, names: list[str]) -> Tensor:
        """G (n, p) for the named parameters, flattened and concatenated in that order."""
        if self._cotangents is not None:
            try:
                G = self._fill(names, self._vmap_chunks(names))
            except RuntimeError as error:  # no batching rule, randomness, data-dependent control flow
                warnings.warn(f"vmap cannot run this model, differentiating loss by loss: {error}", stacklevel=2)
            else:
                expected = torch.cat([self._expected[name].flatten() for name in names])
                if _close(self._weights.to(G.dtype) @ G, expected):
                    return G
            self._cotangents = None
        return self._fill(names, self._batched_chunks(names))

    def _fill(self, names: list[str], chunks: Iterator[tuple[int, tuple[Tensor, ...]]]) -> Tensor:
        sizes = [self.params[name].numel() for name in names]
        dtype = functools.reduce(torch.promote_types, (self.params[name].dtype for name in names))
        G = torch.empty(self.n, sum(sizes), dtype=dtype, device=self.losses.device)
        for start, grads in chunks:
            for part, grad in zip(G[start:].split(sizes, 1), grads, strict=True):
                part[: len(grad)] = grad.flatten(1)
        return G

    def _backward(self, inputs: list[Tensor], weights: Tensor, batched: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self.losses, inputs, weights, retain_graph=True, is_grads_batched=batched, materialize_grads=True
        )

    def _split(self, calls: list[tuple]) -> Tensor | None:
        """dℓ_j/d(output of sample j), or None where the closure does not split into samples at the model's output."""
        if len(calls) != 1:
            return None
        args, kwargs, out = calls[0]
        batched = all(isinstance(a, Tensor) and a.ndim > 0 and len(a) == self.n for a in args)
        if not (args and batched and not kwargs and isinstance(out, Tensor) and out.ndim and len(out) == self.n):
            return None
        weights = 1 + torch.arange(self.n, device=self.losses.device, dtype=self.losses.dtype) / max(1, self.n)
        (plain,) = self._backward([out], torch.ones_like(weights))
        weighted, *expected = self._backward([out, *self.params.values()], weights)
        if not _close(plain * weights.view(-1, *(1,) * (out.ndim - 1)), weighted):
            return None  # a loss depends on the output of another sample
        self._args, self._weights = args, weights
        self._expected = dict(zip(self.params, expected, strict=True))
        return plain

    def _vmap_chunks(self, names: list[str]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        inputs = {name: self.params[name].detach() for name in names}

        def one(cotangent: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
            def call(some: dict[str, Tensor]) -> Tensor:
                return functional_call(self.model, some, tuple(a[None] for a in args))

            return tuple(vjp(call, inputs)[1](cotangent[None])[0].values())

        step = self.chunk_size or max(1, self.n)
        for start in range(0, self.n, step):
            chunk = slice(start, start + step)
            with torch.no_grad():
                grads = vmap(one)(self._cotangents[chunk], *(a[chunk] for a in self._args))
            yield start, grads

    def _batched_chunks(self, names: list[str]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        inputs = [self.params[name] for name in names]
        unit = torch.eye(self.n, dtype=self.losses.dtype, device=self.losses.device)
        step = self.chunk_size or max(1, self.n)
        for start in range(0, self.n, step):
            yield start, self._backward(inputs, unit[start : start + step], batched=True)


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
    groups = [[name] for name in u] if per_tensor else _groups(samples, max_bytes)
    u_perp, done = {}, {}
    if per_tensor or len(groups) == 1:
        for names in groups:
            flat, done[", ".join(names)] = _project_flat(_flat(u, names), samples.rows(names), damping, rtol, projector)
            u_perp |= _unflat(flat, u, names)
    else:
        u_perp, done["all"] = _project_groups(u, samples, groups, damping, rtol)
    if not damping and rtol is None and projector is None:
        _check_residual(u, done)
    return u_perp, done


def _project_flat(
    u: Tensor, G: Tensor, damping: float, rtol: float | None, projector: Callable | None
) -> tuple[Tensor, Projected]:
    u = u.to(G.dtype)
    if projector is None:
        out, info = project_out(u, G, damping=damping, rtol=rtol, return_info=True)
        return out, Projected(int(info.rank), float(info.preserved_norm), float(info.residual))
    out = projector(u, G)
    K, r = gram(G, out)
    squares = torch.stack([u.double().square().sum(), out.double().square().sum()])[:, None]
    cosines = reference.cosines(K, r[:, None], squares, u.dtype)
    before, after = squares.sqrt().flatten().tolist()
    return out, Projected(None, after / before if before else 1.0, float(cosines.max()))


def _project_groups(
    u: dict[str, Tensor], samples: ExplicitGradients, groups: list[list[str]], damping: float, rtol: float | None
) -> tuple[dict[str, Tensor], Projected]:
    """The global projection with only one group of columns of G in memory; Gᵀ c is a weighted backward pass.

    Rounds repeat, each measuring on G what the last one left, until that is at rounding level (three at most).
    """
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in u.values()))
    before = sum(float(g.double().square().sum()) for g in u.values())
    u_perp, c, rank = dict(u), 0.0, 0
    for repeat in range(4):
        sweeps = [gram(samples.rows(names), _flat(u_perp, names)) for names in groups]
        K, r = (sum(parts) for parts in zip(*sweeps, strict=True))
        after = sum(float(g.double().square().sum()) for g in u_perp.values())
        cosines = reference.cosines(K, r[:, None], r.new_tensor([[before], [after]]), dtype)
        b = r - damping * K.diagonal() * c
        worst = float(reference.cosines(K, b[:, None], r.new_tensor([[before], [after]]), dtype).max())
        if repeat == 3 or (repeat and worst <= 4 * torch.finfo(dtype).eps):
            break
        step, ranks = torch.ops.projgrad.gram_solve(K[None], b[None, :, None], damping, rtol)
        c, rank = c + step[0, :, 0], int(ranks[0])
        spanned = dict(zip(samples.params, samples.combine(c), strict=True))
        u_perp = {name: u[name] - spanned[name] for name in u}
    return u_perp, Projected(rank, (after / before) ** 0.5 if before else 1.0, float(cosines.max()))


def _groups(samples: ExplicitGradients, max_bytes: int | None) -> list[list[str]]:
    """Consecutive parameters whose rows of G fit into max_bytes together; at least one a group."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, p in samples.params.items():
        size += samples.n * p.numel() * p.element_size()
        if max_bytes is not None and groups[-1] and size > max_bytes:
            groups.append([])
            size = samples.n * p.numel() * p.element_size()
        groups[-1].append(name)
    return groups


def _flat(grads: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([grads[name].flatten() for name in names])


def _unflat(flat: Tensor, like: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    parts = flat.split([like[name].numel() for name in names])
    return {name: part.view_as(like[name]).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}


def _check_residual(u: dict[str, Tensor], done: dict[str, Projected]) -> None:
    """Rounding leaves about 1e-7 in float32 and 1e-16 in float64; anything above these limits is a wrong answer."""
    limit = 1e-10 if all(g.dtype == torch.float64 for g in u.values()) else 1e-5
    name, worst = max(done.items(), key=lambda item: item[1].residual)
    if worst.residual > limit:
        raise ArithmeticError(
            f"the projection left {worst.residual:.1e} of a retain gradient (limit {limit:.0e}) in {name[:80]}; "
            "nothing was changed. Please report this with the shapes and dtypes of your model"
        )


def check_losses(losses: Tensor) -> None:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"retain() must return one loss per sample, shape (n,); got {got}: use reduction='none'")
    if not len(losses):
        raise ValueError("retain() returned no losses: without retain samples there is nothing to be orthogonal to")
    if not losses.requires_grad:
        raise ValueError("retain() returned losses that do not depend on any trainable parameter")
    if not losses.isfinite().all():
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"retain() returned NaN or Inf for samples {bad[:8]}; nothing was changed")


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding: two routes through the same arithmetic. A wrong split is off by far more than √eps."""
    error = (found.double() - expected.double()).norm()
    return bool(error <= torch.finfo(expected.dtype).eps ** 0.5 * expected.double().norm())
