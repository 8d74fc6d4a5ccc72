"""Models spread over processes beside the same in one process: what all `spread_*_checks.py` are made of."""

import contextlib
import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from zoo import ZOO

import projgrad

COUNTS = {2: (3, 2), 3: (1, 2, 1), 4: (3, 0, 1, 2)}  # retain samples of every process


@dataclass(frozen=True)
class Processes:
    """Those that take part: a mesh, this one's rank, and how many there are."""

    mesh: DeviceMesh

    @property
    def group(self):
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    def part(self, x: torch.Tensor, counts=None, dim: int = 0) -> torch.Tensor:
        """This process's share of samples."""
        counts = counts or COUNTS[self.size]
        return x.narrow(dim, sum(counts[: self.rank]), counts[self.rank])


class Tied(nn.Module):
    """Tokens in, tokens out by the same table, and a part that is frozen in between."""

    def __init__(self):
        super().__init__()
        self.table, self.frozen, self.norm = nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        return F.linear(self.norm(torch.tanh(self.frozen(self.table(ids)))), self.table.weight)


def tied(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (n, 4), generator=generator)
    return Tied().double(), ids, ids.roll(1, 1)


def convolutions(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return nn.Sequential(*layers).double(), x, torch.randint(3, (n,), generator=generator)


def adapted(n, seed):
    """A decoder with adapters: GPT-2, in which LoRA lies beside transposed weights."""
    case = ZOO["lora_gpt2"]()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = case.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (n, 5), generator=generator)
    return case.model, ids, ids


MODELS = {"tied": tied, "convolutions": convolutions, "adapted": adapted}


def losses(model, x, y):
    out = model(x)
    out = getattr(out, "logits", out)
    if out.ndim == 2:
        return F.cross_entropy(out, y, reduction="none")
    return F.cross_entropy(out.mT, y, reduction="none").mean(1)


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def build(kind, n, seed=1):
    torch.manual_seed(0)
    return MODELS[kind](n, seed)


def shard(model, mesh, **options):
    """fully_shard, block by block; a table that is used twice stays with the root."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for module in [m for some in lists for m in some] or model.children():
        if not isinstance(module, nn.Embedding) and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model):
    """A copy of all weights, by name."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in parameters.items()}


def assert_same(model, single, bound=1e-8, prefix=""):
    found = whole(model)
    for name, p in single.named_parameters():
        error = (found[prefix + name] - p.detach()).norm() / p.detach().norm()
        assert error <= bound, (name, float(error))


def assert_same_bits(model, processes):
    """The weights are the same everywhere, bit by bit."""
    for name, p in whole(model).items():
        bits = p.contiguous().flatten().view(torch.uint8)
        every = [torch.empty_like(bits) for _ in range(processes.size)]
        dist.all_gather(every, bits, group=processes.group)
        assert all(torch.equal(bits, other) for other in every), name


class Twins:
    """One model in one process, and the same spread over several: steps of both on the same samples."""

    def __init__(self, kind, processes, spread, **options):
        self.processes, counts = processes, COUNTS[processes.size]
        self.single, self.x, self.y = build(kind, sum(counts))
        _, self.fx, self.fy = build(kind, 2 * processes.size, seed=2)
        self.model = spread(copy.deepcopy(self.single))
        self.group = options.pop("process_group", None)
        make_optimizer = options.pop("optimizer", sgd)
        self.alone = projgrad.OrthoGrad(self.single, make_optimizer(self.single), **options)
        self.unlearner = projgrad.OrthoGrad(self.model, make_optimizer(self.model), process_group=self.group, **options)

    def step_alone(self):
        forget = lambda: losses(self.single, self.fx, self.fy).mean()  # noqa: E731
        return self.alone.step(forget, lambda: losses(self.single, self.x, self.y))

    def closures(self, model=None):
        model, part = model or self.model, self.processes.part
        twice = (2,) * self.processes.size
        fx, fy, x, y = part(self.fx, twice), part(self.fy, twice), part(self.x), part(self.y)
        if not len(x):  # not every model takes an empty batch
            return dict(forget=lambda: losses(model, fx, fy).mean(), retain=lambda: losses(model, fx, fy)[:0])
        return dict(forget=lambda: losses(model, fx, fy).mean(), retain=lambda: losses(model, x, y))

    def compare(self, steps=2, prefix="", bound=1e-8):
        for _ in range(steps):
            expected, record = self.step_alone(), self.unlearner.step(**self.closures())
            assert record.rank == expected.rank and record.residual <= max(1e-12, expected.residual * 10)
            numbers = ("preserved_norm", "forget_loss", "retain_loss")
            for name in numbers:
                assert abs(getattr(record, name) - getattr(expected, name)) <= 1e-8, name
        assert_same(self.model, self.single, bound, prefix)
        assert_same_bits(self.model, self.processes)
        return record


def replicated(processes, **options):
    return lambda model: DistributedDataParallel(model, process_group=processes.group, **options)


class Uneven(nn.Module):
    """A model of which every process uses other parts: a weight or some of its columns, other rows, other lengths."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(9, 6))
        self.extra, self.convolution = nn.Linear(6, 6), nn.Conv1d(1, 2, 3, padding=1)

    def losses(self, x, rank):
        """Of samples [n, t, 6] of a process."""
        h = x @ self.table[torch.tensor([rank, 8 - rank, 4])].mT  # [n, t, 3]
        h = F.linear(x, self.weight) if rank % 2 else h @ self.weight[:, :3].mT
        h = self.extra(h) if rank == 0 else h
        h = self.convolution(torch.tanh(h).flatten(0, 1)[:, None]).unflatten(0, h.shape[:2])
        return h.square().sum((1, 2, 3))

    def forgotten(self, x):
        return self.losses(x, 1).mean() - self.losses(x, 0).sum()


@contextlib.contextmanager
def raises(kind, words):
    try:
        yield
    except kind as error:
        assert words in str(error), str(error)
        return
    raise AssertionError(f"nothing was raised where {words!r} was expected")
