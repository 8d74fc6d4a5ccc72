"""Parts of a model that hide something from the tape: the error says what, and the state stays; or they work."""

import functools

import pytest
import torch
from steps import MODES, mlp, trained
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from zoo.case import to_ramp
from zoo.functional import Uses

import projgrad

pytestmark = pytest.mark.usefixtures("float64")

N = 6


class Own(Function):
    """A checkpoint of one's own: the block runs again, with a backward pass inside the backward pass."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, g)
        return None, x.grad


def own(inside):
    """Around parameters that rules cover, or not."""

    def build():
        block = mlp() if inside == "linear" else Uses(lambda m, x: torch.cdist(x, m.c), c=(3, 8))
        model = nn.ModuleList([nn.Linear(8, 8), block, nn.Linear(3, 5)])
        return model, lambda x: model[2](Own.apply(model[1], model[0](x)))

    return build


def selective():
    model = nn.ModuleList([nn.Linear(8, 8), mlp(), nn.Linear(3, 5)])
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return model, lambda x: model[2](checkpoint(model[1], model[0](x), use_reentrant=False, context_fn=contexts))


def bags():
    model = nn.Sequential(nn.EmbeddingBag(5, 4, mode="sum", scale_grad_by_freq=True), nn.Linear(4, 5))
    return model, lambda x: model(x[:, :3].argsort())


def jagged():
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(x):
        parts = [row[None].expand(2 + k % 3, -1) for k, row in enumerate(x)]
        parts = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        return torch.stack([y.mean(0) for y in model(parts).unbind()])

    return model, forward


REFUSED = {
    "selective_checkpoint": (selective, r"selective activation checkpointing.*without context_fn"),
    "own_checkpoint": (own("linear"), r"backward pass of its own.*use_reentrant=False"),
    "own_checkpoint_without_rules": (own("cdist"), r"backward pass of its own.*use_reentrant=False"),
    "bag_scaled_by_frequency": (bags, r"embedding_bag\(scale_grad_by_freq=True\)"),
    "jagged": (jagged, r"nested \(jagged\).*pad them"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_a_step_says_what_is_hidden_and_leaves_the_state(name, mode):
    build, message = REFUSED[name]
    model, forward = build()
    x, y = torch.randn(N, 8), torch.randint(5, (N,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    unlearner = projgrad.OrthoGrad(model, optimizer, **MODES[mode])
    params = trained(model)
    forget = lambda: sum(p.square().sum() for p in params.values())  # noqa: E731
    before = {key: p.detach().clone() for key, p in params.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            unlearner.step(forget, lambda: F.cross_entropy(forward(x), y, reduction="none"))
        assert all(torch.equal(p, before[key]) and p.grad is None for key, p in params.items())
    assert not optimizer.state


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("use", ["gram", "dot", "moments", "explain"])
@pytest.mark.parametrize("inside", ["linear", "cdist"])
def test_a_checkpoint_of_ones_own_leaves_gradients_as_they_were(inside, use, given):
    """Those that the user had stay the same objects with the same numbers, or become None where they were written."""
    model, forward = own(inside)()
    x, y = torch.randn(N, 8), torch.randint(5, (N,))
    params = trained(model)
    for p in params.values():
        p.grad = torch.ones_like(p) if given else None
    before = {key: p.grad for key, p in params.items()}
    with projgrad.per_sample(model) as tape:
        losses = F.cross_entropy(forward(x), y, reduction="none")
    arguments = [dict(params)] if use == "dot" else []
    with pytest.raises(ValueError, match=r"backward pass of its own"):
        getattr(tape, use)(losses, *arguments)
    for key, p in params.items():
        assert p.grad is None or (p.grad is before[key] and p.grad.eq(1).all()), key
        if not key.startswith("1."):  # nothing was written there
            assert p.grad is before[key]


class Empty(nn.Module):
    def __init__(self, used):
        super().__init__()
        self.a, self.none, self.used = nn.Linear(8, 5), nn.Parameter(torch.zeros(0, 5)), used

    def forward(self, x):
        y = self.a(x)
        if self.used == "sum":
            return y + self.none.sum()
        return torch.cat([y, self.none])[: len(y)] if self.used == "rows" else y


def rows(model, losses):
    """g_j by parameter."""
    params = list(model.parameters())
    options = dict(retain_graph=True, materialize_grads=True, allow_unused=True)
    return [torch.autograd.grad(loss, params, **options) for loss in losses]


@pytest.mark.filterwarnings("ignore:no rule covers")
@pytest.mark.parametrize("used", ["no", "sum", "rows"])
def test_parameters_without_elements_change_no_product(used):
    """In all modes and products."""
    model, x = Empty(used), torch.randn(N, 8)
    params = trained(model)
    with projgrad.per_sample(model) as tape:
        losses = to_ramp(model(x))
    w = torch.linspace(-1, 1, N)
    direction = {key: torch.randn_like(p) for key, p in params.items()}
    found = [torch.stack(g) for g in zip(*rows(model, losses), strict=True)]
    G = torch.cat([g.flatten(1) for g in found], 1)
    torch.testing.assert_close(tape.gram(losses), G @ G.mT)
    torch.testing.assert_close(tape.dot(losses, direction), G @ torch.cat([u.flatten() for u in direction.values()]))
    combined, (first, second) = tape.combine(losses, w), tape.moments(losses, w)
    for key, g in zip(params, found, strict=True):
        weighted = torch.einsum("n,n...->n...", w, g)
        wanted = weighted.sum(0), weighted.sum(0), weighted.square().sum(0)
        for some, expected in zip((combined, first, second), wanted, strict=True):
            torch.testing.assert_close(some.get(key, torch.zeros_like(expected)), expected)


@pytest.mark.filterwarnings("ignore:no rule covers")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("used", ["no", "sum", "rows"])
def test_steps_with_parameters_without_elements(used, mode):
    model, x = Empty(used), torch.randn(4, 8)
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.0, **MODES[mode])
    for _ in range(3):
        G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows(model, to_ramp(model(x)))])
        record = unlearner.step(lambda: to_ramp(model(-x)).mean(), lambda: to_ramp(model(x)))
        update = torch.cat([p.grad.flatten() for p in model.parameters() if p.numel()])
        assert (G @ update).abs().max() <= 1e-9 * G.norm() * max(float(update.norm()), 1e-6) and record.rank >= 4
        assert model.none.shape == (0, 5)


@pytest.mark.parametrize("n, t", [(4, 6), (2, 3), (5, 5)])
def test_losses_of_tokens_taken_for_samples(n, t):
    """n t losses of n sequences that share positions: the message says how many samples the layer sees."""
    model = nn.LSTM(8, 4, batch_first=True)
    x = torch.randn(n, t, 8)
    with projgrad.per_sample(model) as tape:
        losses = to_ramp(model(x)[0].flatten(0, 1))
    with pytest.warns(UserWarning, match=rf"\({n}, .*if that is {n} samples, reduce the losses to one a sample\)"):
        tape.gram(losses)


@pytest.mark.parametrize("power", [-18, -20])
def test_float16_gradients_that_vanish_are_named_as_a_cause(power):
    """They look like samples that are mixed, or passes that differ: half of the smallest number is 0."""
    torch.manual_seed(0)
    adapter, base = nn.Linear(8, 8).float(), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).half()
    base.requires_grad_(False)
    x, y = torch.randn(N, 8).float(), torch.randint(5, (N,))
    losses = lambda scale: scale * F.cross_entropy(base(adapter(x).half()).float(), y, reduction="none")  # noqa: E731
    with projgrad.per_sample(adapter) as tape:
        small = losses(2.0**power)
    with pytest.raises((ValueError, ArithmeticError), match="float16 gradients vanish there: scale the losses"):
        tape.gram(small)
    with projgrad.per_sample(adapter) as tape:
        large = losses(2.0**4)
    assert tape.gram(large).diagonal().min() > 0
