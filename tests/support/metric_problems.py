"""Problems for metric="optimizer", with explicit gradients, and the optimizers that it is tried with."""

import torch
from torch import nn
from torch.nn import functional as F
from unlearners import flat_parameters

import projgrad

ALPHA, SIZES = 0.4, (1, 3, 2, 2)
EXACT = {"union_tolerance": 1e-10, "max_passes": 800}
SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "rmsprop": (RMSprop, {"lr": 0.01, "centered": True}),
    "rmsprop_momentum": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
}


class Text(nn.Module):
    """A table that is the output head as well, a packed weight used in two parts, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.packed = nn.Parameter(torch.randn(8, 4) / 2)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(9))

    def hidden(self, ids):
        a, b = self.packed.chunk(2)
        return self.norm(torch.tanh(self.frozen(self.table(ids)) @ a.T) @ b.T)

    def forward(self, ids):
        return self.hidden(ids) @ self.table.weight.T + self.bias


class Problem:
    """A model, and forget and retain samples; weights: of the retain losses."""

    def __init__(self, sizes=SIZES, dtype=torch.float64, weights=None):
        n, self.sizes = sum(sizes), sizes
        self.model = Text().to(dtype)
        self.forgotten, self.kept = torch.randint(9, (4, 6)), torch.randint(9, (n, 6))
        self.weights = torch.ones(n, dtype=dtype) if weights is None else weights.to(dtype)

    @property
    def params(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def losses(self, ids, weights=1.0):
        logits = self.model(ids)[:, :-1].transpose(1, 2)
        return weights * F.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)

    def forget(self):
        return self.losses(self.forgotten).mean()

    def retain(self):
        return self.losses(self.kept, self.weights)

    def parts(self):
        pairs = zip(self.kept.split(self.sizes), self.weights.split(self.sizes), strict=True)
        return projgrad.micro_batches(self.losses, pairs)

    def optimizer(self, name, ratio=0.3):
        """An optimizer with two parameter groups, of which one is slower."""
        make, options = OPTIMIZERS[name]
        params = self.params
        return make([{"params": params[::2], "lr": ratio * options["lr"]}, {"params": params[1::2]}], **options)

    def unlearner(self, optimizer, alpha=ALPHA, **options):
        return projgrad.OrthoGrad(self.model, optimizer, alpha, metric="optimizer", **EXACT | options)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(loss, params):
    return flat(torch.autograd.grad(loss, params, retain_graph=True)).double()


def explicit(problem):
    """u and G, of all retain samples at once."""
    params = problem.params
    return gradients(problem.forget(), params), torch.stack([gradients(loss, params) for loss in problem.retain()])


def blocks_of(params, scope):
    sizes = [p.numel() for p in params]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(0, sum(sizes))] if scope == "global" else [slice(e - s, e) for s, e in zip(sizes, ends, strict=True)]


class Wide:
    """A network whose weights are far more than the samples, with dropout if it is wanted."""

    def __init__(self, dtype=torch.float32, count=8, dropout=0.0):
        self.model = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Dropout(dropout), nn.Linear(40, 4)).to(dtype)
        self.x, self.xf = torch.randn(16 * count, 60, dtype=dtype), torch.randn(6, 60, dtype=dtype)
        self.y, self.yf = torch.randint(4, (16 * count,)), torch.randint(4, (6,))
        self.masks = []

    def losses(self, x, y):
        hidden = self.model[:3](x)
        self.masks.append(hidden.detach() != 0)
        return F.cross_entropy(self.model[3](hidden), y, reduction="none")

    def forget(self):
        return F.cross_entropy(self.model(self.xf), self.yf)

    def retain(self):
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def parts(self):
        return projgrad.micro_batches(self.losses, zip(self.x.split(16), self.y.split(16), strict=True))

    def ascent(self, make, alpha=0.0, **options):
        """With alpha = 0 and no decay the whole change forgets: return it, the record and unit retain gradients."""
        params = list(self.model.parameters())
        G = torch.stack([gradients(loss, params) for loss in self.retain()])
        before = flat(params).double()
        unlearner = projgrad.OrthoGrad(self.model, make(params), alpha, metric="optimizer", **options)
        record = unlearner.step(self.forget, self.parts())
        return flat(params).double() - before, record, G / G.norm(dim=1, keepdim=True)


class Halves(torch.optim.Optimizer):
    """p ← p - d g with d = 0.2 or 0.1 in turn; it says that d is `factor` times as much.

    It counts its steps, in its state and in its settings.
    """

    factor = 1.0

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "steps": 0})

    def scales(self, param):
        return (2 - torch.arange(param.numel()) % 2).to(param).view_as(param)

    def diagonal(self, param, state, group):
        return self.factor * group["lr"] * self.scales(param)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
                p -= group["lr"] * self.scales(p) * p.grad


def unlearner_of(model, optimizer, alpha=0.3, **options):
    return projgrad.OrthoGrad(model, optimizer, alpha, metric="optimizer", **options)


def ascent(unlearner, forget, retain):
    """With alpha = 0 and no decay the whole change is the forgetting part: return its cosine, itself and the record."""
    params = list(unlearner.model.parameters())
    G = torch.stack([gradients(loss, params) for loss in retain()])
    before = flat_parameters(unlearner.model).double()
    record = unlearner.step(forget, retain)
    moved = flat_parameters(unlearner.model).double() - before
    return (G @ moved / G.norm(dim=1) / moved.norm()).abs().max().item(), moved, record


def wide(dtype, weights=None):
    """Two of the retain samples are the same; weights: of their losses."""
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 10)).to(dtype)
    x, xf = torch.randn(8, 64, dtype=dtype), torch.randn(6, 64, dtype=dtype)
    y, yf = torch.randint(10, (8,)), torch.randint(10, (6,))
    x[2], y[2] = x[1], y[1]
    weights = torch.ones(8, dtype=dtype) if weights is None else weights
    forget = lambda: F.cross_entropy(model(xf), yf)  # noqa: E731
    return model, forget, lambda: weights * F.cross_entropy(model(x), y, reduction="none")
