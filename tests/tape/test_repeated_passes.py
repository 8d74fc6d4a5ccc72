"""Graphs whose second backward pass is not the first one: refused by name, or right; never wrong without a word."""

import itertools

import pytest
import torch
from steps import MODES
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import projgrad

pytestmark = [pytest.mark.same_without_extension, pytest.mark.usefixtures("float64")]

REFUSAL = "two backward passes through the same graph do not give the same gradients"
N = 6


class Switch:
    """What an operation does to its backward pass, from the step on in which it is told to."""

    on = False


class Overwrites(Function):
    """SiLU times a gate, whose backward pass leaves its results where the saved inputs were."""

    @staticmethod
    def forward(ctx, a, b, switch):
        ctx.save_for_backward(a.clone(), b.clone())
        ctx.switch = switch
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        ga, gb = g * b * (s + a * s * (1 - s)), g * a * s
        if ctx.switch.on:
            a.data.copy_(ga)
            b.data.copy_(gb)
        return ga, gb, None


class Scales(Function):
    """The tangent hyperbolic, whose saved output is scaled in place."""

    @staticmethod
    def forward(ctx, x, switch):
        y = x.tanh()
        ctx.save_for_backward(y.clone())
        ctx.switch = switch
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        gx = g * (1 - y * y)
        if ctx.switch.on:
            with torch.no_grad():
                y.data.mul_(0.9)
        return gx, None


class Counts(Function):
    """The tangent hyperbolic, whose gradient depends on how often it was asked for."""

    growth = staticmethod(lambda count: 1.0 + 0.1 * count)

    @staticmethod
    def forward(ctx, x, switch, growth):
        y = x.tanh()
        ctx.save_for_backward(y)
        ctx.switch, ctx.growth, ctx.count = switch, growth, 0
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        factor = ctx.growth(ctx.count) if ctx.switch.on else 1.0
        ctx.count += 1
        return factor * g * (1 - y * y), None, None


class Draws(Function):
    """The tangent hyperbolic, whose gradient is rounded at random."""

    @staticmethod
    def forward(ctx, x, switch):
        y = x.tanh()
        ctx.save_for_backward(y)
        ctx.switch = switch
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        noise = 1 + 0.01 * torch.randn_like(g) if ctx.switch.on else 1.0
        return noise * g * (1 - y * y), None


class Gated(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 5)
        self.middle, self.switch = middle, Switch()

    def forward(self, x):
        return self.out(self.middle(self, self.a(x), self.b(x)))


def clip(g, switch):
    """By a norm over the whole batch."""
    return g * min(1.0, 1e-3 / float(g.norm())) if switch.on else g


def tensor_hook(model, a, b):
    h = a.tanh() * b
    h.register_hook(lambda g: clip(g, model.switch))
    return h


class Hooked(nn.Tanh):
    """A module with a hook on the gradient of its input, or of its output."""

    def __init__(self, switch, before):
        super().__init__()
        if before:
            self.register_full_backward_pre_hook(lambda _, g: (clip(g[0], switch),))
        else:
            self.register_full_backward_hook(lambda _, g, __: (clip(g[0], switch),))


def hooked(before):
    def middle(model, a, b):
        if not hasattr(model, "hooked"):
            model.hooked = Hooked(model.switch, before)
        return model.hooked(a) * b

    return middle


def counting(growth):
    return lambda m, a, b: Counts.apply(a, m.switch, growth) * b


# (operation, the node that is to be named): what a graph shows of itself.
VISIBLE = {
    "overwrites": (lambda m, a, b: Overwrites.apply(a, b, m.switch), "OverwritesBackward"),
    "scales": (lambda m, a, b: Scales.apply(a, m.switch) * b, "ScalesBackward"),
    "counts": (counting(lambda k: 1.0 + 0.1 * k), "CountsBackward"),
    "doubles": (counting(lambda k: 2.0**k), "CountsBackward"),
    "changes_sign": (counting(lambda k: (-1.0) ** k), "CountsBackward"),
    "draws": (lambda m, a, b: Draws.apply(a, m.switch) * b, "DrawsBackward"),
    "module_hook": (hooked(before=False), "BackwardHookFunctionBackward"),
    "module_pre_hook": (hooked(before=True), "BackwardHookFunctionBackward"),
}


def build(middle):
    model, x = Gated(middle), torch.randn(N, 8)
    direction = [torch.randn_like(p) for p in model.parameters()]
    retain = lambda: F.cross_entropy(model(x), torch.arange(N) % 5, reduction="none")  # noqa: E731
    forget = lambda: sum((p * d).sum() for p, d in zip(model.parameters(), direction, strict=True))  # noqa: E731
    return model, forget, retain


def rows(model, retain):
    """g_j, each from a graph of its own."""
    params = list(model.parameters())
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(retain()[j], params)]) for j in range(N)])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step(model, unlearner, forget, retain):
    """max_j |cos(g_j, update)| of one step, by a loop over the losses."""
    G, before = rows(model, retain), flat(model)
    record = unlearner.step(forget, retain)
    moved = flat(model) - before
    assert record.rank >= N and moved.norm() > 0
    return float((G @ moved / G.norm(dim=1) / moved.norm()).abs().max())


def refuse(model, unlearner, forget, retain, message):
    before = flat(model)
    with pytest.raises(ArithmeticError, match=message):
        unlearner.step(forget, retain)
    assert torch.equal(flat(model), before) and all(p.grad is None for p in model.parameters())


def unlearner_for(model, mode):
    return projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=1e-2), alpha=0.0, **MODES[mode])


@pytest.mark.parametrize("begins", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VISIBLE)
def test_an_operation_whose_second_pass_differs_is_refused_by_name(name, mode, begins):
    """In the first step, and in the third one of the same graph: it was right until then."""
    middle, node = VISIBLE[name]
    model, forget, retain = build(middle)
    unlearner = unlearner_for(model, mode)
    for _ in range(1, begins):
        assert step(model, unlearner, forget, retain) <= 1e-9
    model.switch.on = True
    for _ in range(2):  # nor does it pass when it is tried again
        refuse(model, unlearner, forget, retain, f"{REFUSAL}.*{node}")
    model.switch.on = False
    assert step(model, unlearner, forget, retain) <= 1e-9


@pytest.mark.parametrize("use", ["gram", "dot", "moments"])
@pytest.mark.parametrize("name", VISIBLE)
def test_products_are_refused_by_name(name, use):
    middle, node = VISIBLE[name]
    model, _, retain = build(middle)
    model.switch.on = True
    with projgrad.per_sample(model) as tape:
        losses = retain()
    arguments = [list(model.parameters())] if use == "dot" else []
    with pytest.raises(ArithmeticError, match=f"{REFUSAL}.*{node}"):
        getattr(tape, use)(losses, *arguments)


def recomputed(model, a, b):
    """With another dropout mask than in the forward pass."""
    block = lambda h: model.a(F.dropout(h, 0.5 if model.switch.on else 1e-12).tanh() @ torch.ones(10, 8)) * b  # noqa: E731
    return checkpoint(block, a, use_reentrant=False, preserve_rng_state=False)


HIDDEN = {"tensor_hook": tensor_hook, "recomputed": recomputed}  # nothing of it is in the graph


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HIDDEN)
def test_what_no_graph_shows_is_refused_at_first(name, mode):
    model, forget, retain = build(HIDDEN[name])
    model.switch.on = True
    unlearner = unlearner_for(model, mode)
    for _ in range(2):
        refuse(model, unlearner, forget, retain, REFUSAL)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HIDDEN)
def test_what_no_graph_shows_is_refused_or_right_later(name, mode):
    """In the third step; with one backward pass what is recomputed is so once, and each tensor's gradients may have
    been scaled alike."""
    model, forget, retain = build(HIDDEN[name])

    def seeded():
        torch.manual_seed(3)  # the same masks for the truth
        return retain()

    unlearner = unlearner_for(model, mode)
    for k in range(4):
        model.switch.on = k >= 2
        G, before = rows(model, seeded), flat(model)
        try:
            unlearner.step(forget, seeded)
        except ArithmeticError as error:
            assert (REFUSAL in str(error) or "plain autograd disagree" in str(error)) and model.switch.on
            assert torch.equal(flat(model), before) and all(p.grad is None for p in model.parameters())
            continue
        for keys in model_parts(model, mode):
            g, moved = G[:, keys], (flat(model) - before)[keys]
            assert (g @ moved).abs().max() <= 1e-9 * g.norm() * moved.norm() + 1e-18


def model_parts(model, mode):
    """Ranges of the parameters that are projected together."""
    sizes = [p.numel() for p in model.parameters()]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist() if mode == "per_tensor" else [0, sum(sizes)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


HARMLESS = {
    "constant_hook": lambda m, a, b: _halved(a.tanh() * b),
    "saved_tensors": lambda m, a, b: Overwrites.apply(a, b, m.switch),
    "own_attribute": counting(lambda k: 1.0),
    "checkpoint": lambda m, a, b: checkpoint(lambda h: m.a(h.tanh() @ torch.ones(10, 8)) * b, a, use_reentrant=False),
    "kept_dropout": lambda m, a, b: checkpoint(lambda h: F.dropout(h, 0.5).tanh() * b, a, use_reentrant=False),
    "constant_module_hook": lambda m, a, b: _halving(m)(a) * b,
}


def _halved(h):
    h.register_hook(lambda g: g / 2)
    return h


def _halving(model):
    if not hasattr(model, "halving"):
        model.halving = nn.Tanh()
        model.halving.register_full_backward_hook(lambda _, g, __: (g[0] / 2,))
    return model.halving


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HARMLESS)
def test_what_treats_samples_alike_is_right(name, mode):
    model, forget, retain = build(HARMLESS[name])
    unlearner = unlearner_for(model, mode)

    def seeded():
        torch.manual_seed(3)  # the same dropout for the truth
        return retain()

    for _ in range(3):
        assert step(model, unlearner, forget, seeded) <= 1e-9
