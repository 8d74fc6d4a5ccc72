"""metric="optimizer" with retain sets in micro-batches: against explicit gradients in float64."""

import contextlib
import copy
import itertools

import pytest
import torch
from metric_problems import EXACT, OPTIMIZERS, SGD, SIZES, AdamW, Halves, Problem, blocks_of, explicit, flat
from torch import nn
from torch.nn import functional as F

import projgrad
from projgrad.methods import union as methods_union
from projgrad.tape import union, weighted_union

pytestmark = pytest.mark.same_without_extension
CLIP = 0.5


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


def test_progress_is_told_of_every_pass(monkeypatch):
    visits = []

    @contextlib.contextmanager
    def recording(options, count):
        yield lambda index, batch, residual: visits.append((index, batch))

    monkeypatch.setattr(methods_union, "_progress", recording)
    problem = Problem()
    record = problem.unlearner(problem.optimizer("adamw")).step(problem.forget, problem.parts())
    assert visits == list(itertools.product(range(record.iterations + 2), range(len(SIZES))))
