"""All methods on one small problem, for tests of what their steps have in common."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import projgrad
from projgrad.methods.baselines import SCRUB, NegGradPlus, PCGrad, SalUn

N = 6
DOUBLE = {"dtype": torch.float64}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def orthograd(**options):
    return lambda model, forget: projgrad.OrthoGrad(model, sgd(model), alpha=0.3, **options)


METHODS = {
    "orthograd": orthograd(),
    "per_tensor": orthograd(scope="per_tensor"),
    "two_passes": orthograd(keep_output_gradients=False),
    "projector": orthograd(projector=projgrad.projectors.lstsq),
    "feasible": lambda model, forget: projgrad.FeasibleUpdates(model, sgd(model), delta=0.5),
    "feasible_orthograd": lambda model, forget: projgrad.FeasibleUpdates(model, orthograd()(model, forget), delta=0.5),
    "neggrad": lambda model, forget: NegGradPlus(model, sgd(model), 0.3),
    "pcgrad": lambda model, forget: PCGrad(model, sgd(model), 0.3),
    "salun": lambda model, forget: SalUn(model, sgd(model), forget),
    "scrub": lambda model, forget: SCRUB(model, sgd(model), 1),
}
TAPED = list(METHODS)[:6]
ONE_STEP = [name for name in METHODS if name != "scrub"]  # both gradients belong to the same weights


def classifier(dtype=torch.float64):
    """Return a model, its forget loss and its retain losses; both take another model as well."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    data = {"x": torch.randn(N, 5), "xf": torch.randn(4, 5)}
    x, xf = (t.to(dtype) for t in data.values())
    y, yf = torch.randint(3, (N,)), torch.randint(3, (4,))
    forget = lambda model=model: F.cross_entropy(model(xf), yf)  # noqa: E731
    retain = lambda model=model: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    return model, forget, retain


def flat_parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Problem:
    """A model, both closures, and what a step of a method makes of its weights."""

    def __init__(self, depth=2):
        layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)] if depth == 2 else [nn.Linear(5, 3)]
        self.model = nn.Sequential(*layers).double()
        self.x, self.xf = torch.randn(N, 5, **DOUBLE), torch.randn(4, 5, **DOUBLE)
        self.y, self.yf = torch.randint(3, (N,)), torch.randint(3, (4,))
        self.state = copy.deepcopy(self.model.state_dict())

    def forget(self):
        return F.cross_entropy(self.model(self.xf), self.yf)

    def retain(self, x=None):
        return F.cross_entropy(self.model(self.x if x is None else x), self.y, reduction="none")

    def parameters(self):
        return flat_parameters(self.model)

    def after(self, name, forget=None, retain=None):
        """The weights after one step from the same start; the closures get the optimizer."""
        self.model.load_state_dict(self.state)
        method = METHODS[name](self.model, self.forget)
        method.step(
            self.forget if forget is None else lambda: forget(method.optimizer),
            self.retain if retain is None else lambda: retain(method.optimizer),
        )
        return self.parameters()
