"""Torch functions of which somebody made others: wrappers in their place, function modes, classes of tensors, hooks."""

import functools
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import projgrad

pytestmark = pytest.mark.usefixtures("float64")

N = 6


class Model(nn.Module):
    """Meets the functions that are replaced; rows are samples."""

    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(8, 8), nn.Linear(8, 3)
        self.w, self.v = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8) / 3)
        self.register_buffer("m", torch.zeros(4)), self.register_buffer("s", torch.ones(4))

    def forward(self, x):
        return self.last(self.function(self, torch.tanh(self.first(x))).flatten(1))


def heads(m, x, need_weights=False):
    x = x.view(-1, 4, 2).transpose(0, 1)
    options = dict(need_weights=need_weights, out_proj_weight=m.w[:2, :2], out_proj_bias=m.v[:2])
    y, _ = F.multi_head_attention_forward(
        x, x, x, 2, 1, m.w[:6, :2], m.v[:6], None, None, False, dropout_p=0.0, **options
    )
    return y.transpose(0, 1)


USES = {
    "F.linear": lambda m, x: F.linear(x, m.w, m.v),
    "F.bilinear": lambda m, x: F.bilinear(x, x[:, :1], m.w[:, :, None], m.v),
    "F.layer_norm": lambda m, x: F.layer_norm(x, (8,), m.w[0], m.v),
    "F.rms_norm": lambda m, x: F.rms_norm(x, (8,), m.v),
    "F.group_norm": lambda m, x: F.group_norm(x.view(-1, 4, 2), 2, m.v[:4], m.v[4:]),
    "F.instance_norm": lambda m, x: F.instance_norm(x.view(-1, 4, 2), weight=m.v[:4], bias=m.v[4:]),
    "F.batch_norm": lambda m, x: F.batch_norm(x.view(-1, 4, 2), m.m, m.s, m.v[:4], m.v[4:]),
    "F.embedding": lambda m, x: F.embedding(x.argsort(), m.w, padding_idx=-8).sum(1),
    "F.embedding_bag": lambda m, x: F.embedding_bag(x.argsort()[:, :3], m.w),
    "F.conv1d": lambda m, x: F.conv1d(x.view(-1, 4, 2), m.w[:, :4, None], m.v).mean(2),
    "F.conv_transpose1d": lambda m, x: F.conv_transpose1d(x.view(-1, 4, 2), m.w[:4, :, None], m.v).mean(2),
    "F.silu": lambda m, x: F.silu(x) * m.v,
    "F.softmax": lambda m, x: F.softmax(x, 1) @ m.w,
    "F.prelu": lambda m, x: F.prelu(x, m.v),
    "torch.matmul": lambda m, x: torch.matmul(x, m.w),
    "torch.addmm": lambda m, x: torch.addmm(m.v, x, m.w),
    "torch.einsum": lambda m, x: torch.einsum("ni,io->no", x, m.w),
    "torch.mul": lambda m, x: torch.mul(x, m.v),
    "torch.add": lambda m, x: torch.add(x, m.v),
    "F.multi_head_attention_forward": heads,
    "F.scaled_dot_product_attention": lambda m, x: F.scaled_dot_product_attention(*[(x @ m.w).view(-1, 4, 2)] * 3),
}
EFFECTS = {"none": lambda y: y, "bent": lambda y: y + 0.1 * y**3}


@contextmanager
def replaced(name, effect, named):
    """Another function in the place of one of torch's."""
    where, name = (torch if name[0] == "t" else F), name.partition(".")[2]
    original = getattr(where, name)

    def mine(*args, **kwargs):
        out = original(*args, **kwargs)
        return (EFFECTS[effect](out[0]), *out[1:]) if isinstance(out, tuple) else EFFECTS[effect](out)

    setattr(where, name, functools.wraps(original)(mine) if named else mine)
    try:
        yield
    finally:
        setattr(where, name, original)


def errors(model, around, from_step=0, steps=2):
    """The relative error of K in some steps, in the first of them or from another one on inside of `around`."""
    found = []
    for step in range(steps):
        x = torch.randn(N, 8)
        with around() if step >= from_step else nullcontext():
            params = dict(model.named_parameters())
            losses = model(x).square().sum(1)
            G = [torch.autograd.grad(loss, params.values(), retain_graph=True, allow_unused=True) for loss in losses]
            with projgrad.per_sample(model) as tape:
                own = model(x).square().sum(1)
            assert torch.equal(own, losses)
            K = tape.gram(own)
        G = torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in G])
        found.append(float((K - G @ G.T).norm() / (G @ G.T).norm()))
        for p in params.values():  # as a step would
            p.data.mul_(0.99)
    return found


@pytest.mark.parametrize("named", [True, False], ids=["functools.wraps", "plain"])
@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("name", USES)
def test_a_wrapper_in_the_place_of_a_function_is_run_once(name, effect, named):
    model = Model(USES[name])
    for from_step in (0, 1):
        assert max(errors(model, lambda: replaced(name, effect, named), from_step)) < 1e-12


@pytest.mark.parametrize("first", [True, False], ids=["first replaced", "first as it is"])
@pytest.mark.parametrize("name", ["F.linear", "F.scaled_dot_product_attention", "F.softmax"])
def test_what_attention_calls_is_looked_up_in_every_step(name, first):
    """It is looked into: the functions of its first time must not stay."""

    def attention(m, x):
        return heads(m, x) if name != "F.softmax" else heads(m, x, need_weights=True)

    model = Model(attention)
    for replace in (first, not first, first):
        around = (lambda: replaced(name, "bent", True)) if replace else nullcontext
        assert max(errors(model, around)) < 1e-12


INNER = ("embedding", "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")


@pytest.mark.parametrize("name", INNER)
def test_a_wrapper_in_the_place_of_what_a_function_calls_is_run(name):
    """F.layer_norm calls torch.layer_norm, which may be somebody's."""
    model = Model(USES[f"F.{name}"])
    with pytest.warns(UserWarning, match=f"no rule covers {name}"):
        assert max(errors(model, lambda: replaced(f"torch.{name}", "bent", True), 1)) < 1e-12


METHODS = {
    "matmul": lambda m, x: x.matmul(m.w),
    "__matmul__": lambda m, x: x @ m.w,
    "__mul__": lambda m, x: x * m.v,
    "view": lambda m, x: x @ m.w.view(64).view(8, 8),
    "t": lambda m, x: x @ m.w.t(),
    "tanh": lambda m, x: x.tanh() @ m.w,
    "split": lambda m, x: x @ torch.cat(m.w.split(4)),
}


@pytest.mark.parametrize("named", [True, False], ids=["functools.wraps", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_a_wrapper_in_the_place_of_a_method_changes_nothing(name, named, monkeypatch):
    """One that bends what ours call, too, would be found by the comparison with autograd, and refused."""
    original, calls = getattr(torch.Tensor, name), []

    def mine(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, name, functools.wraps(original)(mine) if named else mine)
    assert max(errors(Model(METHODS[name]), nullcontext)) < 1e-12 and calls


def many_hands(function):
    """Functions that others put around one, which torch itself made."""
    yield torch.compiler.disable(function)
    yield torch.enable_grad()(function)
    yield torch.autocast("cpu", enabled=False)(function)
    yield torch.overrides.wrap_torch_function(lambda query, *_, **__: (query,))(function)
    yield functools.partial(function)
    yield torch.enable_grad()(lambda *args, **kwargs: function(*args, **kwargs))


@pytest.mark.parametrize("hand", range(6))
def test_decorators_of_torch_around_attention(hand, monkeypatch):
    monkeypatch.setattr(F, "multi_head_attention_forward", list(many_hands(F.multi_head_attention_forward))[hand])
    assert max(errors(Model(heads), nullcontext)) < 1e-12


class Bending(TorchFunctionMode):
    """Changes what comes into linear layers, and what comes out of norms."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "linear":
            args = (args[0] + (args[0].round(decimals=1) - args[0]).detach(), *args[1:])
        out = func(*args, **(kwargs or {}))
        return out + 0.1 * out**3 if name == "layer_norm" and func is not F.layer_norm else out


@pytest.mark.parametrize("from_step", [0, 1])
@pytest.mark.parametrize("name", ["F.linear", "F.layer_norm", "F.embedding", "F.multi_head_attention_forward"])
def test_a_function_mode_around_the_step_acts_as_it_does_without_one(name, from_step):
    assert max(errors(Model(USES[name]), Bending, from_step)) < 1e-12
    assert not torch._C._len_torch_function_stack()


def test_modes_around_and_inside_stay_in_their_order():
    class Seen(TorchFunctionMode):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") == "linear":
                order.append(self.name)
            return func(*args, **(kwargs or {}))

    model, order = Model(USES["F.linear"]), []
    with Seen("a"), Seen("b"):
        with projgrad.per_sample(model), Seen("c"):
            F.linear(torch.randn(N, 8), model.w)
        assert order == ["c", "b", "a"] and torch._C._len_torch_function_stack() == 2
        with pytest.raises(ZeroDivisionError), projgrad.per_sample(model), Seen("c"):
            raise ZeroDivisionError
        assert torch._C._len_torch_function_stack() == 2


class Rounded(nn.Parameter):
    """A weight whose layers round what comes in, as with 8-bit activations."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = (args[0] + (args[0].round(decimals=1) - args[0]).detach(), *args[1:])
        return super().__torch_function__(func, types, args, kwargs or {})


class Shy(torch.Tensor):
    """Leaves all to the classes of the other arguments."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if any(t is not cls for t in types):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


class RoundedInput(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = tuple(a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args)
        return func(*[a.round(decimals=1) if func is F.linear and k == 0 else a for k, a in enumerate(args)])


@pytest.mark.parametrize("from_step", [0, 1])
def test_classes_of_weights_and_inputs_act_as_they_do_without_a_tape(from_step):
    model = Model(USES["F.linear"])

    @contextmanager
    def around():
        for layer in (model.first, model.last):
            layer.weight = Rounded(layer.weight.detach().clone())
        yield

    assert max(errors(model, around, from_step)) < 1e-12
    shy = lambda x, w: F.linear(x.as_subclass(Shy), w).as_subclass(torch.Tensor)  # noqa: E731
    model.function = lambda m, x: shy(x, m.last.weight) @ m.w[:3]
    assert max(errors(model, around, from_step)) < 1e-12
    inputs = Model(lambda m, x: F.linear(x.as_subclass(RoundedInput) if m.rounds else x, m.w))

    @contextmanager
    def rounding():
        inputs.rounds = True
        yield

    inputs.rounds = False
    assert max(errors(inputs, rounding, from_step)) < 1e-12


@pytest.mark.parametrize("name", ["F.layer_norm", "F.rms_norm", "F.group_norm"])
def test_hooks_that_round_what_a_norm_keeps_are_refused_in_every_step(name):
    model = Model(USES[name])
    lossy = lambda: saved_tensors_hooks(lambda t: t.round(decimals=1) if t.is_floating_point() else t, lambda t: t)  # noqa: E731
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), 0.01))
    for step in range(4):
        x = torch.randn(N, 8)
        with ExitStack() as stack:
            if step:
                stack.enter_context(lossy())
                stack.enter_context(pytest.raises(ArithmeticError, match="disagree"))
            unlearner.step(lambda x=x: model(-x).square().mean(), lambda x=x: model(x).square().sum(1))


def test_what_torch_jit_traced_is_taken():
    model = Model(USES["F.linear"])
    model.first = torch.jit.trace(model.first, torch.randn(N, 8))
    with pytest.warns(UserWarning, match="one backward pass per sample"):
        assert max(errors(model, nullcontext)) < 1e-12
