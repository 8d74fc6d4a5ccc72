"""The projection on the union of micro-batches, on models of several kinds and on a pretend GPU."""

import copy

import pytest
import torch
from pretend import Gpu, Pretend, to_device
from torch import nn
from torch.nn import functional as F

import projgrad
from projgrad.tape import union
from projgrad.tape.convergence import Convergence

SIZES = (3, 2, 4)
VOCABULARY, T = 11, 5


class Decoder(nn.Module):
    """A tied table, a norm, a layer that is used twice and one that only some samples reach."""

    def __init__(self, d=12):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCABULARY, d), nn.LayerNorm(d)
        self.mix, self.rare = nn.Linear(d, d), nn.Linear(d, d)
        self.head = nn.Linear(d, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, rare=False):
        x = self.norm(self.tokens(ids))
        x = x + self.mix(torch.tanh(self.mix(x)))
        return self.head(self.rare(x) if rare else x)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
        self.norm, self.last = nn.GroupNorm(2, 6), nn.Linear(18, VOCABULARY)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh().flatten(1))


def language(rare=()):
    """A model, forget, retain closures, and the losses of all micro-batches in one; some reach a rare layer."""
    model, ids = Decoder().double(), torch.randint(VOCABULARY, (sum(SIZES), T))
    forget_ids = torch.randint(VOCABULARY, (4, T))

    def losses(ids, rare=False):
        return F.cross_entropy(model(ids, rare)[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    batches = [(part, k in rare) for k, part in enumerate(ids.split(SIZES))]
    parts = projgrad.micro_batches(losses, batches)
    return model, lambda: losses(forget_ids).mean(), parts, lambda: torch.cat([losses(*batch) for batch in batches])


def vision():
    model, x = Convolutions().double(), torch.randn(sum(SIZES), 4, 5, dtype=torch.float64)
    y, xf = torch.randint(VOCABULARY, (sum(SIZES),)), torch.randn(4, 4, 5, dtype=torch.float64)
    losses = lambda x, y: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    parts = projgrad.micro_batches(losses, zip(x.split(SIZES), y.split(SIZES), strict=True))
    return model, lambda: losses(xf, y[:4]).mean(), parts, lambda: losses(x, y)


def updates(model, forget, *retains, **options):
    """`.grad` after a step with each retain side, from the same weights."""
    params, found = [p for p in model.parameters() if p.requires_grad], []
    for retain in retains:
        unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(params, lr=0.0), 0.3, **options)
        unlearner.step(forget, retain)
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    return found


@pytest.mark.parametrize("small", [0, 512])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("make", [language, lambda: language(rare=(1,)), vision], ids=["tied", "rare", "vision"])
def test_models_of_several_kinds(make, scope, small, monkeypatch):
    monkeypatch.setattr(union, "SMALL", small)
    model, forget, parts, whole = make()
    options = {"scope": scope, "union_tolerance": 1e-9, "max_passes": 500}
    for found, expected in zip(*updates(model, forget, parts, whole, **options), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_a_weight_that_nothing_uses_has_no_gradient():
    """Weight decay would move it."""
    model, forget, parts, _ = language()
    projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)).step(forget, parts)
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["rare.weight", "rare.bias"]


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_a_pretend_gpu_gives_the_numbers_of_the_cpu(scope, monkeypatch):
    monkeypatch.setattr(union, "SMALL", 100)
    model, ids = Decoder().double(), torch.randint(VOCABULARY, (13, T))

    def step(model, ids):
        losses = lambda ids: F.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)  # noqa: E731
        retain = projgrad.micro_batches(losses, [ids[4:8], ids[8:]])
        unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.3, scope=scope)
        return unlearner.step([lambda: losses(ids[:2]), lambda: losses(ids[2:4]).exp()], retain)

    twin = copy.deepcopy(model)
    record = step(model, ids)
    with Gpu():
        again = step(to_device(twin), Pretend(ids))
        found = {name: p.detach().inner for name, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-7, atol=1e-8)
    assert again.iterations == record.iterations and again.residual <= 1e-4


def iterated(K, v):
    """Conjugate gradients on K x = v: their numbers, the squared distance after each, and ‖r‖² of a u of length 1."""
    convergence, x, r, p = Convergence(), torch.zeros_like(v), v, torch.zeros_like(v)
    exact, distances, sizes = torch.linalg.solve(K, v), [], []
    u2 = 2 * v @ exact  # half of u is in the span
    for _ in range(len(v)):
        rho = (r @ r)[None]
        p = r + convergence.next_beta(rho) * p
        step = rho / (p @ K @ p)
        x, r = x + step * p, r - step * (K @ p)
        convergence.add(step, step * rho)
        distances.append(float((exact - x) @ K @ (exact - x)))
        sizes.append(u2 / 2 + distances[-1])
        floor = torch.zeros(1).double()
        yield convergence.left(sizes[-1][None], floor).item(), distances[-1], convergence
        if distances[-1] < 1e-14 * u2:
            return


@pytest.mark.parametrize("smallest", [0.5, 1e-2, 1e-4])
def test_the_estimate_of_the_distance_holds_on_plateaus_too(smallest):
    """Eigenvalues in two clusters: gains fall, and rise again when the second one is reached."""
    Q = torch.linalg.qr(torch.randn(40, 40).double()).Q
    values = torch.cat([torch.linspace(1, 2, 30), smallest * torch.linspace(1, 2, 10)]).double()
    K = Q * values @ Q.mT
    v = K @ torch.randn(40).double()
    estimates = list(iterated(K, v))
    late = [(estimate, distance) for estimate, distance, _ in estimates[8:] if distance > 1e-12]
    assert late and all(estimate > distance / 16 for estimate, distance in late)  # a factor of 4 of the length
    *_, (_, _, convergence) = estimates
    assert convergence.smallest_eigenvalue().item() == pytest.approx(smallest, rel=0.05)


def test_a_system_that_has_ended_has_nothing_left():
    convergence, one = Convergence(), torch.ones(2).double()
    for k in range(6):
        rho = torch.tensor([0.5**k, 0.25 if k < 2 else 0.0]).double()
        convergence.next_beta(rho)
        convergence.add(torch.tensor([0.7, 0.9 if k < 2 else 0.0]).double(), rho)
    left = convergence.left(one, 0 * one)
    assert 0 < left[0] <= 1 and left[1] == 0 and convergence.smallest_eigenvalue().isfinite().all()
