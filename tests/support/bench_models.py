"""Functions that return a model, a forget and a retain closure for `projgrad bench`: most of them wrong ones."""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def own(model=None, forget=None, retain=None, *more):
    model = model or nn.Linear(3, 4)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    forget = forget or (lambda: cross_entropy(model(-x), y))
    retain = retain or (lambda x=x: cross_entropy(model(x), y, reduction="none"))  # a default is no slice of samples
    return model, forget, retain, *more


def duplicates():
    """Two retain samples twice: the Gram matrix is singular."""
    model = nn.Linear(3, 4)
    x, y = torch.randn(2, 3).repeat(2, 1), torch.tensor([0, 1, 0, 1])
    return model, lambda: cross_entropy(model(-x), y), lambda: cross_entropy(model(x), y, reduction="none")


def dropout():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 4))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    return model, lambda: cross_entropy(model(-x), y), lambda: cross_entropy(model(x), y, reduction="none")


def draws():
    """Another batch at each call, without random numbers."""
    model, x, k = nn.Linear(3, 4), torch.randn(64, 3), [0]

    def retain():
        k[0] += 1
        return model(x[k[0] : k[0] + 4]).sum(1)

    return own(model, retain=retain)


def adamax():
    model = nn.Linear(3, 4)
    return own(model, None, None, torch.optim.Adamax(model.parameters(), 0.01))


def raises():
    raise ValueError("no data\nin two lines")


def vector():
    model = nn.Linear(3, 4)
    return own(model, forget=lambda: model(torch.randn(4, 3)).sum(1))


def scalar():
    model = nn.Linear(3, 4)
    return own(model, retain=lambda: model(torch.randn(4, 3)).sum())


def one():
    model = nn.Linear(3, 4)
    return own(model, retain=lambda: model(torch.randn(1, 3)).sum(1))


def two_values():
    return own()[:2]


def lists():
    return own(retain=[own()[2]])


def meta():
    return own(nn.Linear(3, 4, device="meta"))


def split():
    return own(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, device="meta")))


def constant():
    return own(retain=lambda: torch.zeros(4))


def foreign():
    return own(None, None, None, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))


def no_part():
    model, x = nn.Linear(3, 4), torch.randn(4, 3)
    return own(model, retain=lambda part=None: model(x).sum(1))


def nan(at=0):
    model, x = nn.Linear(3, 4), torch.randn(4, 3)
    x[at] = float("nan")
    return own(model, retain=lambda part=slice(None): model(x[part]).sum(1))


def batch_norm():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(4, 3)
    return own(model, retain=lambda part=slice(None): model(x[part]).sum(1))


def frozen():
    return own(nn.Linear(3, 4).requires_grad_(False))


def needs(k, n=4):
    return own()


def leaves():
    sys.exit(0)
