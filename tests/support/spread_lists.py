"""Models in shards and copies with lists of closures, beside one process that has all samples in one batch."""

import copy

import torch
from spread_twins import MODELS, Tied, assert_same, assert_same_bits, build, losses, sgd, shard
from torch import nn

import projgrad

TOLERANCE = 1e-10  # in float64: what is reached is compared at 1e-8
EQUAL = {2: ((1, 1), (1, 2))}  # samples in the micro-batches of every process
UNEQUAL = {2: ((1, 1, 1), (2,)), 4: ((1, 2), (0, 1), (1,), (1,))}
NONE = {2: ((1, 1, 2), (0,))}


class Wide(Tied):
    """With a table of 528 elements, more than are projected exactly, and a norm of 96."""

    def __init__(self):
        nn.Module.__init__(self)
        self.table, self.frozen, self.norm = nn.Embedding(11, 48), nn.Linear(48, 48), nn.LayerNorm(48)
        self.frozen.requires_grad_(False)


def wide(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (n, 4), generator=generator)
    return Wide().double(), ids, ids.roll(1, 1)


MODELS["wide"] = wide


def two_rates(model):
    first, *rest = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": rest}], lr=0.1)


class Lists:
    """One model in one process, and copies over several: the former steps on one batch, the others on micro-batches.

    sizes: of the micro-batches of every process. per_sample: whether forget closures return losses of samples.
    """

    def __init__(self, kind, processes, spreads, sizes, optimizer=sgd, per_sample=False, single=None, **options):
        self.processes, self.sizes, self.per_sample = processes, sizes[processes.size], per_sample
        counts, self.options = [sum(some) for some in self.sizes], options
        built, self.x, self.y = build(kind, sum(counts))
        self.single = single or built
        _, self.fx, self.fy = build(kind, 4 * processes.size, seed=2)
        self.models = [spread(copy.deepcopy(self.single)) for spread in spreads]
        self.alone = projgrad.OrthoGrad(self.single, optimizer(self.single), **options)
        options = options | {"union_tolerance": TOLERANCE}
        self.unlearners = [projgrad.OrthoGrad(model, optimizer(model), **options) for model in self.models]
        self.pieces = self.sizes[processes.rank]
        self.batches = list(zip(*(processes.part(z, counts).split(self.pieces) for z in (self.x, self.y)), strict=True))
        fours = (4,) * processes.size
        self.forgets = list(zip(*(processes.part(z, fours).split(2) for z in (self.fx, self.fy)), strict=True))

    def closures(self, model):
        def retain(x, y):
            return losses(model, x, y) if len(x) else losses(model, self.fx[:1], self.fy[:1])[:0]

        def forget(x, y):
            return losses(model, x, y) if self.per_sample else losses(model, x, y).mean()

        return projgrad.micro_batches(forget, self.forgets), projgrad.micro_batches(retain, self.batches)

    def compare(self, steps=2, prefixes=("",)):
        for _ in range(steps):
            expected = self.alone.step(
                lambda: losses(self.single, self.fx, self.fy).mean(), lambda: losses(self.single, self.x, self.y)
            )
            for model, unlearner in zip(self.models, self.unlearners, strict=True):
                record = unlearner.step(*self.closures(model))
                assert record.micro_batches == sum(map(len, self.sizes)) and record.residual <= TOLERANCE
                for name in ("preserved_norm", "forget_loss", "retain_loss"):
                    assert abs(getattr(record, name) - getattr(expected, name)) <= 1e-8, name
        for model, prefix in zip(self.models, prefixes, strict=True):
            assert_same(model, self.single, 1e-8, prefix)
            assert_same_bits(model, self.processes)
        return record


def sharded(processes, **options):
    return lambda model: shard(model, processes.mesh, **options)
