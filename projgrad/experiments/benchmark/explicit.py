"""Per-sample gradients G in full, by torch alone and by other packages, and what is made of them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ...methods import projectors
from ...methods.common import trainable_parameters
from .peer import Call, Job, Peer, batch_losses, gradients, trained, wide


@dataclass(frozen=True)
class Source:
    """rows: makes G, one [n, p_l] for every trained tensor. quiet: for a pass that needs no per-sample gradients."""

    rows: Callable[[], list[Tensor]]
    quiet: Callable[[], AbstractContextManager] = nullcontext


def gram(rows: Iterable[Tensor]) -> Tensor:
    return sum(G @ G.mT for G in rows)


def by_gram(u: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Project by the n x n system, without a rank test: the least that explicit per-sample gradients can cost."""
    v = sum(G @ part for G, part in zip(rows, u, strict=True))
    c = torch.linalg.solve(gram(rows), v)
    return torch.cat([part - c @ G for G, part in zip(rows, u, strict=True)])


def by_qr(u: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Project by QR of all of G, as the formula of OrthoGrad reads."""
    return projectors.qr(torch.cat(u), torch.cat(rows, 1))


def by_qr_per_tensor(u: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Project every tensor by QR of its own rows, as OrthoGrad's published code does."""
    return torch.cat([projectors.qr(part, G) for part, G in zip(u, rows, strict=True)])


def explicit(
    make: Callable[[Job], Source],
    project: Callable[[list[Tensor], list[Tensor]], Tensor] = by_gram,
    **about: object,
) -> Peer:
    """Return the peer whose per-sample gradients `make` computes and `project` uses."""

    def start_gram(job: Job) -> Call:
        source = make(job)
        return lambda: gram(source.rows())

    def start_projection(job: Job) -> Call:
        source = make(job)

        def call() -> Tensor:
            with source.quiet():
                u = gradients(job.forget(), job)
            return project(u, source.rows())

        return call

    return Peer(start_gram, start_projection, **about)


def _stacked(params: Iterable[nn.Parameter], name: str, n: int) -> list[Tensor]:
    """Return the [n, p_l] that a package left in an attribute of every parameter, zero without any gradient."""
    rows = []
    for place, p in enumerate(params):
        G = getattr(p, name, None)
        if G is None and p.grad is None:
            G = p.new_zeros(n, *p.shape)
        if not isinstance(G, Tensor):
            raise NotImplementedError(f"tensor {place} has {'no' if G is None else 'more than one'} {name}")
        rows.append(wide(G.detach().flatten(1)))
    return rows


def vectorised(job: Job) -> Source:
    def loss(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        batch = [x[None] for x in sample]
        return batch_losses(job, batch, lambda *inputs: functional_call(job.model, params, inputs))[0]

    def rows() -> list[Tensor]:
        params = {name: p.detach() for name, p in trainable_parameters(job.model, job.optimizer).items()}
        retain = job.samples[1]
        G = vmap(grad(loss), (None, *(0 for _ in retain)))(params, *retain)
        return [wide(g.to_dense() if g.is_sparse else g).flatten(1) for g in G.values()]

    return Source(rows)


def one_by_one(job: Job) -> Source:
    """One forward and one backward pass a sample, in batches of one."""

    def rows() -> list[Tensor]:
        retain = job.samples[1]
        each = ([x[j : j + 1] for x in retain] for j in range(len(retain[-1])))
        rows = [gradients(batch_losses(job, batch).sum(), job) for batch in each]
        return [torch.stack(of_tensor) for of_tensor in zip(*rows, strict=True)]

    return Source(rows)


def opacus_hooks(job: Job) -> Source:
    from opacus import GradSampleModule

    hooked = GradSampleModule(job.model, loss_reduction="sum")

    class Quiet(nullcontext):
        def __enter__(self) -> None:
            hooked.disable_hooks()

        def __exit__(self, *_: object) -> None:
            hooked.enable_hooks()

    def rows() -> list[Tensor]:
        hooked.zero_grad()
        losses = job.retain()
        losses.sum().backward()
        return _stacked(trained(job), "grad_sample", len(losses))

    return Source(rows, Quiet)


def opacus_expanded_weights(job: Job) -> Source:
    from opacus.grad_sample import GradSampleModuleExpandedWeights

    expanded = GradSampleModuleExpandedWeights(job.model, loss_reduction="sum")

    def rows() -> list[Tensor]:
        expanded.zero_grad()
        losses = batch_losses(job, job.samples[1], expanded)
        losses.sum().backward()
        return _stacked(trained(job), "grad_sample", len(losses))

    return Source(rows)


def backpack_batch_grad(job: Job) -> Source:
    import backpack
    from backpack.extensions import BatchGrad

    backpack.extend(job.model)

    def rows() -> list[Tensor]:
        job.optimizer.zero_grad()
        losses = job.retain()
        with backpack.backpack(BatchGrad()):
            losses.sum().backward()
        return _stacked(trained(job), "grad_batch", len(losses))

    return Source(rows, backpack.disable)
