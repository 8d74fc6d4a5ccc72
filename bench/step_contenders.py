"""Who is compared on which model by `bench.steps`."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import projgrad
from projgrad import projectors

ALPHA = 0.5
LEARNING_RATE = 1e-4  # small: all contenders stay near the weights they start from


Batch = Callable[[int], tuple[Tensor, Tensor]]


def labelled(*shape: int) -> Batch:
    return lambda n: (torch.randn(n, *shape), torch.randint(10, (n,)))


def text(tokens: int, vocabulary: int) -> Batch:
    return lambda n: torch.randint(vocabulary, (2, n, tokens)).unbind()


def mlp(*widths: int) -> tuple[nn.Module, Batch]:
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), labelled(widths[0])


def conv_net(*channels: int) -> tuple[nn.Module, Batch]:
    """On 32 x 32 images: 3 x 3 convolution, group norm, ReLU and pooling to half the size, layer by layer."""
    layers = []
    for i, o in itertools.pairwise(channels):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(8, o), nn.ReLU(), nn.MaxPool2d(2)]
    size = 32 >> len(channels) - 1
    head = nn.Linear(channels[-1] * size**2, 10)
    return nn.Sequential(*layers, nn.Flatten(), head), labelled(channels[0], 32, 32)


def decoder(d: int, layers: int, tokens: int, vocabulary: int) -> tuple[nn.Module, Batch]:
    return Decoder(d, layers, tokens, vocabulary), text(tokens, vocabulary)


def encoder(d: int, layers: int, tokens: int) -> tuple[nn.Module, Batch]:
    return Encoder(d, layers), labelled(tokens, d)


class Block(nn.Module):
    """Pre-norm transformer block with heads of 64."""

    def __init__(self, d: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = max(1, d // 64), causal
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, -2).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [n, heads, t, d / heads]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """GPT-style: learned positions, head not tied to the embedding."""

    def __init__(self, d: int, layers: int, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(tokens, d)
        self.blocks = nn.Sequential(*(Block(d, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.position(positions))))


class Encoder(nn.Module):
    """Full attention over a sequence of vectors, and a classifier of their mean."""

    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(d, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)).mean(1))


class Job:
    """A model with its optimizer, and two batches of n samples."""

    def __init__(self, model: nn.Module, batch: Batch, n: int) -> None:
        self.model, self.samples = model, (batch(n), batch(n))
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    @staticmethod
    def losses(logits: Tensor, y: Tensor) -> Tensor:
        """(n,): cross-entropy, over a sequence its mean."""
        losses = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
        return losses.view(len(y), -1).mean(1)

    def forget(self) -> Tensor:
        x, y = self.samples[0]
        return self.losses(self.model(x), y).mean()

    def retain(self) -> Tensor:
        x, y = self.samples[1]
        return self.losses(self.model(x), y)

    def per_sample_gradients(self) -> list[Tensor]:
        """vmap(grad) of the retain losses: one tensor (n, p_l) per parameter."""

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.losses(functional_call(self.model, params, (x[None],)), y[None])[0]

        params = {name: p.detach() for name, p in self.model.named_parameters()}
        return [g.flatten(1) for g in vmap(grad(loss), (None, 0, 0))(params, *self.samples[1]).values()]

    def step_vmap(self, update: Callable[[list[Tensor], list[Tensor]], list[Tensor]]) -> None:
        """A step whose gradient `update` makes of the forget gradient and the per-sample gradients."""
        self.optimizer.zero_grad()
        self.forget().backward()
        params = list(self.model.parameters())
        new = update([p.grad.flatten() for p in params], self.per_sample_gradients())
        for p, g in zip(params, new, strict=True):
            p.grad = g.view_as(p)
        self.optimizer.step()


def plain(job: Job) -> Callable[[], object]:
    """The same step without projection."""

    def step() -> None:
        job.optimizer.zero_grad()
        (-(1 - ALPHA) * job.forget()).backward()
        (ALPHA * job.retain().mean()).backward()
        job.optimizer.step()

    return step


def orthograd(**options: object) -> Callable[[Job], Callable[[], object]]:
    def start(job: Job) -> Callable[[], object]:
        unlearner = projgrad.OrthoGrad(job.model, job.optimizer, alpha=ALPHA, **options)
        return lambda: unlearner.step(job.forget, job.retain)

    return start


def vmap_qr(job: Job) -> Callable[[], object]:
    """QR of all per-sample gradients at once, as the paper's formula reads and as one would write it down."""

    def update(u: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        G = torch.cat(gradients, 1)
        new = ALPHA * G.mean(0) - (1 - ALPHA) * projectors.qr(torch.cat(u), G)
        return list(new.split([len(some) for some in u]))

    return lambda: job.step_vmap(update)


def vmap_qr_per_tensor(job: Job) -> Callable[[], object]:
    """QR of every tensor's per-sample gradients, as the published code computes it."""

    def update(u: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        pairs = zip(u, gradients, strict=True)
        return [ALPHA * G.mean(0) - (1 - ALPHA) * projectors.qr(some, G) for some, G in pairs]

    return lambda: job.step_vmap(update)


def vmap_gram(job: Job) -> Callable[[], object]:
    """The n x n system, without a rank test: the least that explicit per-sample gradients can cost."""

    def update(u: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        K = sum(G @ G.mT for G in gradients)
        v = sum(G @ some for G, some in zip(gradients, u, strict=True))
        weights = ALPHA / len(K) + (1 - ALPHA) * torch.linalg.solve(K, v)
        return [weights @ G - (1 - ALPHA) * some for G, some in zip(gradients, u, strict=True)]

    return lambda: job.step_vmap(update)


def plain_backward(job: Job) -> Callable[[], object]:
    def step() -> None:
        job.optimizer.zero_grad()
        job.retain().mean().backward()

    return step


def tape_gram(job: Job) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with projgrad.per_sample(job.model) as tape:
            losses = job.retain()
        return tape.gram(losses)

    return step


def vmap_gram_only(job: Job) -> Callable[[], Tensor]:
    return lambda: sum(G @ G.mT for G in job.per_sample_gradients())


def torchjd_gram(job: Job) -> Callable[[], Tensor]:
    from torchjd.autogram import Engine

    engine = Engine(job.model, batch_dim=0)
    return lambda: engine.compute_gramian(job.retain())


def opacus_gram(job: Job) -> Callable[[], Tensor]:
    from opacus import GradSampleModule

    job.model = GradSampleModule(job.model, loss_reduction="sum")

    def step() -> Tensor:
        job.model.zero_grad()
        job.retain().sum().backward()
        return sum(G @ G.mT for G in (p.grad_sample.flatten(1) for p in job.model.parameters()))

    return step


def nngeometry_gram(job: Job) -> Callable[[], Tensor]:
    from nngeometry.gram import GramMatrix

    batch = torch.utils.data.TensorDataset(*job.samples[1])
    loader = torch.utils.data.DataLoader(batch, batch_size=len(batch))

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return job.losses(job.model(x), y)[:, None]

    return lambda: GramMatrix(job.model, loader, losses).data[0, :, 0]


@dataclass(frozen=True)
class Contender:
    """`start` makes a job's step. The result must equal that of the contender named `reference`; `package` is needed;
    `slow`: fewer rounds are timed."""

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
    "torchjd": Contender(torchjd_gram, "vmap + Gram", "torchjd"),
    "opacus": Contender(opacus_gram, "vmap + Gram", "opacus", slow=True),
    "nngeometry": Contender(nngeometry_gram, "vmap + Gram", "nngeometry", slow=True),
}


@dataclass(frozen=True)
class Case:
    """`title` and n samples a batch.

    sizes, small: what `build` is called with; the small model runs first, so that code loaded once is not measured.
    rounds: how often the fast contenders are timed.
    time, memory: what a contender may need at most, in units of plain.
    more_time, more_memory: what `explicit` needs at least, in units of `ours`.
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
CASES = [
    Case("mlp", "MLP 784-1024-1024-10", 64, **MLP, **step_targets(1.5, 1.4, 1.3, more_memory=20)),
    Case("conv", "4 conv + group norm + fc, 32 x 32", 64, **CONV, **step_targets(1.4, 1.3, 1.25, more_memory=5)),
    Case("decoder-256", "decoder d = 256, 4 layers, 64 tokens, vocabulary 1000", 32, **SMALL, **DECODER_TARGETS),
    Case("decoder-512", "decoder d = 512, 6 layers, 128 tokens, vocabulary 4000", 16, **LARGE, **DECODER_TARGETS),
    Case("gram-mlp", "K alone, MLP 784-1024-1024-10", 64, **MLP, **gram_targets(1.3, 1.3)),
    Case("gram-encoder", "K alone, encoder d = 256, 4 blocks, 64 tokens", 32, **ENCODER, **gram_targets(1.35, 1.2)),
]
