"""Unlearners of every kind on a small problem that can be put into any state."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import projgrad

F64 = torch.float64


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def nesterov(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def orthograd(**options):
    return lambda model, optimizer: projgrad.OrthoGrad(model, optimizer, alpha=0.3, **options)


def feasible(**options):
    return lambda model, optimizer: projgrad.FeasibleUpdates(model, optimizer, delta=0.5, **options)


def masked(model, optimizer):
    return projgrad.FeasibleUpdates(model, orthograd()(model, optimizer), delta=0.5)


def pgu(model, optimizer):
    return projgrad.PGU(model, optimizer, gamma=0.5)


# name -> optimizer, unlearner, number of closures on each side
SETUPS = {
    "global": (sgd, orthograd(), 1),
    "per_tensor": (sgd, orthograd(scope="per_tensor", max_norm=0.5), 1),
    "adamw": (adamw, orthograd(), 1),
    "two_passes": (nesterov, orthograd(keep_output_gradients=False), 1),
    "parts": (sgd, orthograd(union_tolerance=1e-10), 2),
    "metric": (adamw, orthograd(metric="optimizer"), 1),
    "metric_nesterov": (nesterov, orthograd(metric="optimizer", scope="per_tensor", max_norm=2.0), 1),
    "metric_parts": (adamw, orthograd(metric="optimizer", union_tolerance=1e-10), 3),
    "feasible": (nesterov, feasible(), 1),
    "aggregate": (adamw, feasible(test="aggregate"), 1),
    "masked": (sgd, masked, 1),
    "pgu": (sgd, pgu, 1),
}


class Hooked(Exception):
    """What a hook of a test raises."""


class Break(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        raise ctx.error


class Subject:
    """A model, its optimizer, an unlearner, and data of which the first `size` samples count."""

    def __init__(self, name, seed=0):
        make, self.make_unlearner, self.parts = SETUPS[name]
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=generator)  # noqa: E731
        self.name, self.size, self.make_optimizer = name, 6, make
        self.model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
        for p in self.model.parameters():
            p.data = draw(*p.shape)
        self.x, self.xf = draw(12, 5), draw(12, 5)
        self.y, self.yf = (torch.randint(3, (12,), generator=generator) for _ in range(2))
        self.fault = None  # stage, and what is raised
        self.rebuild(make(self.model.parameters()))

    def rebuild(self, optimizer=None):
        """Make a new unlearner, and take over what PGU has fitted."""
        cache = getattr(getattr(self, "unlearner", None), "cache", None)
        self.optimizer = optimizer or self.optimizer
        self.unlearner = self.make_unlearner(self.model, self.optimizer)
        if self.name == "pgu":
            self.unlearner.fit([self.x, self.xf]) if cache is None else self.unlearner._adopt(cache)

    @property
    def params(self):
        return list(self.model.parameters())

    def _raise(self, stage):
        if self.fault is not None and self.fault[0] == stage:
            raise self.fault[1]

    def _loss(self, side, x, y):
        self._raise(f"{side}: before the forward pass")
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        self._raise(f"{side}: after the forward pass")
        stage = None if self.fault is None else self.fault[0]
        if stage == f"{side}: NaN":
            losses = losses * torch.tensor([*[1.0] * (len(losses) - 1), torch.nan], dtype=F64)
        if stage == f"{side}: NaN in a gradient":
            losses = losses + (0 * self.model[3].weight.sum()).sqrt()
        if stage == f"{side}: in the backward pass":
            losses = Break.apply(losses, self.fault[1])
        if stage == f"{side}: wrong shape":
            losses = losses[:, None].expand(-1, 2)
        if side == "forget" and stage != "forget: wrong shape":
            return losses.mean()
        return losses

    def closures(self):
        """Of the forget and of the retain side; the last one of several has the fault."""

        def some(side, x, y):
            def closure(k, a, b):
                fault, self.fault = self.fault, self.fault if k == self.parts - 1 else None
                try:
                    return self._loss(side, a, b)
                finally:
                    self.fault = fault

            cut = range(self.parts)
            both = [(k, x[k :: self.parts], y[k :: self.parts]) for k in cut]
            made = [lambda k=k, a=a, b=b: closure(k, a, b) for k, a, b in both]
            return made[0] if self.parts == 1 else made

        n = self.size
        return some("forget", self.xf[:n], self.yf[:n]), some("retain", self.x[:n], self.y[:n])

    def step(self):
        if self.name == "pgu":
            return self.unlearner.step(self.closures()[0])
        return self.unlearner.step(*self.closures())

    def failing(self, stage, error):
        """One step with a fault; the error that came of it, None if there was none."""
        self.fault = stage, error
        hooks = []

        def hook(*_):
            raise error

        if stage == "a hook of a module":
            hooks.append(self.model[2].register_forward_hook(hook))
        if stage == "a hook before the optimizer's step":
            hooks.append(self.optimizer.register_step_pre_hook(hook))
        if stage == "a hook after the optimizer's step":
            hooks.append(self.optimizer.register_step_post_hook(hook))
        try:
            self.step()
        except BaseException as raised:
            return raised
        finally:
            self.fault = None
            for one in hooks:
                one.remove()

    def backward(self):
        """The two halves of a step, where the unlearner has them."""
        record = self.unlearner.backward(*self.closures())
        self.optimizer.step()
        return record

    def by_hand(self):
        """A plain step that has nothing to do with unlearning."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def resume(self):
        """Go on from state_dicts, with new objects."""
        saved = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        flags = [p.requires_grad for p in self.params]
        self.model = copy.deepcopy(self.model)
        self.model.load_state_dict(saved[0])
        for p, flag in zip(self.params, flags, strict=True):
            p.requires_grad_(flag)
        optimizer = self.make_optimizer(self.model.parameters())
        optimizer.load_state_dict(saved[1])
        self.rebuild(optimizer)
