"""The other ways to K = G Gᵀ and to the projected forget gradient, each as its own users would write it.

G [n, p] holds the gradients of the retain losses. PEERS names every way; a package is imported when its peer starts.
"""

import importlib.util
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ...methods import projectors
from ...methods.orthograd import OrthoGrad
from ...tape.per_sample import per_sample


class Job(Protocol):
    """A model and two batches, forget and retain. Peers that put hooks on the model leave them there: one peer a job.

    samples: of every batch the inputs of the model and, last, the target; samples come first in each tensor.
    losses: of an output and a target, one loss per sample. forget is the mean of them, retain [n] all of them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    samples: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

    def losses(self, output: Tensor, target: Tensor) -> Tensor: ...

    def forget(self) -> Tensor: ...

    def retain(self) -> Tensor: ...


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to K and to the projection.

    gram: makes a job's call that returns K [n, n]. projection: one that returns the projected forget gradient [p].
    package: what pip installs, in the versions that were tried; module: its name in Python. Both empty: torch alone.
    scope: of the projection, as in `OrthoGrad`; empty for the floor, which projects nothing and has no K.
    needs_samples: it needs `samples` and `losses` of a job, for more than closures can give.
    """

    gram: Callable[[Job], Call]
    projection: Callable[[Job], Call]
    package: str = ""
    module: str = ""
    scope: str = "global"
    needs_samples: bool = True

    def missing(self) -> str | None:
        """Return what to install, None where nothing is missing."""
        if not self.module or importlib.util.find_spec(self.module):
            return None
        return f"{self.module} is not installed: pip install '{self.package}'"

    def start(self, job: Job) -> Call:
        """Return a call that computes K [n, n]. Raise ModuleNotFoundError without the package."""
        self._check(job)
        return self.gram(job)

    def project(self, job: Job) -> Call:
        """Return a call that computes the projected forget gradient [p], trained tensors in the model's order."""
        self._check(job)
        return self.projection(job)

    def _check(self, job: Job) -> None:
        if missing := self.missing():
            raise ModuleNotFoundError(missing)
        if self.needs_samples and not (hasattr(job, "samples") and hasattr(job, "losses")):
            raise TypeError("this peer needs the samples and losses of a job, closures are not enough")


def trained(job: Job) -> list[nn.Parameter]:
    return [p for p in job.model.parameters() if p.requires_grad]


def _batch_losses(job: Job, batch: Iterable[Tensor], model: Callable[..., Tensor] | None = None) -> Tensor:
    *inputs, target = batch
    return job.losses((model or job.model)(*inputs), target)


def _wide(x: Tensor) -> Tensor:
    """Return float32 or better: linear algebra has no 16-bit kernels."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _flat(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Return every tensor as a dense vector."""
    return [_wide(g.to_dense() if g.is_sparse else g).flatten() for g in gradients]


def _gradients(loss: Tensor, job: Job, weights: Tensor | None = None) -> list[Tensor]:
    """Return the gradient of every trained tensor, zero where it is not used."""
    return _flat(torch.autograd.grad(loss, trained(job), weights, allow_unused=True, materialize_grads=True))


# The floor, and projgrad.


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
        return torch.cat(_flat(p.grad for p in trained(job) if p.grad is not None))

    return call


def _tape_gram(job: Job) -> Call:
    def call() -> Tensor:
        with per_sample(job.model) as tape:
            losses = job.retain()
        return tape.gram(losses)

    return call


def _orthograd(scope: str) -> Callable[[Job], Call]:
    def start(job: Job) -> Call:
        unlearner = OrthoGrad(job.model, job.optimizer, alpha=0.0, ascend=False, scope=scope)

        def call() -> Tensor:
            job.optimizer.zero_grad()
            unlearner.backward(job.forget, job.retain)
            return torch.cat(_flat(torch.zeros_like(p) if p.grad is None else p.grad for p in trained(job)))

        return call

    return start


# Explicit per-sample gradients: a source of rows, and what is made of them.


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
                u = _gradients(job.forget(), job)
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
        rows.append(_wide(G.detach().flatten(1)))
    return rows


def _vmap(job: Job) -> Source:
    def loss(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        batch = [x[None] for x in sample]
        return _batch_losses(job, batch, lambda *inputs: functional_call(job.model, params, inputs))[0]

    def rows() -> list[Tensor]:
        params = {name: p.detach() for name, p in job.model.named_parameters() if p.requires_grad}
        retain = job.samples[1]
        G = vmap(grad(loss), (None, *(0 for _ in retain)))(params, *retain)
        return [_wide(g.to_dense() if g.is_sparse else g).flatten(1) for g in G.values()]

    return Source(rows)


def _loop(job: Job) -> Source:
    """One forward and one backward pass a sample, in batches of one."""

    def rows() -> list[Tensor]:
        retain = job.samples[1]
        each = ([x[j : j + 1] for x in retain] for j in range(len(retain[-1])))
        gradients = [_gradients(_batch_losses(job, batch).sum(), job) for batch in each]
        return [torch.stack(of_tensor) for of_tensor in zip(*gradients, strict=True)]

    return Source(rows)


def _opacus(job: Job) -> Source:
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


def _expanded_weights(job: Job) -> Source:
    from opacus.grad_sample import GradSampleModuleExpandedWeights

    expanded = GradSampleModuleExpandedWeights(job.model, loss_reduction="sum")

    def rows() -> list[Tensor]:
        expanded.zero_grad()
        losses = _batch_losses(job, job.samples[1], expanded)
        losses.sum().backward()
        return _stacked(trained(job), "grad_sample", len(losses))

    return Source(rows)


def _backpack(job: Job) -> Source:
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


# Packages that give K without G: the projection then needs G u in another way.


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
            losses = _batch_losses(job, both)
            K = _wide(compute(losses))  # [m + n, m + n]
            c = torch.linalg.solve(K[m:, m:], K[m:, :m].mean(1))
            weights = torch.cat([torch.full_like(K[0, :m], 1 / m), -c]).to(losses.dtype)
            return torch.cat(_gradients(losses, job, weights))

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
    return make(job.model, loader, lambda *retain: _batch_losses(job, retain)[:, None], **options)


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
        gradients = {name: tuple(p.grad for p in layer.parameters(recurse=False)) for name, layer in layers.items()}
        v = forward.jvp(PVector(forward.generator.layer_collection, dict_repr=gradients)).to_torch()[0]
        u = torch.cat(_flat(torch.zeros_like(p) if p.grad is None else p.grad for p in trained(job)))
        return u - torch.cat(_gradients(job.retain(), job, torch.linalg.solve(K, v)))

    return call


OPACUS = {"package": "opacus>=1.6,<1.7", "module": "opacus"}
BACKPACK = {"package": "backpack-for-pytorch>=1.7,<1.8", "module": "backpack"}
NNGEOMETRY = {"package": "nngeometry>=0.4,<0.5", "module": "nngeometry"}
PEERS = {
    "plain": Peer(_plain_backward, _plain_step, scope="", needs_samples=False),
    "projgrad": Peer(_tape_gram, _orthograd("global"), needs_samples=False),
    "projgrad per_tensor": Peer(_tape_gram, _orthograd("per_tensor"), scope="per_tensor", needs_samples=False),
    "vmap + QR": explicit(_vmap, by_qr),
    "vmap + QR per_tensor": explicit(_vmap, by_qr_per_tensor, scope="per_tensor"),
    "vmap + Gram": explicit(_vmap),
    "one by one": explicit(_loop),
    "torchjd": _torchjd(0),
    "torchjd unbatched": _torchjd(None),
    "opacus": explicit(_opacus, **OPACUS, needs_samples=False),
    "opacus ExpandedWeights": explicit(_expanded_weights, **OPACUS),
    "backpack": explicit(_backpack, **BACKPACK, needs_samples=False),
    "nngeometry": Peer(_nngeometry_gram, _nngeometry_projection, **NNGEOMETRY),
}
