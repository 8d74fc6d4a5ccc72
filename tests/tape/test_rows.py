"""Per-sample gradients in full, against one backward pass of the same graph for every loss."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import projgrad

N = 7


def truth(losses, params):
    grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
    return [
        torch.stack([torch.zeros_like(p) if g is None else g for g in column])
        for column, p in zip(zip(*grads, strict=True), params, strict=True)
    ]


def check(model, closure):
    """The rows are those of the closure's own graph."""
    with projgrad.per_sample(model) as tape:
        losses = closure()
    params = dict(model.named_parameters())
    expected = truth(losses, list(params.values()))
    G = tape.rows(losses)
    assert list(G) == list(params)
    for g, wanted in zip(G.values(), expected, strict=True):
        torch.testing.assert_close(g, wanted)
    return G


class Scaled(nn.Module):
    """A parameter without dimensions, an empty one, a shared one."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.ones(0))
        self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.scale * self.third(self.second(self.first(x))) + self.empty.sum()


class NeedsABatch(nn.Linear):
    """Refuses a batch of one; its samples are independent all the same."""

    def forward(self, x):
        if len(x) == 1:
            raise ValueError("expected more than one sample")
        return super().forward(x)


class Remembers(nn.Module):
    """Keeps features and a running value."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        self.features = x
        return self.layer(x)


class Routed(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return torch.stack([self.a(row) if row.sum() > 0 else self.b(row) for row in x])


class Clamped(nn.Linear):
    """Changes its weight in the forward pass."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x).tanh()


MODELS = {
    "scaled": Scaled,
    "needs_a_batch": lambda: NeedsABatch(6, 4),
    "remembers": Remembers,
    "routed": Routed,
    "clamped": lambda: nn.Sequential(Clamped(6, 4), Clamped(4, 4)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=1), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(36, 4)
    ),
}


@pytest.mark.filterwarnings("ignore:no rule covers", "ignore:the 7 losses are mixed")
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_unusual_models(name):
    model, x, y = MODELS[name]().double(), torch.randn(N, 6, dtype=torch.float64), torch.randint(4, (N,))
    check(model, lambda: F.cross_entropy(model(x), y, reduction="none"))


def test_rows_of_a_model_that_is_called_twice():
    model, x, y = nn.Linear(6, 4).double(), torch.randn(N, 6, dtype=torch.float64), torch.randint(4, (N,))
    check(model, lambda: F.cross_entropy(model(x) + model(-x), y, reduction="none"))


def test_rows_of_a_parameter_that_the_losses_do_not_use_are_zero():
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 2)])
    x = torch.randn(4, 5)
    G = check(model, lambda: model[0](x).square().sum(1))
    assert G["1.weight"].shape == (4, 2, 5) and G["1.weight"].eq(0).all()


def test_rows_of_16_bit_parameters_are_float32():
    model, x = nn.Linear(5, 3).bfloat16(), torch.randn(4, 5)
    with projgrad.per_sample(model) as tape:
        losses = model(x.bfloat16()).float().square().sum(1)
    G = tape.rows(losses)
    for g, wanted in zip(G.values(), truth(losses, list(model.parameters())), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, wanted.float(), rtol=1e-2, atol=1e-2)


def test_losses_that_share_terms_have_no_rows():
    model, x, y = nn.Linear(6, 4), torch.randn(N, 6), torch.randint(4, (N,))
    with projgrad.per_sample(model) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
        losses = losses - losses.mean()
    with pytest.raises(ValueError, match="share terms"):
        tape.rows(losses)
