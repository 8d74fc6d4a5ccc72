"""Per-sample gradients by a loop of batches of one, and the projection by SVD: slow, plain, float64."""

import torch
from torch import Tensor, nn
from zoo import Case

from projgrad.methods.projectors import lstsq


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(case: Case) -> dict[str, Tensor]:
    """g_j of every trainable parameter (n, *shape) on the CPU, zero where sample j does not use it."""
    params = trained(case.model)
    rows = []
    for j in range(case.n):
        loss = case.one(case.model, j)
        rows.append(torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(g).double().cpu() for name, g in zip(params, zip(*rows, strict=True), strict=True)}


def largest(G: dict[str, Tensor]) -> float:
    return max((g.abs().max().item() for g in G.values() if g.numel()), default=0.0)


def random_direction(case: Case) -> dict[str, Tensor]:
    """Return a float64 tensor on the CPU for every trainable parameter."""
    return {name: torch.randn(p.shape, dtype=torch.float64) for name, p in trained(case.model).items()}


def matrix(G: dict[str, Tensor]) -> Tensor:
    """All tensors in one row per sample (n, p)."""
    return torch.cat([g.reshape(len(g), -1) for g in G.values()], 1)


def gram(G: dict[str, Tensor]) -> Tensor:
    return matrix(G) @ matrix(G).mT


def project(u: dict[str, Tensor], G: dict[str, Tensor], scope: str) -> dict[str, Tensor]:
    """u without its component in the span of the rows of G: of the whole rows, or tensor by tensor."""
    if scope == "per_tensor":
        return {name: lstsq(u[name].flatten(), g.reshape(len(g), -1)).view_as(u[name]) for name, g in G.items()}
    whole = lstsq(torch.cat([u[name].flatten() for name in G]), matrix(G))
    parts = whole.split([u[name].numel() for name in G])
    return {name: part.view_as(u[name]) for name, part in zip(G, parts, strict=True)}
