"""The drop-in functions used directly: torch's result bit for bit, and the right per-sample gradients; and in models
that compute something from their parameters first."""

import inspect
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from steps import check
from torch import nn
from zoo.case import to_ramp
from zoo.functional import Uses

import projgrad
import projgrad.functional as pf

pytestmark = pytest.mark.usefixtures("float64")

N = 4


def original(name):
    """torch.embedding_bag is what the layer's function calls."""
    return getattr(torch if name == "embedding_bag" or not hasattr(F, name) else F, name)


def _conv(dims, transposed=False, **options):
    """6 channels to 4 in two groups."""
    shape = (6, 2) if transposed else (4, 3)
    shapes = {"weight": (*shape, *(3, 2, 2)[:dims]), "bias": (4,)}
    call = lambda f, p, x: f(x, p["weight"], p["bias"], stride=2, groups=2, **options)  # noqa: E731
    return shapes, torch.randn(N, 6, *(7, 5, 4)[:dims]), call


def _norm(*args, shape=(N, 6, 5), size=(6,), bias=True, **options):
    shapes = {"weight": size, "bias": size} if bias else {"weight": size}
    return shapes, torch.randn(shape), lambda f, p, x: f(x, *args, **p, **options)


IDS = torch.tensor([[0, 3, 3], [1, 1, 1], [5, 2, 6], [3, 0, 4]])

# name: shapes of the parameters, input, call(function, parameters, input)
CALLS = {
    "add": lambda: ({"b": (3, 1)}, torch.randn(N, 3, 5), lambda f, p, x: f(x, p["b"], alpha=2)),
    "sub": lambda: ({"b": (5,)}, torch.randn(N, 3, 5), lambda f, p, x: f(p["b"], x, alpha=2)),
    "mul": lambda: ({"s": (1, 5)}, torch.randn(N, 3, 5), lambda f, p, x: f(p["s"], x)),
    "linear": lambda: (
        {"weight": (6, 5), "bias": (6,)},
        torch.randn(N, 3, 5),
        lambda f, p, x: f(x, p["weight"], p["bias"]),
    ),
    "bilinear": lambda: (
        {"weight": (3, 5, 5), "bias": (3,)},
        torch.randn(N, 5),
        lambda f, p, x: f(x, x.cos(), p["weight"], p["bias"]),
    ),
    "matmul": lambda: ({"w": (5, 6)}, torch.randn(N, 3, 5), lambda f, p, x: f(x, p["w"])),
    "addmm": lambda: (
        {"b": (6,), "w": (5, 6)},
        torch.randn(N, 5),
        lambda f, p, x: f(p["b"], x, p["w"], beta=0.5, alpha=3),
    ),
    "einsum": lambda: ({"w": (2, 5, 6)}, torch.randn(N, 3, 5), lambda f, p, x: f("ntd,hde->nhte", x, p["w"])),
    "conv1d": lambda: _conv(1, padding=1, dilation=2),
    "conv2d": lambda: _conv(2, padding=(2, 1)),
    "conv3d": lambda: _conv(3, padding="valid"),
    "conv_transpose1d": lambda: _conv(1, True, padding=1, output_padding=1),
    "conv_transpose2d": lambda: _conv(2, True, dilation=2),
    "conv_transpose3d": lambda: _conv(3, True, padding=(1, 0, 1)),
    "embedding": lambda: (
        {"weight": (7, 5)},
        IDS,
        lambda f, p, ids: f(ids, p["weight"], padding_idx=3),
    ),
    "embedding_bag": lambda: (
        {"weight": (7, 5)},
        IDS,
        lambda f, p, ids: f(p["weight"], ids.flatten(), torch.tensor([0, 3, 6, 9]), False, 1)[0],
    ),
    "layer_norm": lambda: _norm((5,), size=(5,)),
    "rms_norm": lambda: _norm((5,), size=(5,), bias=False),
    "group_norm": lambda: _norm(3),
    "instance_norm": lambda: _norm(),
    "batch_norm": lambda: _norm(torch.randn(6), torch.rand(6) + 0.5),
}


def test_every_function_is_here():
    assert sorted(CALLS) == sorted(pf.__all__)


@pytest.fixture(params=CALLS)
def called(request):
    """The function, torch's, parameters, and a call of either."""
    shapes, x, call = CALLS[request.param]()
    parameters = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    given = lambda f: call(f, parameters, x)  # noqa: E731
    return getattr(pf, request.param), original(request.param), parameters, given


def _losses(y):
    return y.tanh().flatten(1).square().sum(1)


def test_results_are_those_of_torch(called):
    ours, theirs, parameters, call = called
    tape = projgrad.Tape(parameters)
    with torch.no_grad():
        assert torch.equal(call(lambda *args, **kwargs: ours(*args, **kwargs, tape=tape)), call(theirs))
    found, expected = call(lambda *args, **kwargs: ours(*args, **kwargs, tape=tape)), call(theirs)
    assert torch.equal(found, expected)
    grads = (torch.autograd.grad(_losses(y).sum(), parameters.values()) for y in (found, expected))
    assert all(map(torch.equal, *grads))


def test_functions_called_with_a_tape_have_the_gradients_of_single_losses(called):
    ours, theirs, parameters, call = called
    losses = _losses(call(theirs))
    rows = [torch.autograd.grad(loss, parameters.values(), retain_graph=True) for loss in losses]
    G = {name: torch.stack(g) for name, g in zip(parameters, zip(*rows, strict=True), strict=True)}
    tape = projgrad.Tape(parameters)
    losses = _losses(call(lambda *args, **kwargs: ours(*args, **kwargs, tape=tape)))
    torch.testing.assert_close(tape.gram(losses), oracle.gram(G))
    first, second = tape.moments(losses)
    for name, g in G.items():
        torch.testing.assert_close(first[name], g.sum(0))
        torch.testing.assert_close(second[name], g.square().sum(0))


@pytest.mark.parametrize("name", CALLS)
def test_every_function_takes_a_tape_by_keyword_and_names_itself(name):
    parameters = inspect.signature(getattr(pf, name)).parameters
    assert parameters["tape"].kind is inspect.Parameter.KEYWORD_ONLY
    assert name in getattr(pf, name).__doc__


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, t: pf.batch_norm(p[None], None, None, training=True, tape=t), r"batch statistics.*model\.eval\(\)"),
        (lambda p, t: pf.embedding(IDS, p, sparse=True, tape=t), r"sparse=True.*use sparse=False"),
        (lambda p, t: pf.embedding(IDS, p, scale_grad_by_freq=True, tape=t), "what the others hold"),
    ],
)
def test_calls_that_mix_samples_are_refused(call, message):
    p = torch.randn(7, 5, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        call(p, projgrad.Tape({"p": p}))


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_a_training_loop_of_ones_own(scope):
    """Two layers by hand, the tape passed along: forget on some samples, keep the losses of the others."""
    shapes = {"a": (6, 5), "b": (6,), "c": (3, 6)}
    parameters = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    x, xf, y = torch.randn(N, 5), torch.randn(3, 5), torch.randint(3, (N,))
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)

    def forward(x, tape):
        h = pf.linear(x, parameters["a"], parameters["b"], tape=tape).tanh()
        return pf.linear(h, parameters["c"], tape=tape)

    def plain(x):
        return F.linear(F.linear(x, parameters["a"], parameters["b"]).tanh(), parameters["c"])

    for _ in range(3):
        losses = F.cross_entropy(plain(x), y, reduction="none")
        rows = [torch.autograd.grad(loss, parameters.values(), retain_graph=True) for loss in losses]
        G = {name: torch.stack(g) for name, g in zip(parameters, zip(*rows, strict=True), strict=True)}
        optimizer.zero_grad()
        (-F.cross_entropy(plain(xf), y[:3])).backward()
        expected = oracle.project({name: p.grad.clone() for name, p in parameters.items()}, G, scope)
        tape = projgrad.Tape(parameters)
        tape.project_(F.cross_entropy(forward(x, tape), y, reduction="none"), scope)
        for name, p in parameters.items():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-10)
        optimizer.step()


def test_unfollowed_parameters_cost_nothing():
    """Frozen ones leave no trace on the tape; what has no followed parameter is torch's function."""
    layer = nn.Linear(5, 3)
    layer.weight.requires_grad_(False)
    tape = projgrad.Tape({"bias": layer.bias})
    x = torch.randn(N, 5)
    h = pf.linear(x, layer.weight, tape=tape)
    assert not tape.recording.sites and not h.requires_grad
    losses = _losses(pf.linear(h @ torch.ones(3, 5), layer.weight, layer.bias, tape=tape))
    assert [len(site.saved.tensors) for site in tape.recording.sites] == [0] and tape.gram(losses).shape == (N, N)


# What a model computes from its parameters before they meet the samples.


def _clone_then_zero(m, x):
    w = m.w.clone()
    w[:3] = 0
    return F.linear(x, w).tanh()


def _clone_then_double(m, x):
    w = m.w.clone()
    w *= 2
    return F.linear(x, w).tanh()


def _before_and_after(m, x):
    w = m.w * 1.0
    y = F.linear(x, w)
    w.mul_(2)
    return (y + F.linear(x.cos(), w)).tanh()


def _plus_another(m, x):
    w = m.a @ m.b
    w += m.w
    return F.linear(x, w).tanh()


def _token_changed_by_samples(m, x):
    t = m.t.expand(len(x), -1).clone()
    t += F.linear(x, m.w).tanh()
    return F.linear(t, m.v).tanh()


def _derived_token(m, x):
    t = (2 * m.t).tanh().expand(len(x), -1)
    return F.linear(t * x, m.w).tanh()


def _filled_buffer(m, x):
    buffer = torch.zeros(len(x), 8)
    buffer[:, :4] = x[:, :4]
    return F.layer_norm(F.linear(buffer, m.w).tanh(), (6,), m.b)


def _slices_changed(m, x):
    y = F.linear(x * 1, m.w)
    y[:, 0] += m.b[0]
    y[:, 1:].add_(m.b[1:])
    return y.tanh()


def _chosen(x):
    return (x.sum(-1) > 0).long()


W = {"w": (6, 8)}
DERIVED = {
    "clone_then_zero": (_clone_then_zero, W, (5, 8)),
    "clone_then_double": (_clone_then_double, W, (5, 8)),
    "used_before_and_after": (_before_and_after, W, (5, 8)),
    "plus_another": (_plus_another, {"a": (6, 2), "b": (2, 8), **W}, (5, 8)),
    "token_changed_by_samples": (_token_changed_by_samples, {"t": (1, 6), "v": (4, 6), **W}, (5, 8)),
    "derived_token": (_derived_token, {"t": (1, 8), **W}, (5, 8)),
    "filled_buffer": (_filled_buffer, {"b": (6,), **W}, (5, 8)),
    "slices_changed": (_slices_changed, {"b": (6,), **W}, (5, 8)),
    "index_select": (lambda m, x: (x * m.w.index_select(dim=0, index=_chosen(x))).tanh(), W, (5, 8)),
    "index_select_function": (lambda m, x: (x * torch.index_select(m.w, dim=0, index=_chosen(x))).tanh(), W, (5, 8)),
    "index_0_dim": (lambda m, x: (x * m.w[torch.tensor(1)]).tanh(), W, (5, 8)),
    "index_list": (lambda m, x: (x * m.w[_chosen(x).tolist()]).tanh(), W, (5, 8)),
    "einsum_size_1": (lambda m, x: torch.einsum("nhd,hde->nhe", x[:, None], m.w).tanh(), {"w": (3, 8, 4)}, (5, 8)),
    "einsum_size_1_contracted": (lambda m, x: torch.einsum("nd,de->ne", x[:, :1], m.w).tanh(), {"w": (8, 4)}, (5, 8)),
    "einsum_ellipses": (lambda m, x: torch.einsum("...d,...do->...o", x, m.w).tanh(), {"w": (3, 8, 4)}, (3, 3, 8)),
    "einsum_ellipses_weight_first": (
        lambda m, x: torch.einsum("...do,...d->...o", m.w, x).tanh(),
        {"w": (3, 8, 4)},
        (3, 3, 8),
    ),
    "einsum_ellipses_sequence_first": (
        lambda m, x: torch.einsum("...d,...do->...o", x, m.w).tanh().transpose(0, 1),
        {"w": (3, 8, 4)},
        (3, 3, 8),
    ),
    "attention_mask_n_by_n": (
        lambda m, x: F.scaled_dot_product_attention(m.q, x, x, attn_mask=x[0, :, :5]),
        {"q": (1, 5, 8)},
        (5, 5, 8),
    ),
    "repeat_interleave": (
        lambda m, x: (m.q.repeat_interleave(len(x)).view(-1, len(x)).T * x).tanh(),
        {"q": (8,)},
        (5, 8),
    ),
}


SLOW = {  # right by a loop over the losses; all others have a rule
    "slices_changed",
    "index_0_dim",
    "index_list",
    "einsum_size_1",
    "einsum_size_1_contracted",
    "einsum_ellipses_sequence_first",
    "repeat_interleave",
}


@pytest.mark.parametrize("name", DERIVED)
def test_tensors_derived_from_parameters_have_exact_gradients(name):
    f, shapes, size = DERIVED[name]
    model, x = Uses(f, **shapes), torch.randn(size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if name in SLOW else "error", "no rule covers")
        check(model, lambda: to_ramp(model(x)))
