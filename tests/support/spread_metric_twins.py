"""Models, optimizers and steps of one process beside those of several, for spread_metric_checks.py."""

import torch
from spread_twins import MODELS, Twins
from torch import nn
from torch.distributed.tensor import DTensor

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop


class Scaled(torch.optim.Optimizer):
    """Every element has a rate of its own."""

    factor = 1.0

    def __init__(self, groups, **options):
        super().__init__(groups, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("scale", 1 / (1 + p.detach().abs()))
                    p.sub_(self.diagonal(p, state, group) * p.grad)

    def diagonal(self, param, state, group):
        return group["lr"] * self.factor * state["scale"]


OPTIMIZERS = {
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd": (SGD, {"lr": 0.1}),
    "scaled": (Scaled, {"lr": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
}


class Lora(nn.Module):
    """A frozen layer and an adapter of rank 2."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def lora(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    model = nn.Sequential(Lora(5, 8), nn.Tanh(), Lora(8, 3)).double()
    return model, x, torch.randint(3, (n,), generator=generator)


MODELS["lora"] = lora


class Beside(nn.Module):
    """A model with adapters beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 11, bias=False)

    def forward(self, ids):
        return self.base(ids) + self.b(self.a(self.base.table(ids)))


def optimizer(name, ratio=0.3):
    """A function that makes an optimizer with two parameter groups, of which one is slower."""
    kind, options = OPTIMIZERS[name]

    def make(model):
        params = [p for p in model.parameters() if p.requires_grad]
        return kind([{"params": params[::2], "lr": ratio * options["lr"]}, {"params": params[1::2]}], **options)

    return make


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


class MetricTwins(Twins):
    """The steps of one process and of several, with all that they leave behind."""

    def __init__(self, kind, processes, spread, name="adamw", **options):
        super().__init__(kind, processes, spread, optimizer=optimizer(name), metric="optimizer", **options)

    def compare(self, steps=3, prefix="", bound=1e-8):
        record = super().compare(steps, prefix, bound)
        mine, every = dict(self.model.named_parameters()), {}
        for name, q in self.single.named_parameters():
            p, state = mine[prefix + name], self.alone.optimizer.state.get(q, {})
            assert self.unlearner.optimizer.state.get(p, {}).keys() == state.keys()
            every[name, "grad"] = p.grad, q.grad
            every |= {(name, key): (self.unlearner.optimizer.state[p][key], value) for key, value in state.items()}
        every = {key: (full(a), b) for key, (a, b) in every.items() if a is not None or b is not None}
        sizes = {kind: max(b.norm() for (_, key), (_, b) in every.items() if key == kind) for _, kind in every}
        for (name, key), (a, b) in every.items():  # what a projection leaves of a short tensor is its rounding
            assert (a - b).norm() <= bound * b.norm() + 1e-13 * sizes[key], (name, key)
        return record
