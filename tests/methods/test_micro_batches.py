"""Steps on retain and forget sets in micro-batches, against the formula in float64, and what they refuse."""

import copy
import functools
import itertools
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unlearners import flat_parameters

import projgrad
from projgrad import projectors
from projgrad.tape import union

SIZES = (4, 1, 3)


class Problem:
    """A small network, forget and retain samples, and the retain set in micro-batches of unequal sizes."""

    def __init__(self, dtype=torch.float64, sizes=SIZES, width=7, scales=None, inputs=5):
        self.model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)
        n = sum(sizes)
        self.x, self.xf = torch.randn(n, inputs, dtype=dtype), torch.randn(6, inputs, dtype=dtype)
        self.y, self.yf = torch.randint(3, (n,)), torch.randint(3, (6,))
        self.scales, self.sizes = torch.ones(n, dtype=dtype) if scales is None else scales, sizes

    def losses(self, x, y, scales=1.0):
        return scales * F.cross_entropy(self.model(x), y, reduction="none")

    def forget(self):
        return self.losses(self.xf, self.yf).mean()

    def retain(self):
        return self.losses(self.x, self.y, self.scales)

    def parts(self):
        return projgrad.micro_batches(
            self.losses, zip(*(t.split(self.sizes) for t in (self.x, self.y, self.scales)), strict=True)
        )

    def unlearner(self, alpha=0.3, **options):
        return projgrad.OrthoGrad(self.model, torch.optim.SGD(self.model.parameters(), lr=0.1), alpha, **options)

    def update(self, forget, retain, **options):
        """Return .grad after one step from the weights at hand, which are put back, and the record."""
        state = copy.deepcopy(self.model.state_dict())
        record = self.unlearner(**options).step(forget, retain)
        self.model.load_state_dict(state)
        return torch.cat([p.grad.flatten() for p in self.model.parameters()]), record


def written_out(problem, alpha=0.3, scope="global"):
    """The update from all per-sample gradients at once, in float64."""
    twin = copy.deepcopy(problem)
    twin.model.double()
    for name in ("x", "xf", "scales"):
        setattr(twin, name, getattr(problem, name).double())
    params = list(twin.model.parameters())
    flat = lambda grads: torch.cat([g.flatten() for g in grads])  # noqa: E731
    u = (1 - alpha) * flat(torch.autograd.grad(twin.forget(), params))
    G = torch.stack([flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in twin.retain()])
    sizes = [p.numel() for p in params] if scope == "per_tensor" else [len(u)]
    u_perp = torch.cat([projectors.lstsq(*pair) for pair in zip(u.split(sizes), G.split(sizes, 1), strict=True)])
    return alpha * G.mean(0) - u_perp


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


class Scaled(nn.Linear):
    """A linear layer times a parameter without dimensions, which is a small tensor of its own per tensor."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * super().forward(x)


@pytest.mark.same_without_extension
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_a_parameter_without_dimensions(scope):
    problem = Problem()
    problem.model = Scaled(5, 3).double()
    options = {"union_tolerance": 1e-10, "max_passes": 800, "scope": scope}
    update, _ = problem.update(problem.forget, problem.parts(), **options)
    assert relative(update, written_out(problem, scope=scope)) <= 1e-8


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_the_update_is_that_of_one_batch(path, scope, alpha):
    problem = Problem()
    found, record = problem.update(
        problem.forget, problem.parts(), alpha=alpha, scope=scope, union_tolerance=1e-9, max_passes=400
    )
    assert relative(found, written_out(problem, alpha, scope)) < 1e-8
    one, of_one = problem.update(problem.forget, problem.retain, alpha=alpha, scope=scope)
    assert relative(found, one) < 1e-8
    assert record.preserved_norm == pytest.approx(of_one.preserved_norm, rel=1e-7)
    assert record.retain_loss == pytest.approx(of_one.retain_loss) and record.residual <= 1e-9
    assert record.micro_batches == len(SIZES) and record.rank is None and of_one.micro_batches == 1
    assert list(record.tensors) == list(of_one.tensors)


def test_the_default_tolerance_holds_for_the_answer_and_the_record_says_so(monkeypatch):
    problem = Problem(torch.float32, (16,) * 8, width=40, inputs=60)
    monkeypatch.setattr(union, "SMALL", 0)
    found, record = problem.update(problem.forget, problem.parts())
    error = relative(found, written_out(problem))
    assert error < 1e-4 and record.residual < 1e-4
    assert 0.2 * error < record.estimated_error < 1e-4
    assert 3 < record.iterations < 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-5, 1e-6])
@pytest.mark.filterwarnings("ignore:after 100 passes")
def test_samples_that_nearly_repeat_may_count_as_one(distance, dtype, monkeypatch):
    """The estimated error is that to the exact result with or without the directions that tell them apart."""
    monkeypatch.setattr(union, "SMALL", 0)
    problem = Problem(dtype, (8,) * 4, width=40, inputs=30)
    problem.x[16:], problem.y[16:] = problem.x[:16] + distance * torch.randn_like(problem.x[16:]), problem.y[:16]
    problem.xf[:], problem.yf[:] = problem.x[:6] + torch.randn_like(problem.xf), problem.y[:6]
    found, record = problem.update(problem.forget, problem.parts(), alpha=0.0)
    errors = [relative(found, written_out(problem, 0.0))]
    problem.x, problem.y, problem.scales = problem.x[:16], problem.y[:16], problem.scales[:16]
    errors.append(relative(found, written_out(problem, 0.0)))
    assert max(errors) > 1e-2  # those directions are a part of the gradient
    if distance > 1e-3:
        assert errors[0] < errors[1]
    rounding = torch.finfo(dtype).eps / distance  # of what tells them apart
    assert min(errors) <= 10 * record.estimated_error + min(distance, rounding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_repeated_zero_tiny_and_huge_gradients(path, dtype, scope):
    """Samples repeat in other micro-batches and within one; some have no gradient, some one of 1e-20 or 1e15."""
    scales = torch.tensor([1.0, 0.0, 1e15, 1.0, 1e-20, 2.0, 0.0, 1.0], dtype=dtype)
    problem = Problem(dtype, scales=scales)
    problem.x[5], problem.y[5] = problem.x[0], problem.y[0]
    problem.x[7], problem.y[7] = problem.x[3], problem.y[3]
    problem.x[4], problem.y[4] = problem.x[2], problem.y[2]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    options = {"alpha": 0.0, "scope": scope, "union_tolerance": tolerance, "max_passes": 400}
    found, record = problem.update(problem.forget, problem.parts(), **options)
    assert relative(found, written_out(problem, 0.0, scope)) < 4 * tolerance and record.residual <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_more_samples_than_parameters_leave_nothing(path, dtype):
    problem = Problem(dtype, (16,) * 5, width=2)  # 21 parameters
    _, record = problem.update(problem.forget, problem.parts(), alpha=0.0)
    assert record.preserved_norm < 1e-3 and not record.skipped
    mixed, _ = problem.update(problem.forget, problem.parts(), alpha=1.0)
    mean = torch.autograd.grad(problem.retain().mean(), list(problem.model.parameters()))
    torch.testing.assert_close(mixed, torch.cat([g.flatten() for g in mean]), rtol=1e-4, atol=1e-6)


def test_one_closure_in_a_list_is_that_closure():
    problem = Problem()
    found, record = problem.update([problem.forget], (f for f in [problem.retain]))
    assert torch.equal(found, problem.update(problem.forget, problem.retain)[0]) and record.rank == sum(SIZES)


def test_every_closure_is_called_once_a_pass_and_nothing_of_a_pass_stays():
    problem, calls, outputs = Problem(), [], []

    def losses(k, x, y, scales):
        assert all(output() is None for output in outputs)
        calls.append(k)
        logits = problem.model(x)
        outputs.append(weakref.ref(logits))
        return F.cross_entropy(logits, y, reduction="none")

    parts = zip(range(len(SIZES)), *(t.split(SIZES) for t in (problem.x, problem.y, problem.scales)), strict=True)
    _, record = problem.update(problem.forget, projgrad.micro_batches(losses, parts))
    assert calls == list(range(len(SIZES))) * (record.iterations + 1)


def test_learning_rates_of_groups_weigh_the_inner_products():
    problem = Problem()
    results = []
    for retain in (problem.retain, problem.parts()):
        model = problem.model
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.02}]
        state = copy.deepcopy(model.state_dict())
        projgrad.OrthoGrad(model, torch.optim.SGD(groups), 0.3, union_tolerance=1e-10).step(problem.forget, retain)
        results.append(flat_parameters(model))
        model.load_state_dict(state)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_a_gradient_scaler_changes_nothing():
    problem = Problem()
    plain, _ = problem.update(problem.forget, problem.parts(), union_tolerance=1e-10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, _ = problem.update(problem.forget, problem.parts(), union_tolerance=1e-10, scaler=scaler)
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)
    problem.x[6] = torch.inf
    assert problem.unlearner(scaler=scaler).step(problem.forget, problem.parts()).skipped


def test_sixteen_bits_round_the_result_and_nothing_else():
    problem = Problem(torch.bfloat16, (8, 8), width=20)
    found, record = problem.update(problem.forget, problem.parts())
    one, of_one = problem.update(problem.forget, problem.retain)
    assert relative(found, one.double()) < 2e-2 and record.residual < 1e-2
    assert record.preserved_norm == pytest.approx(of_one.preserved_norm, rel=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_forget_closures_add_up_to_the_big_batch(reduction, per_sample, parts):
    problem = Problem()
    sizes = (1, 5) if per_sample else (3, 3)
    forget = projgrad.micro_batches(
        lambda x, y: problem.losses(x, y) if per_sample else problem.losses(x, y).mean(),
        zip(problem.xf.split(sizes), problem.yf.split(sizes), strict=True),
    )
    factor = {"mean": 1, "sum": 6 if per_sample else 2}[reduction]
    retain = problem.parts() if parts else problem.retain
    options = {"union_tolerance": 1e-11, "forget_reduction": reduction}
    found, record = problem.update(forget, retain, **options)
    expected, of_one = problem.update(lambda: factor * problem.forget(), problem.retain)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert record.forget_loss == pytest.approx(of_one.forget_loss)


def test_random_numbers_are_replayed_and_go_on_as_after_one_pass():
    problem = Problem()
    problem.model.insert(2, nn.Dropout(0.5)).train()
    masks = []

    def losses(x, y, scales):
        hidden = problem.model[:3](x)
        masks.append(hidden.detach() == 0)
        return F.cross_entropy(problem.model[3](hidden), y, reduction="none")

    parts = projgrad.micro_batches(
        losses, zip(*(t.split(SIZES) for t in (problem.x, problem.y, problem.scales)), strict=True)
    )
    torch.manual_seed(5)
    _, record = problem.update(problem.forget, parts)
    after = torch.rand(3)
    assert record.iterations > 1
    first = masks[: len(SIZES)]
    assert all(torch.equal(mask, first[k % len(SIZES)]) for k, mask in enumerate(masks))
    torch.manual_seed(5)
    problem.forget()
    for part in parts:
        part()
    assert torch.equal(torch.rand(3), after)


def test_the_limit_of_passes_warns_and_keeps_the_retain_part():
    problem = Problem(torch.float64, (16,) * 8, width=40, inputs=60)
    with pytest.warns(UserWarning, match="after 4 passes over 8 micro-batches the result has a cosine of") as warned:
        found, record = problem.update(problem.forget, problem.parts(), max_passes=4)
    assert warned[0].filename == __file__
    assert record.iterations == 3 and record.estimated_error > 1e-4
    assert 0.1 < relative(found, written_out(problem)) / record.estimated_error < 10


def test_progress_is_shown_where_it_is_wanted(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, that is a terminal
    problem = Problem()
    problem.update(problem.forget, problem.parts())
    assert capsys.readouterr() == ("", "")
    problem.update(problem.forget, problem.parts(), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "residual" in err


def drifting(problem, change):
    """The micro-batches of a problem, the second of which changes from call to call."""
    parts, calls = problem.parts(), itertools.count()
    second = parts[1]
    parts[1] = lambda: change(second, next(calls))
    return parts


def late(problem):
    return [lambda: problem.losses(*xy) for xy in zip(problem.x.split(4), problem.y.split(4), strict=True)]  # noqa: B023


def leaves_gradients(problem):
    parts = problem.parts()
    return [lambda: (parts[0]().sum().backward(), parts[1]())[1], *parts[1:]]


def nan_sample(problem):
    problem.x[4] = torch.nan
    return problem.parts()


def nan_gradient(problem):
    parts = problem.parts()
    zero = torch.zeros(3, dtype=torch.float64)
    root = lambda: parts[2]() + (zero * problem.model[2].bias.sum()).sqrt()  # noqa: E731
    return [*parts[:2], root]


REFUSED = {
    "empty": (lambda p: [], ValueError, "retain is an iterable without closures. A generator is exhausted"),
    "exhausted": (lambda p: (f for f in ()), ValueError, "A generator is exhausted after one step"),
    "not callable": (lambda p: [*p.parts(), 3], TypeError, r"retain\[3\] must be a function without arguments"),
    "a tensor": (lambda p: p.x, TypeError, "retain must be a function without arguments"),
    "one function": (late, ValueError, r"retain\[0\] and retain\[1\] are one function with the same variables"),
    "no samples": (
        lambda p: [*p.parts(), lambda: p.losses(p.x[:0], p.y[:0])],
        ValueError,
        r"retain\[3\]: there are no losses",
    ),
    "a mean": (lambda p: [*p.parts(), p.forget], ValueError, r"retain\[3\]: one loss per sample is needed"),
    "other losses": (
        lambda p: drifting(p, lambda f, k: (1 + k) * f()),
        ValueError,
        r"retain\[1\]: returned other losses than when it was first called in this step",
    ),
    "other length": (
        lambda p: drifting(p, lambda f, k: f() if not k else torch.cat([f(), f()])),
        ValueError,
        r"retain\[1\]: returned 2 losses, and 1 when it was first called",
    ),
    "other structure": (
        lambda p: drifting(p, lambda f, k: f() if not k else (f(), f())),
        ValueError,
        r"retain\[1\]: one loss per sample is needed, shape \(n,\); got tuple",
    ),
    "out of data": (
        lambda p, data=(0,): (lambda it: drifting(p, lambda f, k: (next(it), f())[1]))(iter(data)),
        ValueError,
        r"retain\[1\]\(\) ran out of data, when it was called again",
    ),
    "NaN": (nan_sample, FloatingPointError, r"retain\[1\]: NaN or Inf in the losses of samples \[0\]"),
    "NaN gradient": (nan_gradient, FloatingPointError, r"retain\[2\]: NaN or Inf in the gradient"),
    "gradients left": (leaves_gradients, ValueError, r"retain\[0\]\(\) left a gradient in"),
    "weights changed": (
        lambda p: [*p.parts(), lambda: (p.model[0].bias.data.add_(0), _touch(p), p.retain())[2]],
        ValueError,
        r"retain\[3\]\(\) changed 0.bias in place",
    ),
    "an older graph": (
        lambda p: [*p.parts(), functools.partial(lambda losses: losses, p.retain())],
        ValueError,
        r"retain\[3\]: retain\[3\]\(\) returned losses of a forward pass that was made before",
    ),
}


@torch.no_grad()
def _touch(problem):
    problem.model[0].bias.mul_(1.5)


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_name_the_micro_batch_and_change_nothing(why, monkeypatch):
    monkeypatch.setattr(union, "SMALL", 0)
    problem = Problem()
    make, error, message = REFUSED[why]
    retain, before = make(problem), flat_parameters(problem.model).clone()
    unlearner = problem.unlearner()
    for p in problem.model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(error, match=message):
        unlearner.step(problem.forget, retain)
    assert all(p.grad is None for p in problem.model.parameters())
    if why != "weights changed":
        assert torch.equal(flat_parameters(problem.model), before)


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        (lambda p: [p.forget, p.retain], r"forget\[1\]\(\) returned a loss of shape \(8,\): all closures of forget"),
        (lambda p: [p.forget, lambda: p.retain()[:0]], r"forget\[1\]\(\) must return one loss, or one per sample"),
        (lambda p: [p.forget, lambda: p.forget().item()], r"forget\[1\]\(\) must return a loss; got float"),
        (lambda p: [p.forget, lambda: p.forget().detach()], r"forget\[1\]\(\) returned a loss that does not depend"),
        (lambda p: iter(()), "forget is an iterable without closures"),
        (lambda p: [p.forget, lambda: p.forget() * torch.nan], r"forget\[1\]: NaN or Inf in the losses"),
    ],
)
def test_forget_refusals_name_the_micro_batch(forget, message):
    problem = Problem()
    before = flat_parameters(problem.model).clone()
    with pytest.raises((ValueError, FloatingPointError), match=message):
        problem.unlearner().step(forget(problem), problem.parts())
    assert all(p.grad is None for p in problem.model.parameters())
    assert torch.equal(flat_parameters(problem.model), before)


@pytest.mark.parametrize("options", [{"damping": 0.1}, {"rtol": 1e-3}, {"projector": projectors.qr}])
def test_options_of_one_system_are_refused(options):
    problem = Problem()
    with pytest.raises(ValueError, match="a retain set in micro-batches is solved without projector"):
        problem.unlearner(**options).step(problem.forget, problem.parts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"union_tolerance": 0.0}, r"union_tolerance must be in \(0, 1\)"),
        ({"max_passes": 1}, "max_passes must be an integer of at least 2"),
        ({"progress": "yes"}, "progress must be True or False"),
        ({"forget_reduction": "max"}, "forget_reduction must be 'mean' or 'sum'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Problem().unlearner(**options)


def test_batches_of_a_loader_become_closures():
    seen = []
    for batch in ((1, 2), [1, 2], {"a": 1, "b": 2}, torch.ones(2)):
        (closure,) = projgrad.micro_batches(lambda a, b=2: seen.append((a, b)), [batch])
        closure()
    assert seen[:3] == [(1, 2)] * 3 and torch.equal(seen[3][0], torch.ones(2))
    with pytest.raises(TypeError, match="losses must be a function of one batch"):
        projgrad.micro_batches(3, [])


def test_nothing_is_warned_of_where_it_converged():
    problem = Problem(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.update(problem.forget, problem.parts())


def test_a_loader_that_fills_its_buffers_anew_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="batches 0 and 1 are the same tensors"):
        projgrad.micro_batches(lambda x: x.sum(1), (x.fill_(k) for k in range(3)))
    shared = torch.ones(3)
    assert len(projgrad.micro_batches(lambda x, w: (x * w).sum(1), ((x.clone(), shared) for _ in range(3)))) == 3
