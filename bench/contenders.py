"""Who takes the whole steps of `bench.steps`, and on which models those on a CPU are measured.

projgrad, plain training, other packages, and what a user would write instead.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import projgrad
from projgrad import projectors
from projgrad.experiments.benchmark.contenders import ALPHA, orthograd, plain, plain_backward, tape_gram
from projgrad.experiments.benchmark.models import Batch, Job, TokenJob, adapted_llama, conv_net, decoder, encoder, mlp
from projgrad.experiments.benchmark.peers import PEERS


def graphed(job: TokenJob) -> Callable[[], object]:
    """Start steps whose gradients come from one CUDA graph."""
    unlearner = projgrad.OrthoGrad(job.model, job.optimizer, alpha=ALPHA)
    step = unlearner.graphed(lambda ids: job.losses(ids).mean(), job.losses, *job.samples)
    if step.reason and job.samples[0].is_cuda:
        raise RuntimeError(step.reason)
    return lambda: step(*job.samples)


def vmap_qr(job: Job) -> Callable[[], object]:
    """Start steps by QR of all per-sample gradients at once, as the paper's formula reads."""

    def update(u: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        G = torch.cat(gradients, 1)
        new = ALPHA * G.mean(0) - (1 - ALPHA) * projectors.qr(torch.cat(u), G)
        return list(new.split([len(part) for part in u]))

    return lambda: job.step_vmap(update)


def vmap_qr_per_tensor(job: Job) -> Callable[[], object]:
    """Start steps by QR of every tensor's per-sample gradients, as the published code computes it."""

    def update(u: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        pairs = zip(u, gradients, strict=True)
        return [ALPHA * G.mean(0) - (1 - ALPHA) * projectors.qr(part, G) for part, G in pairs]

    return lambda: job.step_vmap(update)


def vmap_gram(job: Job) -> Callable[[], object]:
    """Start steps by the n x n system, without a rank test: the least that explicit per-sample gradients can cost."""

    def update(u: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        K = sum(G @ G.mT for G in gradients)
        v = sum(G @ part for G, part in zip(gradients, u, strict=True))
        weights = ALPHA / len(K) + (1 - ALPHA) * torch.linalg.solve(K, v)
        return [weights @ G - (1 - ALPHA) * part for G, part in zip(gradients, u, strict=True)]

    return lambda: job.step_vmap(update)


def vmap_gram_only(job: Job) -> Callable[[], Tensor]:
    return lambda: sum(G @ G.mT for G in job.per_sample_gradients())


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    start: makes a job's step.
    reference: the contender whose result this one must equal.
    package: what must be installed.
    slow: fewer rounds are timed.
    """

    start: Callable[[Job], Callable[[], object]]
    reference: str | None = None
    package: str | None = None
    slow: bool = False


STEPS = {
    "plain": Contender(plain),
    "projgrad global": Contender(orthograd(scope="global"), "vmap + QR"),
    "projgrad two passes": Contender(orthograd(scope="global", keep_output_gradients=False), "vmap + QR"),
    "projgrad per_tensor": Contender(orthograd(scope="per_tensor"), "vmap + QR per_tensor"),
    "vmap + QR": Contender(vmap_qr, slow=True),
    "vmap + QR per_tensor": Contender(vmap_qr_per_tensor, slow=True),
    "vmap + Gram": Contender(vmap_gram, "vmap + QR", slow=True),
}
GRAMS = {
    "plain": Contender(plain_backward),
    "projgrad gram": Contender(tape_gram, "vmap + Gram"),
    "vmap + Gram": Contender(vmap_gram_only, slow=True),
    "torchjd": Contender(PEERS["torchjd"].start, "vmap + Gram", "torchjd"),
    "opacus": Contender(PEERS["opacus"].start, "vmap + Gram", "opacus", slow=True),
    "nngeometry": Contender(PEERS["nngeometry"].start, "vmap + Gram", "nngeometry", slow=True),
}


@dataclass(frozen=True)
class Case:
    """A model with `title` and n samples a batch.

    sizes, small: arguments of `build`; the small model runs first, so that code loaded once is not measured.
    rounds: how often the fast contenders are timed.
    time, memory: what a contender may need at most, in units of plain.
    more_time, more_memory: what `explicit` needs at least, in units of `ours`.
    command: the module whose `--worker` measures it.
    """

    name: str
    title: str
    n: int
    build: Callable[..., tuple[nn.Module, Batch]]
    sizes: tuple[int, ...]
    small: tuple[int, ...]
    rounds: int
    time: dict[str, float]
    memory: dict[str, float]
    more_time: float | None = None
    more_memory: float | None = None
    contenders: dict[str, Contender] = field(default_factory=lambda: STEPS)
    ours: str = "projgrad global"
    explicit: str = "vmap + QR"
    command: str = "bench.steps"

    def job(self, small: bool = False) -> Job:
        torch.manual_seed(0)
        return Job(*self.build(*(self.small if small else self.sizes)), 4 if small else self.n)


def step_targets(whole: float, per_tensor: float, memory: float, **more: float) -> dict:
    time = {"projgrad global": whole, "projgrad two passes": whole, "projgrad per_tensor": per_tensor}
    return {"time": time, "memory": {"projgrad global": memory, "projgrad per_tensor": memory}, **more}


def gram_targets(time: float, memory: float) -> dict:
    ours = "projgrad gram"
    return {
        "time": {ours: time},
        "memory": {ours: memory},
        "contenders": GRAMS,
        "ours": ours,
        "explicit": "vmap + Gram",
    }


DECODER_TARGETS = step_targets(1.4, 1.25, 1.15, more_time=2.5, more_memory=8)
MLP = {"build": mlp, "sizes": (784, 1024, 1024, 10), "small": (16, 16, 10), "rounds": 25}
CONV = {"build": conv_net, "sizes": (3, 64, 128, 256, 256), "small": (3, 8, 8), "rounds": 15}
SMALL = {"build": decoder, "sizes": (256, 4, 64, 1000), "small": (16, 1, 8, 20), "rounds": 11}
LARGE = {"build": decoder, "sizes": (512, 6, 128, 4000), "small": (16, 1, 8, 20), "rounds": 5}
ENCODER = {"build": encoder, "sizes": (256, 4, 64), "small": (16, 1, 8), "rounds": 15}
ADAPTERS = {"build": adapted_llama, "sizes": (256, 6, 64, 1000, 8), "small": (16, 1, 8, 20, 2), "rounds": 9}
ADAPTED = [
    Case(
        f"adapters-{n}",
        "LoRA r = 8 on a Llama d = 256, 6 layers, 64 tokens, vocabulary 1000",
        n,
        **ADAPTERS,
        time={},
        memory={},
    )
    for n in (4, 16, 64)
]
CASES = [
    Case("mlp", "MLP 784-1024-1024-10", 64, **MLP, **step_targets(1.5, 1.4, 1.3, more_memory=20)),
    Case("conv", "4 conv + group norm + fc, 32 x 32", 64, **CONV, **step_targets(1.4, 1.3, 1.25, more_memory=5)),
    Case("decoder-256", "decoder d = 256, 4 layers, 64 tokens, vocabulary 1000", 32, **SMALL, **DECODER_TARGETS),
    Case("decoder-512", "decoder d = 512, 6 layers, 128 tokens, vocabulary 4000", 16, **LARGE, **DECODER_TARGETS),
    Case("gram-mlp", "K alone, MLP 784-1024-1024-10", 64, **MLP, **gram_targets(1.3, 1.3)),
    Case("gram-encoder", "K alone, encoder d = 256, 4 blocks, 64 tokens", 32, **ENCODER, **gram_targets(1.35, 1.2)),
]


# On a GPU. Explicit per-sample gradients in float32, one backward pass a sample.


def _gradients(job: TokenJob, rows: list[Tensor]) -> None:
    """Write the gradient of sample j into row j of every [n, p_l]."""
    params = list(job.model.parameters())
    for j in range(job.n):
        loss = job.losses(job.samples[1][j : j + 1]).sum()
        for row, g in zip(rows, torch.autograd.grad(loss, params), strict=True):
            row[j].copy_(g.flatten())


def gram_schmidt(u: Tensor, G: Tensor) -> Tensor:
    """Return u without the span of the rows of G, which an orthonormal basis overwrites: no second matrix."""
    for j in range(len(G)):
        for _ in range(2):
            G[j] -= (G[:j] @ G[j]) @ G[:j]
        G[j] /= torch.linalg.vector_norm(G[j]).clamp_min(torch.finfo(G.dtype).tiny)
    return u - (G @ u) @ G


def explicit(project: Callable[[Tensor, Tensor], Tensor], whole: bool) -> Callable[[TokenJob], Callable[[], None]]:
    """Project tensor by tensor, as the published code does, or the whole gradient at once, as its formula reads."""

    def start(job: TokenJob) -> Callable[[], None]:
        params = list(job.model.parameters())
        sizes = [p.numel() for p in params]

        def groups() -> Iterator[tuple[list[nn.Parameter], Tensor]]:
            device = params[0].device
            if whole:
                G = torch.empty(job.n, sum(sizes), device=device)
                _gradients(job, list(G.split(sizes, 1)))
                yield params, G
                return
            rows = [torch.empty(job.n, size, device=device) for size in sizes]
            _gradients(job, rows)
            for p in params:
                yield [p], rows.pop(0)

        def step() -> None:
            job.optimizer.zero_grad()
            job.forget().backward()
            for group, G in groups():
                u = torch.cat([p.grad.flatten().float() for p in group])
                mean = G.mean(0)
                new = project(u, G).mul_(ALPHA - 1).add_(mean, alpha=ALPHA)
                for p, g in zip(group, new.split([p.numel() for p in group]), strict=True):
                    p.grad.copy_(g.view_as(p))
            job.optimizer.step()

        return step

    return start


@dataclass(frozen=True)
class TokenContender:
    """One way to step a language model.

    heavy: it holds all per-sample gradients and runs alone. graph: it needs losses of torch's own operations.
    truth: the contender whose update this one must equal.
    """

    start: Callable[[TokenJob], Callable[[], object]]
    heavy: bool = False
    graph: bool = False
    truth: str | None = None


TOKEN_STEPS = {
    "plain": TokenContender(plain),
    "projgrad global": TokenContender(orthograd(scope="global"), truth="explicit QR, global"),
    "projgrad per_tensor": TokenContender(orthograd(scope="per_tensor"), truth="explicit QR, per tensor"),
    "projgrad graph": TokenContender(graphed, graph=True, truth="explicit QR, global"),
    "explicit QR, per tensor": TokenContender(explicit(projectors.qr, whole=False), heavy=True),
    "explicit Gram-Schmidt, per tensor": TokenContender(
        explicit(gram_schmidt, whole=False), heavy=True, truth="explicit QR, per tensor"
    ),
    "explicit QR, global": TokenContender(explicit(projectors.qr, whole=True), heavy=True),
}
