"""Explicit per-sample gradients against a loop of batch size one, on closures that split and on ones that do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from projgrad.explicit import ExplicitGradients

N = 7


class Twice(nn.Module):
    """Its output depends on two calls of the same layer, and one parameter is not used."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(6, 6), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))[:, :4]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, x, ids):
        return self.layer(self.embedding(ids) * x)


class Routed(nn.Module):
    """Control flow that depends on the data: vmap refuses it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return torch.stack([self.a(row) if row.sum() > 0 else self.b(row) for row in x])


def _image():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=1), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(36, 4)
    )


def _vectors():
    return (torch.randn(N, 6, dtype=torch.float64),)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), _vectors),
    "convolution": (_image, _vectors),
    "batch_norm_eval": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval(), _vectors),
    "twice": (Twice, _vectors),
    "two_inputs": (TwoInputs, lambda: (*_vectors(), torch.randint(9, (N,)))),
    "routed": (Routed, _vectors),
}


def _setup(name):
    build, inputs = MODELS[name]
    model, args, y = build().double(), inputs(), torch.randint(4, (N,))
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return model, params, args, y


def _loop(model, params, args, y):
    """The rows of G from one backward pass a sample."""
    rows = []
    for j in range(N):
        loss = F.cross_entropy(model(*(a[j : j + 1] for a in args)), y[j : j + 1])
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def _flat(grads, params):
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params.values(), strict=True)]
    )


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:vmap cannot run this model")
def test_rows(name, chunk_size):
    model, params, args, y = _setup(name)
    closure = lambda: F.cross_entropy(model(*args), y, reduction="none")  # noqa: E731
    samples = ExplicitGradients(model, closure, params, chunk_size)
    G = _loop(model, params, args, y)
    torch.testing.assert_close(samples.rows(list(params)), G)
    assert (samples._split is not None) == (name != "routed")  # the fast route, wherever it is exact
    weights = torch.randn(N, dtype=torch.float64)
    torch.testing.assert_close(_flat(samples.combine(weights), params), weights @ G)
    some = list(params)[1:2]
    torch.testing.assert_close(samples.rows(some), G.split([p.numel() for p in params.values()], 1)[1])


def _shared(model, x, y):
    losses = F.cross_entropy(model(x), y, reduction="none")
    return losses - losses.mean()


CLOSURES = {
    "losses_share_terms": _shared,
    "called_twice": lambda model, x, y: F.cross_entropy(model(x) + model(-x), y, reduction="none"),
    "called_twice_on_part": lambda model, x, y: F.cross_entropy(
        torch.cat([model(x[:3]), model(x[3:])]), y, reduction="none"
    ),
    "parameter_outside_the_model": lambda model, x, y: (
        F.cross_entropy(model(x), y, reduction="none") + model[0].weight.square().sum()
    ),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_closures_that_do_not_split_are_exact_too(name):
    """The reference differentiates each returned loss on the closure's own graph."""
    model, params, (x,), y = _setup("mlp")
    samples = ExplicitGradients(model, lambda: CLOSURES[name](model, x, y), params)
    losses = CLOSURES[name](model, x, y)
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(samples.rows(list(params)), expected)


def _coupled(coupling):
    def losses(model, x, y):
        z = model(x)
        return F.cross_entropy(z, y, reduction="none") + coupling(z)

    return losses


def _one_small_sample(z):
    """A term of sample 3 looks at sample 5: far below the rounding of what sample 5 has itself."""
    return 1e-12 * torch.nn.functional.one_hot(torch.tensor(3), N) * z[5].square().sum()


NEARLY_SPLIT = {
    "neighbours": _coupled(lambda z: 1e-3 * (z - z.roll(1, 0)).square().sum(1)),
    "small_sample": _coupled(_one_small_sample),
    "weight_penalty": lambda model, x, y: (
        F.cross_entropy(model(x), y, reduction="none") + 1e-7 * model[0].weight.square().sum()
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NEARLY_SPLIT)
def test_weak_coupling_is_noticed(name, dtype):
    """Coupling far below any tolerance on the numbers is still found: the check of the split is exact."""
    model, params, (x,), y = _setup("mlp")
    model.to(dtype)
    samples = ExplicitGradients(model, lambda: NEARLY_SPLIT[name](model, x.to(dtype), y), params)
    assert samples._split is None


class Scaled(nn.Module):
    """A parameter without dimensions, an empty one, a shared one."""

    def __init__(self):
        super().__init__()
        self.first, self.scale, self.empty = (
            nn.Linear(6, 4),
            nn.Parameter(torch.tensor(2.0)),
            nn.Parameter(torch.ones(0)),
        )
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.scale * self.third(self.second(self.first(x))) + self.empty.sum()


class NeedsABatch(nn.Module):
    """Refuses a batch of one; its samples are independent all the same."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        if len(x) == 1:
            raise ValueError("expected more than one sample")
        return self.layer(x)


class Hooked(nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
        self.kept = []
        self.register_forward_hook(lambda module, args, out: self.kept.append(out.detach()))


class Remembers(nn.Module):
    """Keeps features and a running value: none of them may come from inside vmap."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        self.features = x
        return self.layer(x)


class CentersItsBatch(nn.Module):
    """Couples the samples inside the model, weakly."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        z = self.layer(x)
        return z - 1e-2 * z.mean(0)


@pytest.mark.filterwarnings("ignore:vmap cannot run this model")
@pytest.mark.parametrize("build", [Scaled, NeedsABatch, Hooked, CentersItsBatch, Remembers])
def test_unusual_models(build):
    model, x, y = build().double(), torch.randn(N, 6, dtype=torch.float64), torch.randint(4, (N,))
    params = dict(model.named_parameters())
    samples = ExplicitGradients(model, lambda: F.cross_entropy(model(x), y, reduction="none"), params)
    losses = F.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(samples.rows(list(params)), expected)
    if build is Remembers:
        assert samples._split is not None and model.features.shape == (N, 6)
        assert model.state_dict()["mean"].isfinite().all() and float(model.features.sum()) == float(x.sum())
    if build is Hooked:
        assert all(kept.shape == (N, 4) and kept.norm() > 0 for kept in model.kept)


def test_model_called_without_gradients():
    """A teacher's call is not the one to split at."""
    model, params, (x,), _ = _setup("mlp")

    def closure():
        with torch.no_grad():
            target = model(x).softmax(1)
        return F.cross_entropy(model[2](model[1](model[0](x))), target, reduction="none")

    samples = ExplicitGradients(model, closure, params)
    torch.testing.assert_close(samples.rows(list(params)).sum(0), _flat(samples.combine(torch.ones(N)), params))


def test_dropout_keeps_its_mask():
    """The rows belong to the forward pass of the closure, not to a second one with another mask."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    params, (x,), y = dict(model.named_parameters()), _vectors(), torch.randint(4, (N,))
    samples = ExplicitGradients(model, lambda: F.cross_entropy(model(x), y, reduction="none"), params)
    with pytest.warns(UserWarning, match="vmap cannot run this model"):
        G = samples.rows(list(params))
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in samples.losses]
    torch.testing.assert_close(G, torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))


def test_half_precision_parameters():
    model, params, args, y = _setup("mlp")
    model.to(torch.bfloat16)
    model[2].float()
    head = lambda: model[2](model[1](model[0](args[0].bfloat16())).float())  # noqa: E731
    samples = ExplicitGradients(model, lambda: F.cross_entropy(head(), y, reduction="none"), params)
    G = samples.rows(list(params))
    assert G.dtype == torch.float32 and G.isfinite().all()


def test_a_parameter_that_the_losses_do_not_use():
    """Its rows are zero, also where the losses are differentiated one by one."""
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 2)])
    x = torch.randn(4, 5)
    samples = ExplicitGradients(model, lambda: model[0](x).square().sum(1), dict(model.named_parameters()))
    assert samples.rows(["1.weight"]).eq(0).all() and samples.rows(["0.bias", "1.bias"]).shape == (4, 5)


class Clamped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x).tanh()


def test_a_forward_pass_that_changes_weights():
    """vmap would run it again, below the graph of the losses."""
    model = nn.Sequential(Clamped(5, 3), Clamped(3, 2), nn.Dropout(0.1))  # vmap cannot draw numbers: it runs in part
    x = torch.randn(4, 5)
    samples = ExplicitGradients(model, lambda: model(x).square().sum(1), dict(model.named_parameters()))
    expected = [torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0] for loss in samples.losses]
    torch.testing.assert_close(samples.rows(["0.weight"]).view(4, 3, 5), torch.stack(expected))
