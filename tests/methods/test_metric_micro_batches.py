"""metric="optimizer" with retain sets in micro-batches: against explicit gradients in float64, and where it fails."""

import contextlib
import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unlearners import flat_parameters

import projgrad
from projgrad.methods import union as methods_union
from projgrad.tape import union, weighted_union

pytestmark = pytest.mark.same_without_extension
ALPHA, SIZES, CLIP = 0.4, (1, 3, 2, 2), 0.5
EXACT = {"union_tolerance": 1e-10, "max_passes": 800}
SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "rmsprop": (RMSprop, {"lr": 0.01, "centered": True}),
    "rmsprop_momentum": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
}


class Text(nn.Module):
    """A table that is the output head as well, a packed weight used in two parts, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.packed = nn.Parameter(torch.randn(8, 4) / 2)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(9))

    def forward(self, ids):
        a, b = self.packed.chunk(2)
        h = torch.tanh(self.frozen(self.table(ids)) @ a.T) @ b.T
        return self.norm(h) @ self.table.weight.T + self.bias


class Problem:
    """A model, and forget and retain samples; weights: of the retain losses."""

    def __init__(self, sizes=SIZES, dtype=torch.float64, weights=None):
        n, self.sizes = sum(sizes), sizes
        self.model = Text().to(dtype)
        self.forgotten, self.kept = torch.randint(9, (4, 6)), torch.randint(9, (n, 6))
        self.weights = torch.ones(n, dtype=dtype) if weights is None else weights.to(dtype)

    @property
    def params(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def losses(self, ids, weights=1.0):
        logits = self.model(ids)[:, :-1].transpose(1, 2)
        return weights * F.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)

    def forget(self):
        return self.losses(self.forgotten).mean()

    def retain(self):
        return self.losses(self.kept, self.weights)

    def parts(self):
        pairs = zip(self.kept.split(self.sizes), self.weights.split(self.sizes), strict=True)
        return projgrad.micro_batches(self.losses, pairs)

    def optimizer(self, name, ratio=0.3):
        """An optimizer with two parameter groups, of which one is slower."""
        make, options = OPTIMIZERS[name]
        params = self.params
        return make([{"params": params[::2], "lr": ratio * options["lr"]}, {"params": params[1::2]}], **options)

    def unlearner(self, optimizer, alpha=ALPHA, **options):
        return projgrad.OrthoGrad(self.model, optimizer, alpha, metric="optimizer", **EXACT | options)


@pytest.fixture(params=["in_full", "iterated", "recomputed"])
def path(request, monkeypatch):
    """Small tensors are projected in full; without that by iteration, with Gram matrices that are kept or not."""
    if request.param != "in_full":
        monkeypatch.setattr(union, "SMALL", 0)
    if request.param == "recomputed":
        monkeypatch.setattr(union, "HELD", 0)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(loss, params):
    return flat(torch.autograd.grad(loss, params, retain_graph=True)).double()


def explicit(problem):
    """u and G, of all retain samples at once."""
    params = problem.params
    return gradients(problem.forget(), params), torch.stack([gradients(loss, params) for loss in problem.retain()])


def blocks_of(params, scope):
    sizes = [p.numel() for p in params]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(0, sum(sizes))] if scope == "global" else [slice(e - s, e) for s, e in zip(sizes, ends, strict=True)]


def out_of_span(G, D, change):
    """The change less D Gᵀ c that is orthogonal to every row, for any rank of G."""
    roots = D.sqrt()
    unit = G * roots
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-300)
    _, values, V = torch.linalg.svd(unit, full_matrices=False)
    V = V[values > 1e-10 * values.max()] if values.numel() else V
    scaled = change / roots
    return roots * (scaled - V.T @ (V @ scaled))


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_forgetting_part_is_that_of_the_formula(name, scope, monkeypatch):
    """F and its metric are those that one batch has; that they are right is tested there."""
    problem = Problem()
    optimizer, params, seen = problem.optimizer(name), problem.params, []
    unlearner = problem.unlearner(optimizer, scope=scope, max_norm=CLIP)
    correct = weighted_union.HeldUnion.correct_

    def spy(self, change, diagonal, *rest):
        D = [torch.as_tensor(diagonal(key), dtype=F.dtype).expand_as(F) for key, F in change.items()]
        seen.append((flat(change.values()), flat(D)))
        return correct(self, change, diagonal, *rest)

    monkeypatch.setattr(weighted_union.HeldUnion, "correct_", spy)
    for _ in range(3):
        _, G = explicit(problem)
        record = unlearner.step(problem.forget, problem.parts())
        before, D = seen.pop()
        after = before.clone()
        for part in blocks_of(params, scope):
            after[part] = out_of_span(G[:, part], D[part], before[part])
        norm = before.norm().item()
        torch.testing.assert_close(flat([p.grad for p in params]), after, rtol=1e-8, atol=1e-9 * norm)
        assert record.preserved_norm == pytest.approx(float(after.norm() / norm), rel=1e-7)
        assert record.residual < 1e-9 and record.micro_batches == len(SIZES) and record.rank is None


def same_after(problem, steps, name="adamw", **options):
    """Take steps from the same weights, with micro-batches and with one batch; return what is left of both."""
    outcomes = []
    for parts in (True, False):
        twin = copy.deepcopy(problem)
        optimizer = twin.optimizer(name)
        unlearner = twin.unlearner(optimizer, **options)
        for _ in range(steps):
            record = unlearner.step(twin.forget, twin.parts() if parts else twin.retain)
        kept = [torch.zeros(1)]  # SGD may have no state
        kept += [value for p in twin.params for _, value in sorted(optimizer.state[p].items())]
        outcomes.append((flat(twin.params), flat([p.grad for p in twin.params]), flat(kept), record))
    return outcomes


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize(("name", "alpha"), [(name, 0.4) for name in OPTIMIZERS] + [("adamw", 0.0), ("adamw", 1.0)])
def test_steps_are_those_with_one_batch(name, alpha, scope):
    """Parameters, .grad and the state of the optimizer, M included."""
    parts, one = same_after(Problem(), 3, name, alpha=alpha, scope=scope, max_norm=CLIP)
    for found, wanted in zip(parts[:3], one[:3], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    found, wanted = parts[3], one[3]
    assert found.retain_loss == pytest.approx(wanted.retain_loss)
    assert found.forget_loss == pytest.approx(wanted.forget_loss)
    assert found.preserved_norm == pytest.approx(wanted.preserved_norm, rel=1e-6)
    assert list(found.tensors) == list(wanted.tensors)


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_all_ways_to_the_same_step(path, scope):
    parts, one = same_after(Problem(), 2, scope=scope)
    torch.testing.assert_close(parts[0], one[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gram_matrices_of_micro_batches_are_in_the_metric(name, monkeypatch):
    """That of all samples that have a gradient is the whole system, and its first solution exact."""
    monkeypatch.setattr(union, "SMALL", 0)
    problem = Problem((6, 2), weights=torch.tensor([1.0] * 6 + [0.0] * 2))
    optimizer = problem.optimizer(name, ratio=1e-3)
    record = problem.unlearner(optimizer).step(problem.forget, problem.parts())
    assert record.iterations <= 2 and record.residual < 1e-9


@pytest.mark.parametrize("sizes", [(8,), (7, 1), (3, 3, 2), (1, 4, 1, 2, 3, 1, 2)])
def test_any_number_of_micro_batches(sizes):
    parts, one = same_after(Problem(sizes), 2)
    torch.testing.assert_close(parts[0], one[0], rtol=1e-8, atol=1e-10)
    assert parts[3].micro_batches == len(sizes)


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_repeated_zero_tiny_and_huge_gradients(path, dtype, scope):
    """alpha = 0: the optimizer's D knows nothing of the retain gradients."""
    problem = Problem(dtype=dtype, weights=torch.tensor([1.0, 0.0, 1e15, 1e-36, 1e-20, 2.0, 0.0, 1.0]))
    problem.kept[5], problem.kept[7], problem.kept[4] = problem.kept[0], problem.kept[3], problem.kept[2]
    _, G = explicit(problem)
    optimizer = AdamW(problem.params, 1e-2, weight_decay=0.0)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    unlearner = problem.unlearner(optimizer, 0.0, scope=scope, union_tolerance=tolerance)
    before = flat(problem.params).double()
    record = unlearner.step(problem.forget, problem.parts())
    moved = flat(problem.params).double() - before
    for part in blocks_of(problem.params, scope):
        norms = G[:, part].norm(dim=1, keepdim=True)
        unit = G[:, part] / norms.where(norms > 1e-31, torch.inf)  # in float32 digits of shorter ones are missing
        noise = 4 * torch.finfo(dtype).eps * before.norm()
        assert (unit @ moved[part]).abs().max() <= tolerance * moved[part].norm() + noise
    assert record.iterations < 100


class Wide:
    """A network whose weights are far more than the samples, with dropout if it is wanted."""

    def __init__(self, dtype=torch.float32, count=8, dropout=0.0):
        self.model = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Dropout(dropout), nn.Linear(40, 4)).to(dtype)
        self.x, self.xf = torch.randn(16 * count, 60, dtype=dtype), torch.randn(6, 60, dtype=dtype)
        self.y, self.yf = torch.randint(4, (16 * count,)), torch.randint(4, (6,))
        self.masks = []

    def losses(self, x, y):
        hidden = self.model[:3](x)
        self.masks.append(hidden.detach() != 0)
        return F.cross_entropy(self.model[3](hidden), y, reduction="none")

    def forget(self):
        return F.cross_entropy(self.model(self.xf), self.yf)

    def retain(self):
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def parts(self):
        return projgrad.micro_batches(self.losses, zip(self.x.split(16), self.y.split(16), strict=True))

    def ascent(self, make, alpha=0.0, **options):
        """With alpha = 0 and no decay the whole change forgets: return it, the record and unit retain gradients."""
        params = list(self.model.parameters())
        G = torch.stack([gradients(loss, params) for loss in self.retain()])
        before = flat(params).double()
        unlearner = projgrad.OrthoGrad(self.model, make(params), alpha, metric="optimizer", **options)
        record = unlearner.step(self.forget, self.parts())
        return flat(params).double() - before, record, G / G.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("make", [AdamW, RMSprop, SGD], ids=lambda kind: kind.__name__)
def test_the_default_tolerance_holds_in_float32_and_the_record_tells_what_is_left(make, monkeypatch):
    problem = Wide()
    monkeypatch.setattr(union, "SMALL", 0)
    options = {"weight_decay": 0.0} if make is AdamW else {}
    moved, record, unit = problem.ascent(lambda p: make(p, lr=1e-3, **options))
    cosine = float((unit @ moved).abs().max() / moved.norm())
    assert cosine <= 1e-4 and abs(cosine - record.residual) <= 1e-5
    assert 3 < record.iterations < 100 and 0 < record.estimated_error < 1e-4
    # Once for the retain part, once for every iteration, and at least once for what was applied.
    passes = len(problem.masks) / 8
    assert record.iterations + 2 <= passes <= record.iterations + 5


def test_a_change_as_small_as_the_rounding_of_the_weights_ends_the_iteration():
    problem = Wide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved, record, unit = problem.ascent(lambda p: AdamW(p, lr=3e-8, weight_decay=0.0))
    cosine = float((unit @ moved).abs().max() / moved.norm())
    assert 1e-4 < cosine < 1e-1 and record.residual == pytest.approx(cosine, rel=0.1)
    assert record.iterations < 60 and record.estimated_error < 1e-4


def test_rounding_is_taken_back_where_the_iteration_goes_on(monkeypatch):
    """Else what it measures is rounding, and it would never end."""
    problem, measured = Wide(), []
    is_rounding = weighted_union.ChangeUnion._is_rounding

    def spy(self, before):
        measured.append(before)
        return len(measured) > 1 and is_rounding(self, before)

    monkeypatch.setattr(weighted_union.ChangeUnion, "_is_rounding", spy)
    _, record, _ = problem.ascent(lambda p: AdamW(p, lr=3e-8, weight_decay=0.0))
    assert len(measured) == 2 and max(measured) < 1e-4 < record.residual and record.iterations < 60


def test_a_tensor_that_the_samples_span_has_no_direction_left():
    problem = Wide(count=4)
    _, record, _ = problem.ascent(lambda p: AdamW(p, lr=1e-5, weight_decay=0.0), scope="per_tensor")
    bias = record.tensors["3.bias"]  # 4 elements, and 64 samples
    assert bias.preserved_norm < 0.1 and bias.residual < 1e-2


def test_16_bit_parameters_leave_what_their_rounding_leaves():
    problem = Wide(torch.bfloat16, 2)
    moved, record, unit = problem.ascent(lambda p: AdamW(p, lr=1e-2, weight_decay=0.0))
    cosine = float((unit @ moved).abs().max() / moved.norm())
    assert moved.norm() > 0 and cosine < 5e-2 and record.residual < 5e-2


def test_the_limit_of_passes_warns():
    problem = Wide(torch.float64)
    with pytest.warns(UserWarning, match="after 3 passes over 8 micro-batches the result has a cosine of") as warned:
        moved, record, unit = problem.ascent(lambda p: AdamW(p, lr=1e-2, weight_decay=0.0), max_passes=4)
    assert warned[0].filename == __file__ and len(problem.masks) == 4 * 8
    assert record.residual == pytest.approx(float((unit @ moved).abs().max() / moved.norm()), rel=1e-6)


def test_dropout_has_the_same_masks_before_and_after_the_optimizer_steps():
    problem = Wide(torch.float64, 3, dropout=0.5)
    params = list(problem.model.parameters())
    twin = copy.deepcopy(problem.model)
    before = flat(params)
    optimizer = AdamW(params, 1e-2, weight_decay=0.0)
    unlearner = projgrad.OrthoGrad(problem.model, optimizer, 0.0, metric="optimizer", union_tolerance=1e-9)
    torch.manual_seed(3)
    unlearner.step(problem.forget, problem.parts())
    after = torch.rand(3)
    first, moved = problem.masks[:3], flat(params) - before
    assert all(torch.equal(mask, first[k % 3]) for k, mask in enumerate(problem.masks))
    for x, y, mask in zip(problem.x.split(16), problem.y.split(16), first, strict=True):
        losses = F.cross_entropy(twin[3](2 * mask * torch.tanh(twin[0](x))), y, reduction="none")
        G = torch.stack([gradients(loss, list(twin.parameters())) for loss in losses])
        assert (G @ moved).abs().max() < 1e-8 * G.norm(dim=1).max() * moved.norm()
    torch.manual_seed(3)
    problem.forget()
    for part in problem.parts():
        part()
    assert torch.equal(torch.rand(3), after)


class LoRA(nn.Module):
    """A frozen layer with an adapter, whose second factor is zero: the gradient of the first one is zero at first."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(12, 6).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.zeros(6, 2))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_an_adapter_whose_gradient_is_zero_at_first(path, scope):
    """D is 1e6 there, 1e8 times as much as elsewhere."""
    model = LoRA().double()
    x, xf = torch.randn(6, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    y, yf = torch.randint(6, (6,)), torch.randint(6, (3,))
    outcomes = []
    for parts in (True, False):
        twin = copy.deepcopy(model)
        losses = lambda x, y, m=twin: F.cross_entropy(m(x), y, reduction="none")  # noqa: E731
        retain = projgrad.micro_batches(losses, zip(x.split(2), y.split(2), strict=True)) if parts else None
        optimizer = AdamW([twin.A, twin.B], 1e-2)
        unlearner = projgrad.OrthoGrad(twin, optimizer, 0.3, metric="optimizer", scope=scope, **EXACT)
        for _ in range(2):
            unlearner.step(lambda f=losses: f(xf, yf).mean(), retain or (lambda f=losses: f(x, y)))
        outcomes.append(flat([twin.A, twin.B]))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [AdamW, SGD], ids=lambda kind: kind.__name__)
def test_a_group_with_a_learning_rate_of_zero_stays(path, make):
    problem = Problem()
    first, *rest = problem.params
    before = first.clone()
    start, (_, G) = flat(problem.params), explicit(problem)
    optimizer = make([{"params": [first], "lr": 0.0}, {"params": rest}], 1e-2, weight_decay=0.0)
    problem.unlearner(optimizer, 0.0).step(problem.forget, problem.parts())
    moved = flat(problem.params) - start
    assert torch.equal(first, before) and moved.norm() > 0
    assert (G @ moved).abs().max() < 1e-9 * G.norm(dim=1).max() * moved.norm()


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_parameters_that_only_one_side_uses(scope):
    problem = Problem()
    extra, other = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    problem.model.register_parameter("extra", extra)
    problem.model.register_parameter("other", other)
    optimizer = AdamW(problem.params, 1e-2, weight_decay=0.1)
    parts = [lambda f=f: f() + (other**2).sum() for f in problem.parts()]
    problem.unlearner(optimizer, 0.0, scope=scope).step(lambda: problem.forget() + (extra**2).sum(), parts)
    assert (extra > 1).all() and torch.equal(other, torch.ones_like(other)) and other.grad is None
    problem.unlearner(optimizer, 0.5, scope=scope).step(lambda: problem.forget() + (extra**2).sum(), parts)
    assert (other < 1).all()


class Halves(torch.optim.Optimizer):
    """p ← p - d g with d = 0.2 or 0.1 in turn, and it says so. It counts its steps, in its state and its settings."""

    factor = 1.0

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "steps": 0})

    def diagonal(self, param, state, group):
        return self.factor * group["lr"] * (2 - torch.arange(param.numel()) % 2).to(param).view_as(param)

    @torch.no_grad()
    def step(self):
        self.param_groups[0]["steps"] += 1
        for p in self.param_groups[0]["params"]:
            self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
            p -= 0.1 * (2 - torch.arange(p.numel()) % 2).to(p).view_as(p) * p.grad


def test_an_optimizer_that_says_its_diagonal(path):
    problem = Problem()
    before, (_, G) = flat(problem.params), explicit(problem)
    optimizer = Halves(problem.params)
    problem.unlearner(optimizer, 0.0).step(problem.forget, problem.parts())
    moved = flat(problem.params) - before
    assert (G @ moved).abs().max() < 1e-9 * G.norm(dim=1).max() * moved.norm()
    before, optimizer.factor = flat(problem.params), 0.0
    with pytest.raises(ValueError, match="must be positive and finite"):
        problem.unlearner(optimizer, 0.0).step(problem.forget, problem.parts())
    assert torch.equal(flat(problem.params), before)
    assert all(held["steps"] == 1 for held in (*optimizer.state.values(), optimizer.param_groups[0]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("parts", [False, True])
def test_forget_closures_add_up_to_the_big_batch(reduction, parts):
    problem = Problem()
    outcomes, factor = [], 1 if reduction == "mean" else 4
    for forget in (
        projgrad.micro_batches(problem.losses, zip(problem.forgotten.split((1, 3)))),
        lambda: factor * problem.forget(),
    ):
        start = copy.deepcopy(problem.model.state_dict())
        unlearner = problem.unlearner(problem.optimizer("adamw"), forget_reduction=reduction)
        record = unlearner.step(forget, problem.parts() if parts else problem.retain)
        outcomes.append((flat(problem.params), record.forget_loss))
        problem.model.load_state_dict(start)
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-9, atol=1e-10)
    assert outcomes[0][1] == pytest.approx(outcomes[1][1])


def test_a_gradient_scaler_changes_nothing_and_skips_steps():
    """It grows at every step, between the first pass and the others."""
    problem = Problem()
    other = copy.deepcopy(problem)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    scaled = problem.unlearner(problem.optimizer("adamw"), scaler=scaler, max_norm=CLIP)
    plain = other.unlearner(other.optimizer("adamw"), max_norm=CLIP)
    for _ in range(2):
        scaled.step(problem.forget, problem.parts())
        plain.step(other.forget, other.parts())
    torch.testing.assert_close(flat(problem.params), flat(other.params), rtol=1e-9, atol=1e-10)
    assert scaler.get_scale() == 2.0**12
    before = flat(problem.params)
    record = scaled.step(lambda: problem.forget() * float("inf"), problem.parts())
    assert record.skipped and torch.equal(flat(problem.params), before) and scaler.get_scale() == 2.0**11


def test_what_is_resumed_from_a_state_dict_has_the_same_bits():
    problem = Problem(dtype=torch.float32)
    optimizer = problem.optimizer("adamw")
    unlearner = problem.unlearner(optimizer, union_tolerance=1e-4)
    for _ in range(2):
        unlearner.step(problem.forget, problem.parts())
    twin = copy.deepcopy(problem)
    again = twin.optimizer("adamw")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    unlearner.step(problem.forget, problem.parts())
    twin.unlearner(again, union_tolerance=1e-4).step(twin.forget, twin.parts())
    assert torch.equal(flat(twin.params), flat(problem.params))
    for p, q in zip(problem.params, twin.params, strict=True):
        assert all(torch.equal(value, again.state[q][key]) for key, value in optimizer.state[p].items())


def test_momentum_brings_back_nothing():
    """A step without a forget gradient: the momentum of earlier ones moves on, orthogonally."""
    problem = Wide(torch.float64, 3)
    optimizer = SGD(problem.model.parameters(), 1e-2, momentum=0.9)
    forget = problem.forget
    for weight in (1.0, 0.0):
        problem.forget = lambda weight=weight: weight * forget()
        moved, _, unit = problem.ascent(lambda _: optimizer, union_tolerance=1e-9)
    assert moved.norm() > 0 and (unit @ moved).abs().max() < 1e-8 * moved.norm()


class Broken(Exception):
    """What a closure of a test raises."""


def fails(call, how):
    """Make the second micro-batch do something wrong when it is called for the `call`-th time."""

    def change(problem):
        parts, calls = problem.parts(), itertools.count(1)
        second = parts[1]

        def broken():
            if next(calls) < call:
                return second()
            if isinstance(how, BaseException):
                raise how
            return how(second())

        return [parts[0], broken, *parts[2:]]

    return change


FAILURES = {
    "an error in the second call": (fails(2, Broken()), Broken),
    "an error in the third call": (fails(3, Broken()), Broken),
    "an interrupt": (fails(3, KeyboardInterrupt()), KeyboardInterrupt),
    "out of data": (fails(2, StopIteration()), ValueError),
    "other losses": (fails(2, lambda losses: 1.1 * losses), ValueError),
    "fewer losses": (fails(3, lambda losses: losses[:-1]), ValueError),
    "NaN": (fails(3, lambda losses: losses * torch.nan), FloatingPointError),
    "a mean": (fails(2, lambda losses: losses.mean()), ValueError),
}


def bits(problem, optimizer, scaler):
    """Everything that a step may change, and which tensors hold it."""
    state = {(k, key): value for k, p in enumerate(problem.params) for key, value in optimizer.state[p].items()}
    if not state:
        optimizer.state.clear()  # a look at it makes entries
    held = {key: (id(value), value.clone()) for key, value in state.items() if isinstance(value, torch.Tensor)}
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return flat(problem.params), held, copy.deepcopy(settings), scaler and scaler.state_dict()


def assert_same_bits(problem, optimizer, scaler, before):
    after = bits(problem, optimizer, scaler)
    assert torch.equal(after[0], before[0]) and after[1].keys() == before[1].keys() and after[2:] == before[2:]
    for key, (identity, value) in after[1].items():
        assert identity == before[1][key][0] and torch.equal(value, before[1][key][1])
    assert all(p.grad is None for p in problem.params)


@pytest.mark.parametrize(("earlier", "scaled"), [(0, False), (0, True), (2, True)])
@pytest.mark.parametrize("why", FAILURES)
def test_an_error_after_the_optimizer_stepped_leaves_everything_as_it_was(why, earlier, scaled):
    make, error = FAILURES[why]
    problem = Problem()
    optimizer = problem.optimizer("adamw" if scaled else "nesterov")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1) if scaled else None
    unlearner = problem.unlearner(optimizer, scaler=scaler, union_tolerance=1e-4)
    for _ in range(earlier):
        unlearner.step(problem.forget, problem.parts())
    if scaled and not earlier:
        scaler.scale(torch.ones(()))  # so that it has a state
    before = bits(problem, optimizer, scaler)
    with pytest.raises(error):
        unlearner.step(problem.forget, make(problem))
    assert_same_bits(problem, optimizer, scaler, before)
    unlearner.step(problem.forget, problem.parts())  # and the next step is like any other


@pytest.mark.parametrize("when", [0, 1, 4, 5, 7, 9])
def test_an_interrupt_while_weights_are_exchanged_leaves_everything_as_it_was(when, monkeypatch):
    problem = Problem()
    optimizer = problem.optimizer("adamw")
    unlearner = problem.unlearner(optimizer)
    unlearner.step(problem.forget, problem.parts())
    before, copies = bits(problem, optimizer, None), itertools.count()
    aside = weighted_union.aside

    def interrupted(t):
        if next(copies) == when:
            raise KeyboardInterrupt
        return aside(t)

    monkeypatch.setattr(weighted_union, "aside", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unlearner.step(problem.forget, problem.parts())
    assert next(copies) == when + 1
    assert_same_bits(problem, optimizer, None, before)


@pytest.mark.parametrize("name", ["momentum", "adamw", "rmsprop_momentum"])
def test_an_error_while_momenta_are_corrected_leaves_everything_as_it_was(name, monkeypatch):
    problem = Problem()
    optimizer = problem.optimizer(name)
    unlearner = problem.unlearner(optimizer)
    unlearner.step(problem.forget, problem.parts())
    before = bits(problem, optimizer, None)
    finish = weighted_union.ChangeUnion.finish_

    def broken(self, carry):
        finish(self, carry)
        raise Broken

    monkeypatch.setattr(weighted_union.ChangeUnion, "finish_", broken)
    with pytest.raises(Broken):
        unlearner.step(problem.forget, problem.parts())
    assert_same_bits(problem, optimizer, None, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_refused_before_the_optimizer_steps_changes_nothing(bad):
    problem = Problem()
    optimizer = problem.optimizer("adamw")
    problem.weights[3] = bad
    before = flat_parameters(problem.model)
    with pytest.raises(FloatingPointError, match=r"retain\[1\]: NaN or Inf in the losses of samples \[2\]"):
        problem.unlearner(optimizer).step(problem.forget, problem.parts())
    assert torch.equal(flat_parameters(problem.model), before) and not optimizer.state
    with pytest.raises(ValueError, match="solved without projector, damping, rtol"):
        problem.unlearner(optimizer, damping=0.1).step(problem.forget, problem.parts())


def test_a_gradient_that_is_not_finite_changes_nothing():
    problem = Problem()
    zero = torch.zeros((), dtype=torch.float64)
    broken = lambda: problem.forget() + (zero * problem.model.bias.sum()).sqrt()  # noqa: E731
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient to project"):
        problem.unlearner(problem.optimizer("adamw")).step(broken, problem.parts())
    model = nn.Linear(2, 1).half()
    optimizer, before = SGD(model.parameters(), 0.1), flat(model.parameters())
    unlearner = projgrad.OrthoGrad(model, optimizer, 0.5, ascend=False, metric="optimizer")
    x = torch.eye(2).half()
    retain = [
        lambda k=k: 4e4 * model(x[k : k + 1])[:, 0] for k in range(2)
    ]  # the bias has 2e4 and 5e4: 65504 is the end
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient of the step"):
        unlearner.step(lambda: 6e4 * model.bias.sum() + 4e4 * model.bias.sum(), retain)
    assert torch.equal(flat(model.parameters()), before)


def test_progress_is_told_of_every_pass(monkeypatch):
    visits = []

    @contextlib.contextmanager
    def recording(options, count):
        yield lambda index, batch, residual: visits.append((index, batch))

    monkeypatch.setattr(methods_union, "_progress", recording)
    problem = Problem()
    record = problem.unlearner(problem.optimizer("adamw")).step(problem.forget, problem.parts())
    assert visits == list(itertools.product(range(record.iterations + 2), range(len(SIZES))))
