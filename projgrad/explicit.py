"""Per-sample gradients as an explicit matrix: what reference projectors need, and the tape is tested against.

The gradient of the losses at the output of the model's one call inside the retain closure, and `vmap` over the samples
of that call's inputs, give all rows in the time of a few backward passes. Whether the closure really splits into
samples there is checked on every step. Where it does not (dropout, a model called twice, losses that share terms)
every loss is differentiated on its own: exact too, n times slower.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from ._options import check_integer
from .ops.gram import gram
from .ops.refinement import cosines
from .recording.losses import check_losses
from .tape.project import Projection


class ExplicitGradients:
    """Rows of G, made on demand for any subset of the parameters.

    Args:
        model: called inside `closure`.
        closure: returns the n losses of the retain samples, shape (n,).
        params: the parameters to differentiate, by name.
        chunk_size: samples differentiated at once; None: all.

    Raises:
        ValueError: the losses are not one per sample, or chunk_size < 1.
        FloatingPointError: a loss is NaN or Inf.
    """

    def __init__(
        self,
        model: nn.Module,
        closure: Callable[[], Tensor],
        params: dict[str, Tensor],
        chunk_size: int | None = None,
    ) -> None:
        self.model, self.params = model, params
        self.chunk_size = None if chunk_size is None else check_integer("chunk_size", chunk_size, 1)
        calls: list[tuple] = []
        handle = model.register_forward_hook(lambda _, args, kw, out: calls.append((args, kw, out)), with_kwargs=True)
        versions = [p._version for p in params.values()]
        try:
            with torch.enable_grad():
                self.losses = closure()
        finally:
            handle.remove()
        check_losses(self.losses)
        still = versions == [p._version for p in params.values()]  # else vmap would change them too, below the graph
        self._split = self._find_split(*calls[0]) if len(calls) == 1 and still else None

    @property
    def n(self) -> int:
        return len(self.losses)

    def combine(self, weights: Tensor) -> list[Tensor | None]:
        """Σ_j w_j g_j by one ordinary backward pass, None for a parameter that the losses do not use; weights (n,)."""
        inputs = list(self.params.values())
        weights = weights.to(self.losses.dtype)
        return list(torch.autograd.grad(self.losses, inputs, weights, retain_graph=True, allow_unused=True))

    def rows(self, names: Sequence[str]) -> Tensor:
        """G (n, p) for the named parameters, flattened and concatenated in that order."""
        if self._split is not None:
            try:
                G = self._fill(names, self._vmap_chunks(names))
            except Exception as error:  # whatever the model does not allow: a batch of one, batching, randomness
                warnings.warn(f"vmap cannot run this model, differentiating loss by loss: {error}", stacklevel=2)
            else:
                if self._confirms(names, G):
                    return G
            self._split = None
        return self._fill(names, self._loss_chunks(names))

    def _fill(self, names: Sequence[str], chunks: Iterator[tuple[int, Sequence[Tensor]]]) -> Tensor:
        sizes = [self.params[name].numel() for name in names]
        dtype = functools.reduce(torch.promote_types, (self.params[name].dtype for name in names))
        G = torch.empty(self.n, sum(sizes), dtype=dtype, device=self.losses.device)
        for start, grads in chunks:
            for part, grad in zip(G[start:].split(sizes, 1), grads, strict=True):
                part[: len(grad)] = grad.reshape(len(grad), part.shape[1])
        return G

    def _find_split(self, args: tuple, kwargs: dict, out: Tensor) -> tuple | None:
        """(args, out, dℓ_j/d out_j), or None where sample j is not row j of everything, or a loss looks at another."""
        n = self.n
        if kwargs or not args or not all(isinstance(a, Tensor) and a.ndim and len(a) == n for a in args):
            return None
        if not (isinstance(out, Tensor) and out.requires_grad and out.ndim and len(out) == n):
            return None
        if any(_hooked(module) for module in self.model.modules()):
            return None  # hooks would see, and might keep, what only lives inside vmap
        if _reaches_a_leaf(self.losses, out):
            return None  # a penalty on the weights, or features taken from inside the model
        gradient = functools.partial(torch.autograd.grad, self.losses, out, retain_graph=True, materialize_grads=True)
        # Samples whose loss is left out must have no gradient, exactly. The masks are the binary digits of j and their
        # complements: for any two samples one mask holds the first alone, and another the second.
        j = torch.arange(n, device=self.losses.device)
        for bit in range((n - 1).bit_length()):
            for on in (j >> bit & 1, 1 - (j >> bit & 1)):
                if gradient(on.to(self.losses.dtype))[0][on == 0].any():
                    return None
        return args, out.detach(), gradient(torch.ones_like(self.losses))[0]

    def _confirms(self, names: Sequence[str], G: Tensor) -> bool:
        """The rows reproduce an ordinary backward pass with weights ± 1 / ‖g_j‖, so that each row counts alike."""
        lengths = torch.linalg.vector_norm(G, dim=1).double()
        signs = 1 - 2 * (torch.arange(self.n, device=G.device) * 0x9E3779B1 >> 16 & 1)
        largest = lengths.max().clamp_min(torch.finfo(torch.float64).tiny)
        weights = (signs * largest / lengths.clamp_min(1e-6 * largest)).to(self.losses.dtype)
        inputs = [self.params[name] for name in names]
        expected = torch.autograd.grad(self.losses, inputs, weights, retain_graph=True, materialize_grads=True)
        difference = weights.to(G.dtype) @ G - torch.cat([g.flatten() for g in expected])
        return bool(difference.double().norm() <= self._tolerance * (weights.double().abs() * lengths).norm())

    @property
    def _tolerance(self) -> float:
        """Two routes through the same arithmetic agree to this; weaker coupling inside the model is not seen."""
        return max((16 if p.itemsize == 2 else 100) * torch.finfo(p.dtype).eps for p in self.params.values())

    def _vmap_chunks(self, names: Sequence[str]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        inputs = {name: self.params[name].detach() for name in names}
        args, out, cotangents = self._split
        buffers = dict(self.model.named_buffers())

        def one(cotangent: Tensor, *args: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            def call(some: dict[str, Tensor]) -> Tensor:
                return functional_call(self.model, buffers | some, tuple(a[None] for a in args))

            alone, backward = vjp(call, inputs)
            return alone[0], tuple(backward(cotangent[None])[0].values())

        step = self.chunk_size or self.n
        for start in range(0, self.n, step):
            chunk = slice(start, start + step)
            with torch.no_grad(), _unchanged(self.model):
                alone, grads = vmap(one)(cotangents[chunk], *(a[chunk] for a in args))
            expected = out[chunk].reshape(len(alone), -1).double()
            error = (alone.reshape(len(alone), -1).double() - expected).norm(dim=1)
            if (error > self._tolerance * expected.norm(dim=1)).any():
                raise ValueError("its output for a sample alone is not its output for that sample in the batch")
            yield start, grads

    def _loss_chunks(self, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Tensor]]]:
        inputs = [self.params[name] for name in names]
        gradient = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
        unit = torch.eye(self.n, dtype=self.losses.dtype, device=self.losses.device)
        step = self.chunk_size or self.n
        for start in range(0, self.n, step):
            chunk = unit[start : start + step]
            try:
                grads = gradient(self.losses, inputs, chunk, is_grads_batched=True)
            except RuntimeError:  # an operation without a batching rule
                each = [gradient(self.losses, inputs, one) for one in chunk]
                grads = [None if some[0] is None else torch.stack(some) for some in zip(*each, strict=True)]
            pairs = zip(grads, inputs, strict=True)
            yield start, [p.new_zeros(len(chunk), *p.shape) if g is None else g for g, p in pairs]


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes that a forward pass sets (stored features, running values) are put back: they die with vmap."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _reaches_a_leaf(losses: Tensor, out: Tensor) -> bool:
    """Whether a tensor that requires gradients enters the losses other than through `out`."""
    seen, nodes = {out.grad_fn}, [losses.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the accumulator of a leaf
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def project_explicit(
    model: nn.Module,
    closure: Callable[[], Tensor],
    params: dict[str, nn.Parameter],
    projector: Callable[[Tensor, Tensor], Tensor],
    per_tensor: bool,
    add: float,
    rates: Mapping[str, float],
) -> tuple[float, Projection]:
    """p.grad <- projector(p.grad, G) + add * mean_j(g_j); the mean loss, and what was done.

    rates: see `Tape.project_`; a projector then gets both multiplied by their roots.

    Raises:
        FloatingPointError: NaN or Inf in a gradient.
    """
    samples = ExplicitGradients(model, closure, params)
    means = dict(zip(params, samples.combine(torch.full_like(samples.losses, add / samples.n)), strict=True))
    used = [name for name, p in params.items() if p.grad is not None or means[name] is not None]
    if not used:
        raise ValueError("neither loss depends on a parameter that the optimizer holds")
    before = after = worst = 0.0
    for names in [[name] for name in used] if per_tensor else [used]:
        u = [torch.zeros_like(params[name]) if params[name].grad is None else params[name].grad for name in names]
        G, flat = samples.rows(names), torch.cat([g.flatten() for g in u])
        flat, roots = flat.to(G.dtype), None
        if rates and not per_tensor:
            roots = torch.cat(
                [g.new_full((g.numel(),), rates.get(name, 1.0) ** 0.5) for g, name in zip(u, names, strict=True)]
            )
            given, flat, G = flat, flat * roots, G * roots
        out = projector(flat, G)
        K, r = gram(G, out[None])
        squares = torch.stack([flat.double().square().sum(), out.double().square().sum()])[:, None]
        if not (squares.isfinite().all() and K.isfinite().all()):
            raise FloatingPointError(f"NaN or Inf in the gradients of {', '.join(names)[:80]}; nothing was changed")
        worst = max(worst, float(cosines(K, r, squares, torch.zeros_like(r)).max()))
        before, after = before + float(squares[0]), after + float(squares[1])
        if roots is not None:  # what a rate of zero keeps in place is not projected
            out = torch.where(roots > 0, out / roots, given)
        for name, part in zip(names, out.split([params[name].numel() for name in names]), strict=True):
            grad = part.view_as(params[name]).to(params[name].dtype)
            params[name].grad = grad if means[name] is None else grad + means[name]
    preserved = (after / before) ** 0.5 if before else 1.0
    return float(samples.losses.detach().mean()), Projection(-1, preserved, worst, 0, 0.0, (before, after))
