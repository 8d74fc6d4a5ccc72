"""The other ways to K = G Gᵀ and to the projected forget gradient, each as its own users would write it.

PEERS names every way; a package is imported when its peer starts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...methods.orthograd import OrthoGrad
from .contenders import tape_gram
from .explicit import (
    backpack_batch_grad,
    by_qr,
    by_qr_per_tensor,
    explicit,
    one_by_one,
    opacus_expanded_weights,
    opacus_hooks,
    vectorised,
)
from .peer import Call, Job, Peer, batch_losses, flat, gradients, trained, wide


def _plain_backward(job: Job) -> Call:
    def call() -> Tensor:
        losses = job.retain()
        job.optimizer.zero_grad()
        losses.mean().backward()
        return losses.detach()

    return call


def _plain_step(job: Job) -> Call:
    """Start forward and backward passes over both batches, which every step makes."""

    def call() -> Tensor:
        job.optimizer.zero_grad()
        job.forget().backward()
        job.retain().mean().backward()
        return torch.cat(flat(p.grad for p in trained(job) if p.grad is not None))

    return call


def _orthograd(scope: str) -> Callable[[Job], Call]:
    def start(job: Job) -> Call:
        unlearner = OrthoGrad(job.model, job.optimizer, alpha=0.0, ascend=False, scope=scope)

        def call() -> Tensor:
            job.optimizer.zero_grad()
            unlearner.backward(job.forget, job.retain)
            return torch.cat(flat(torch.zeros_like(p) if p.grad is None else p.grad for p in trained(job)))

        return call

    return start


def _torchjd(batch_dim: int | None) -> Peer:
    """Return the peer whose engine knows the batch dimension, or with None goes sample by sample through the graph."""

    def start_engine(job: Job) -> Callable[[Tensor], Tensor]:
        from torchjd.autogram import Engine

        return Engine(job.model, batch_dim=batch_dim).compute_gramian

    def start_gram(job: Job) -> Call:
        compute = start_engine(job)
        return lambda: compute(job.retain())

    def start_projection(job: Job) -> Call:
        """Take K of both batches in one, which holds G u too; then one backward pass with weights that follow."""
        compute = start_engine(job)

        def call() -> Tensor:
            both = [torch.cat(pair) for pair in zip(*job.samples, strict=True)]
            m = len(job.samples[0][-1])
            losses = batch_losses(job, both)
            K = wide(compute(losses))  # [m + n, m + n]
            c = torch.linalg.solve(K[m:, m:], K[m:, :m].mean(1))
            weights = torch.cat([torch.full_like(K[0, :m], 1 / m), -c]).to(losses.dtype)
            return torch.cat(gradients(losses, job, weights))

        return call

    return Peer(start_gram, start_projection, "torchjd>=0.18,<0.19", "torchjd")


def _nngeometry(job: Job, make: Callable[..., object], **options: object) -> object:
    """Call a function of NNGeometry with the retain losses, and with the layers that are trained where some are not."""
    from nngeometry.layercollection import LayerCollection

    batch = torch.utils.data.TensorDataset(*job.samples[1])
    loader = torch.utils.data.DataLoader(batch, batch_size=len(batch))
    if not all(p.requires_grad for p in job.model.parameters()):
        options["layer_collection"] = LayerCollection()
        for module in job.model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                options["layer_collection"].add_layer_from_model(job.model, module)
    return make(job.model, loader, lambda *retain: batch_losses(job, retain)[:, None], **options)


def _nngeometry_gram(job: Job) -> Call:
    from nngeometry.gram import GramMatrix

    return lambda: _nngeometry(job, GramMatrix).data[0, :, 0]


def _nngeometry_projection(job: Job) -> Call:
    """Take K, then G u without G, then one backward pass with the weights that follow from both."""
    from nngeometry.jacobian import Jacobian
    from nngeometry.object import PFMapImplicit, PVector

    def call() -> Tensor:
        job.optimizer.zero_grad()
        job.forget().backward()
        K = _nngeometry_gram(job)()
        forward = _nngeometry(job, Jacobian, representation=PFMapImplicit)
        layers = forward.generator.l_to_m
        by_layer = {name: tuple(p.grad for p in layer.parameters(recurse=False)) for name, layer in layers.items()}
        v = forward.jvp(PVector(forward.generator.layer_collection, dict_repr=by_layer)).to_torch()[0]
        u = torch.cat(flat(torch.zeros_like(p) if p.grad is None else p.grad for p in trained(job)))
        return u - torch.cat(gradients(job.retain(), job, torch.linalg.solve(K, v)))

    return call


OPACUS = {"package": "opacus>=1.6,<1.7", "module": "opacus"}
BACKPACK = {"package": "backpack-for-pytorch>=1.7,<1.8", "module": "backpack"}
NNGEOMETRY = {"package": "nngeometry>=0.4,<0.5", "module": "nngeometry"}
PEERS = {
    "plain": Peer(_plain_backward, _plain_step, scope="", needs_samples=False),
    "projgrad": Peer(tape_gram, _orthograd("global"), needs_samples=False),
    "projgrad per_tensor": Peer(tape_gram, _orthograd("per_tensor"), scope="per_tensor", needs_samples=False),
    "vmap + QR": explicit(vectorised, by_qr),
    "vmap + QR per_tensor": explicit(vectorised, by_qr_per_tensor, scope="per_tensor"),
    "vmap + Gram": explicit(vectorised),
    "one by one": explicit(one_by_one),
    "torchjd": _torchjd(0),
    "torchjd unbatched": _torchjd(None),
    "opacus": explicit(opacus_hooks, **OPACUS, needs_samples=False),
    "opacus ExpandedWeights": explicit(opacus_expanded_weights, **OPACUS),
    "backpack": explicit(backpack_batch_grad, **BACKPACK, needs_samples=False),
    "nngeometry": Peer(_nngeometry_gram, _nngeometry_projection, **NNGEOMETRY),
}
