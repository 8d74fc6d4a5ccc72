"""PGU: every use of a weight counts, in the arithmetic and on the model that were fitted."""

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from published_pgu import correlated, fitted, parameters, perceptron, sgd
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO

from projgrad.methods.pgu import input_moments as inputs
from projgrad.methods.pgu.pgu import PGU

F64 = torch.float64
pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings(
        "ignore:PGU protects nothing", "ignore:.*torch.jit", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]


@torch.jit.script
def scripted(x, w):
    return torch.nn.functional.linear(x, w)


@torch.jit.script
def scripted_product(x, w):
    return x @ w


class Own(torch.autograd.Function):
    """A layer with a backward pass of its own; its forward pass is one that can be seen."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.cat([part @ w.t() for part in x.split(3)])

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class Hidden(Own):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return scripted(x, w)


class Numbers(Own):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() @ w.detach().numpy().T)


def in_a_thread(layer, x):
    found = []
    thread = threading.Thread(target=lambda: found.append(layer(x)))
    thread.start()
    thread.join()
    return found[0]


def slope(layer, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]


def without_graph(layer, x):
    with torch.no_grad():
        return layer(x)


# A second use of a layer: (layer, x) -> like x
UNSEEN = {
    "scripted module": lambda layer, x: torch.jit.script(layer)(x),
    "traced module": lambda layer, x: torch.jit.trace(layer, x[:2])(x),
    "scripted function": lambda layer, x: scripted(x, layer.weight),
    "scripted function of a view": lambda layer, x: scripted_product(x, layer.weight.t()),
    "scripted function of rows": lambda layer, x: scripted(x, layer.weight[:]),
    "thread": in_a_thread,
    "function of its own, scripted": lambda layer, x: Hidden.apply(x, layer.weight),
    "function of its own, numpy": lambda layer, x: Numbers.apply(x, layer.weight),
    "numpy": lambda layer, x: torch.from_numpy(x.detach().numpy() @ layer.weight.detach().numpy().T),
    "gradient of the weight": lambda layer, x: (
        x * torch.func.grad(lambda w: F.linear(x, w).square().sum())(layer.weight).sum()
    ),
    "gradient of the input": slope,
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1],
    "beside a checkpoint": lambda layer, x: scripted(checkpoint(layer, x, use_reentrant=True), layer.weight),
    "beside one without a graph": lambda layer, x: scripted(without_graph(layer, x), layer.weight),
}
SEEN = {
    "plain": lambda layer, x: layer(x),
    "view": lambda layer, x: x @ layer.weight.t(),
    "rows": lambda layer, x: F.linear(x, layer.weight[:]),
    "function of its own": lambda layer, x: Own.apply(x, layer.weight),
    "functional call": lambda layer, x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)),
    "checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "reentrant checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "without a graph": without_graph,
    "aten": lambda layer, x: torch.ops.aten.linear(x, layer.weight),
    "written over": lambda layer, x: layer(x.unflatten(0, (2, -1))).add_(x.unflatten(0, (2, -1))).flatten(0, 1).sub_(x),
    "attribute": lambda layer, x: layer(x) * layer.weight.shape[0],
}


class Twice(nn.Module):
    """A layer used by itself and once more; what enters it the second time does not follow from its weight alone."""

    def __init__(self, again):
        super().__init__()
        self.layer, self.head, self.again = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False), again

    def forward(self, x):
        return self.head(self.again(self.layer, F.relu(self.layer(x))))


def fit(model, x, **options):
    """Fitted, and what the warnings said."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pgu = PGU(model, sgd(model), **options).fit(x.split(20))
    return pgu, " ".join(str(w.message) for w in told if "leaves these weights frozen" in str(w.message))


def second_moment(pgu, name):
    U, values = pgu.cache.spectra[name]
    return (U * values[:, None] @ U.mT)[0]


# Under autocast these do not run: another thread has none, numpy no bfloat16, and tracing meets the cast weight.
FLOAT32_ALONE = {"thread", "numpy", "function of its own, numpy", "traced module"}


@pytest.mark.parametrize(
    "name, cast", [(name, cast) for name in UNSEEN for cast in (False, True) if not (cast and name in FLOAT32_ALONE)]
)
def test_a_use_that_is_not_seen_freezes_the_weight_by_name(name, cast):
    model, x = Twice(UNSEEN[name]), torch.randn(40, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        pgu, told = fit(model, x)
    assert set(pgu.bases) == {"head.weight"} and "layer.weight (" in told, told
    assert "layer.weight" in pgu.frozen
    before = model.layer.weight.detach().clone()
    pgu.step(lambda: (model(x[:4]).float(), torch.zeros(4, dtype=torch.long)))
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", SEEN)
def test_a_use_that_is_seen_counts(name, cast):
    model, x = Twice(SEEN[name]), torch.randn(40, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        pgu, told = fit(model, x)
        second = F.relu(model.layer(x)).detach().double()
    assert set(pgu.bases) == {"layer.weight", "head.weight"} and not told
    expected, eps = x.double().T @ x.double() + second.T @ second, torch.finfo(torch.bfloat16 if cast else x.dtype).eps
    assert (second_moment(pgu, "layer.weight") - expected).norm() <= 2 * eps * expected.norm()


@pytest.mark.parametrize("name", ZOO)
def test_every_use_in_the_models_of_the_zoo_is_seen(name):
    case = ZOO[name]()
    watched = {name: p for name, p in case.model.named_parameters() if p.requires_grad and p.ndim > 1}
    moments = inputs.InputMoments(watched)
    with torch.enable_grad(), moments:
        losses = case.losses(case.model)
    assert moments.close(losses) or not moments.moments
    unseen = {name: why for name, why in moments.refused.items() if inputs.UNSEEN in why}
    assert not unseen


def test_a_use_that_is_not_seen_in_a_request_is_refused():
    """Where the fit was without it."""
    model, x = Twice(SEEN["plain"]), torch.randn(40, 6)
    pgu, _ = fit(model, x)
    model.again = UNSEEN["scripted function"]
    with pytest.raises(
        ValueError, match=r"forget: layer.weight is used otherwise .*MmBackward0 uses it with inputs that"
    ):
        pgu.forget([x[:3]])


def test_a_forward_pass_without_a_graph_is_refused():
    """And one within no_grad() is not: only what happens inside it counts."""
    x = torch.randn(40, 6)
    for forward in (torch.no_grad()(lambda m, x: m(x)), torch.inference_mode()(lambda m, x: m(x))):
        with pytest.raises(ValueError, match=r"fit: the forward pass makes no graph for autograd.* leave no_grad"):
            fit(Twice(SEEN["plain"]), x, forward=forward)
    model = Twice(SEEN["plain"])
    with torch.inference_mode(), pytest.raises(ValueError, match=r"fit: call it outside torch.inference_mode\(\)"):
        fit(model, x)
    with torch.no_grad():
        pgu, told = fit(model, x)
    assert len(pgu.bases) == 2 and not told


@pytest.mark.parametrize("result", ["nothing", "object", "dictionary", "numbers"])
def test_what_the_forward_pass_returns_does_not_matter(result):
    """A use that is not seen is found although its output goes nowhere that is seen, if it is returned at all."""

    class Output:
        def __init__(self, y):
            self.more = {"y": [y]}

    convert = {
        "nothing": lambda y: (y.sum(), None)[1],
        "object": Output,
        "dictionary": lambda y: {"a": (y,)},
        "numbers": lambda y: y.detach().numpy(),
    }[result]
    model, x = Twice(lambda layer, x: layer(x)), torch.randn(40, 6)
    pgu, told = fit(model, x, forward=lambda m, x: convert(m(x)))
    assert set(pgu.bases) == {"layer.weight", "head.weight"} and not told
    with pytest.raises(ValueError, match=r"no weight can be projected .*layer.weight: MmBackward0 uses it with inputs"):
        fit(model, x, forward=lambda m, x: convert(scripted(m.layer(x), m.layer.weight)))


def test_activations_are_not_kept():
    """A backward pass inside the forward pass still has them: see "gradient of the input"."""

    def look(layer, x):
        y = layer(x).exp()
        with pytest.raises(RuntimeError, match="runs a backward pass of its own"):
            y.grad_fn._saved_result  # noqa: B018
        return y

    fit(Twice(look), torch.randn(40, 6))


def test_a_backward_pass_in_some_batches_only():
    def sometimes(layer, x):
        return slope(layer, x) if len(x) == 5 else layer(x)

    x = torch.randn(25, 6)
    with pytest.raises(RuntimeError, match=r"that of the first batch did not.* begin with a batch that does"):
        fit(Twice(sometimes), x)
    _, told = fit(Twice(sometimes), x.flip(0)[:5])
    assert "layer.weight" in told


# Arithmetic


def under(dtype):
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize("saved", [False, True], ids=["here", "from a file"])
@pytest.mark.parametrize(
    "fit_in, forget_in", [(BRAIN, None), (None, BRAIN), (BRAIN, HALF), (HALF, BRAIN), (None, HALF)]
)
def test_requests_in_other_arithmetic_than_the_fit_are_refused(fit_in, forget_in, saved, tmp_path):
    model, x = perceptron(torch.float32), correlated(40, 6, torch.float32)
    with under(fit_in):
        pgu = PGU(model, sgd(model), 0.8).fit([x])
    if saved:
        pgu.save(tmp_path / "cache")
        pgu = PGU.load(tmp_path / "cache", model, sgd(model), 0.8)
    cache, there, here = pgu.cache, *(str(t).removeprefix("torch.") for t in (fit_in, forget_in))
    message = f"0.weight gets its inputs in .*{here if forget_in else 'float32'}, and got them in .*"
    with under(forget_in), pytest.raises(ValueError, match=f"{message}{there if fit_in else 'float32'} in fit"):
        pgu.forget([x[:5]])
    assert pgu.cache is cache
    with under(fit_in):
        assert pgu.forget([x[:5]]).cache.n == 35


def test_float32_precision_is_part_of_the_arithmetic(monkeypatch):
    pgu, x, _ = fitted(torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with pytest.raises(ValueError, match="float32 with float32_matmul_precision high, and got them in float32 in fit"):
        pgu.forget([x[:5]])


def test_autocast_that_changes_nothing_is_no_other_arithmetic():
    """It leaves float64 as it is."""
    for fit_in, forget_in in ((None, BRAIN), (BRAIN, None)):
        with under(fit_in):
            pgu, x, _ = fitted(F64)
        with under(forget_in):
            pgu.forget([x[:5]])
        assert pgu.cache.n == 35 and pgu.cache.eps == torch.finfo(F64).eps


# The model


def replaced(model):
    model[2] = nn.Linear(10, 8).double()


def other_width(model):
    model[2], model[4] = nn.Linear(10, 7).double(), nn.Linear(7, 3).double()


def wrapped(model):
    model[2] = nn.Sequential(model[2])


def removed(model):
    model[2] = nn.Linear(10, 8, bias=False).double()


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model[2])


CHANGES = {
    "half": (lambda m: m.half(), r"0.weight was torch.float64 when it was fitted and is torch.float16 now"),
    "cast": (lambda m: m.float(), r"0.weight was torch.float64 when it was fitted and is torch.float32 now"),
    "one layer cast": (lambda m: m[4].float(), r"4.weight was torch.float64 .* and is torch.float32 now"),
    "a bias cast": (lambda m: setattr(m[0].bias, "data", m[0].bias.data.float()), r"0.bias was torch.float64"),
    "moved": (lambda m: m.to("meta"), r"0.weight was|0.weight is another parameter"),
    "replaced": (replaced, r"2.weight is another parameter than the one that was fitted"),
    "other width": (other_width, r"2.weight was \(8, 10\) when it was fitted and is \(7, 10\) now"),
    "wrapped": (wrapped, r"2.weight is no longer in the model"),
    "removed": (removed, r"2.weight is another|2.bias is no longer in the model"),
    "added": (lambda m: m.add_module("5", nn.Linear(3, 3)), r"5.weight is new in the model"),
    "parametrized": (parametrized, r"2.weight is no longer in the model"),
}


@pytest.mark.parametrize("method", ["step", "project_", "forget", "run", "save"])
@pytest.mark.parametrize("name", CHANGES)
def test_another_model_than_the_one_that_was_fitted_is_refused_by_name(name, method, tmp_path):
    """With everything left as it is."""
    pgu, x, y = fitted()
    change, message = CHANGES[name]
    change(pgu.model)
    calls = {
        "step": lambda: pgu.step(lambda: (pgu.model(x), y)),
        "project_": pgu.project_,
        "forget": lambda: pgu.forget([x[:5]]),
        "run": lambda: pgu.run([(x, y)], lambda: (1.0, 0.5)),
        "save": lambda: pgu.save(tmp_path / "cache"),
    }
    cache, before = pgu.cache, parameters(pgu.model)
    with pytest.raises(ValueError, match=f"{method}: ({message}).*, or call fit"):
        calls[method]()
    assert pgu.cache is cache and not list(tmp_path.iterdir())
    if name != "moved":
        assert all(map(torch.equal, before, parameters(pgu.model)))


def test_what_keeps_the_model_is_not_refused():
    """Other numbers, a round trip through another copy, freezing, and a new optimizer."""
    pgu, x, y = fitted()
    pgu.model.load_state_dict({k: v.clone() for k, v in pgu.model.state_dict().items()})
    pgu.step(lambda: (pgu.model(x), y))
    pgu = copy.deepcopy(pgu)
    pgu.model[2].weight.requires_grad_(False)
    pgu.optimizer = sgd(pgu.model)
    record = pgu.step(lambda: (pgu.model(x), y))
    assert record.residual < 1e-12
    assert pgu.forget([x[:5]]).cache.n == 35 and not pgu.model[2].weight.requires_grad
    replaced(pgu.model)
    pgu.optimizer = sgd(pgu.model)
    assert pgu.fit([x]).cache.n == 40
