"""PGU: deletion requests, the schedule, refusals."""

import copy
import math

import pytest
import torch
from published_pgu import angle, correlated, fitted, parameters, perceptron, sgd
from torch import nn

from projgrad.methods.pgu.loss import unlearning_loss
from projgrad.methods.pgu.pgu import PGU

F64 = torch.float64
pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:PGU protects nothing")]


# Deletion


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_requests_follow_one_another(dtype):
    """Three requests with steps between them: the second moments of the rest, under the weights that were fitted."""
    pgu, x, y = fitted(dtype)
    model = copy.deepcopy(pgu.model)
    for start, end in ((0, 5), (5, 9), (9, 20)):
        pgu.forget([x[start:end]])
        pgu.step(lambda s=start, e=end: (pgu.model(x[s:e]), y[s:e]))
        reference = PGU(model, sgd(model), 0.8).fit([x[end:]])
        assert pgu.cache.n == len(x) - end
        for name, (U, values) in pgu.cache.spectra.items():
            V, expected = reference.cache.spectra[name]
            a, b = (u * v[:, None] @ u.mT for u, v in ((U, values), (V, expected)))
            assert (a - b).norm() <= 64 * torch.finfo(dtype).eps * b.norm()
            if dtype == F64:
                assert pgu.bases[name].ranks == reference.bases[name].ranks
                assert angle(pgu.bases[name].M[0], reference.bases[name].M[0]) <= 1e-6
    pgu.forget([x[20:]])
    assert pgu.cache.n == 0 and all(b.rank == 0 for b in pgu.bases.values())


def test_rounding_of_earlier_requests_is_allowed_for(tmp_path):
    """The first takes two units in the last place too much, more than the small samples are; they can still go."""
    x = torch.cat([torch.randn(20, 6), 1e-5 * torch.randn(4, 6)])
    model = nn.Sequential(nn.Linear(6, 3))
    pgu = PGU(model, sgd(model), check_samples=False).fit([x])
    pgu.forward = lambda model, x: model(x * (1 + 2.0**-22))
    pgu.forget([x[:20]]).save(tmp_path / "cache")
    again = PGU.load(tmp_path / "cache", model, sgd(model), check_samples=False)
    for one in x[20:].split(1):
        again.forget([one])
    assert again.cache.n == 0


def test_deletion_leaves_the_model_as_it_is():
    pgu, x, y = fitted()
    pgu.step(lambda: (pgu.model(x), y))
    before = parameters(pgu.model)
    seen = []
    pgu.forward = lambda model, x: seen.append(model(x))
    pgu.forget([x[:3]])
    assert all(map(torch.equal, before, parameters(pgu.model)))
    assert not torch.equal(seen[0], pgu.model(x[:3]))  # it ran with the fitted weights

    def fails(model, x):
        raise KeyboardInterrupt

    pgu.forward, cache = fails, pgu.cache
    with pytest.raises(KeyboardInterrupt):
        pgu.forget([x[3:5]])
    assert all(map(torch.equal, before, parameters(pgu.model))) and pgu.cache is cache


def test_forgotten_samples_are_counted_with_their_duplicates():
    """Duplicates are a multiset; labels are not part of a sample."""
    model, x = perceptron(), correlated(6, 6)
    pgu = PGU(model, sgd(model)).fit([(torch.cat([x, x[:1]]), torch.zeros(7))])
    pgu.forget([(x[:1], torch.ones(1))])
    pgu.forget([[x[:1]]])
    with pytest.raises(ValueError, match=r"sample 1 is not among the 5 that are left"):
        pgu.forget([x[1:2], x[:1]])
    with pytest.raises(ValueError, match=r"sample 1 is not among the 5 that are left"):
        pgu.forget([x[[2, 2]]])
    assert pgu.cache.n == 5


def test_dictionaries_in_any_order():
    from collections import UserDict  # what tokenizers return is one

    model, (a, b) = perceptron(), torch.randn(2, 8, 6, dtype=F64)
    pgu = PGU(model, sgd(model), forward=lambda model, batch: model(batch[0]["a"] - batch[0]["b"] ** 2))
    y = torch.zeros(8)
    pgu.fit([(UserDict(a=a, b=b), y)]).forget([(UserDict(b=b[:2], a=a[:2]), y[:2])])
    for wrong in (UserDict(a=b[2:], b=a[2:]), UserDict(a=a[2:] + 1, b=b[2:])):
        with pytest.raises(ValueError, match="sample 0 is not among the 6"):
            pgu.forget([(wrong, y[2:])])


def test_what_was_not_fitted_is_refused():
    pgu, x, _ = fitted(check_samples=False)
    assert pgu.cache.samples is None
    cache = pgu.cache
    with pytest.raises(ValueError, match=r"what is left of 0.weight has an eigenvalue of -.* without augmentation"):
        pgu.forget([3 * torch.randn(20, 6, dtype=F64)])
    with pytest.raises(ValueError, match="41 samples or more, but only 40 are left"):
        pgu.forget([x, x[:1]])
    with pytest.raises(ValueError, match=r"all 6 samples are gone, but something is left of 0.weight.* dimension 0"):
        misread = PGU(pgu.model, pgu.optimizer, check_samples=False).fit([x.expand(6, 40, 6)])
        misread.forget([x[:2].expand(6, 2, 6)])
    zeros = PGU(pgu.model, pgu.optimizer, check_samples=False).fit([0 * x])
    with pytest.raises(ValueError, match=r"0.weight has an eigenvalue of -.* where the largest was 0.0e\+00,"):
        zeros.forget([x[:2]])
    pgu.model[0].bias.data += 1
    with pytest.raises(ValueError, match="something besides the projected weights has changed"):
        pgu.forget([x[:2]])
    assert pgu.cache is cache


# The schedule


@pytest.mark.parametrize(
    "stop, pairs, kept, reason",
    [
        ("validation", [(1.0, 0.8), (0.9, 0.8), (0.75, 0.8)], 2, "stopped"),  # 0.05 apart, before 0.1
        ("validation", [(1.0, 0.8), (0.81, 0.8), (0.7, 0.8)], 1, "stopped"),
        ("validation", [(0.1, 0.8)], 0, "stopped"),
        ("validation", [(1.0, 0.8)] * 5, 4, "finished"),
        ("retain", [(1.0, 0.9), (0.5, 0.86), (0.1, 0.84)], 1, "stopped"),
        ("retain", [(1.0, 0.52)] + [(0.5, 0.47)] * 4, 4, "finished"),  # not more than 0.05
    ],
)
def test_each_stop_rule_ends_at_its_threshold(stop, pairs, kept, reason):
    pgu, x, y = fitted()
    pgu.forget([x[:8]])
    states, lrs, told = [], [], []

    def validate():
        states.append(parameters(pgu.model))
        lrs.append(pgu.optimizer.param_groups[0]["lr"])
        return pairs[len(states) - 1]

    batches = [(x[:4], y[:4]), (x[4:8], y[4:8])]
    done = pgu.run(batches, validate, epochs=4, lr=(0.1, 0.0001), stop=stop, progress=told.append)
    assert (done.kept, done.reason, done.error) == (kept, reason, "") and told == done.epochs
    assert [(e.forget_accuracy, e.other_accuracy) for e in done.epochs] == pairs
    assert all(map(torch.equal, parameters(pgu.model), states[kept]))
    assert lrs[1:] == pytest.approx([0.1, 0.01, 0.001, 0.0001][: len(lrs) - 1])
    assert pgu.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("how", ["loss", "accuracy", "weights"])
def test_a_run_that_diverges_keeps_the_last_good_model(how):
    pgu, x, y = fitted()
    states = []

    def validate():
        states.append(parameters(pgu.model))
        return (math.nan if how == "accuracy" and len(states) == 3 else 1.0), 0.5

    def forward(model, batch):
        out = model(batch[0])
        return out * math.inf if how == "loss" and len(states) == 2 else out

    def explode(*_):
        if how == "weights" and len(states) == 2:
            pgu.model[0].weight.data[0, 0] = math.inf

    pgu.forward = forward
    pgu.optimizer.register_step_post_hook(explode)
    done = pgu.run([(x[:8], y[:8])], validate, epochs=5)
    assert done.reason == "diverged" and done.kept == 1 and done.error
    assert all(map(torch.equal, parameters(pgu.model), states[1]))


# Refusals


def test_non_finite_losses_and_gradients():
    for bad in (math.nan, math.inf):
        pgu, x, _ = fitted()
        before = parameters(pgu.model)
        with pytest.raises(FloatingPointError, match=f"forget loss is {bad}; nothing was changed"):
            pgu.step(lambda pgu=pgu, x=x, bad=bad: pgu.model(x).sum() * bad)
        with pytest.raises(FloatingPointError, match=r"gradient of 4.weight holds NaN or Inf; nothing was changed"):
            pgu.step(lambda pgu=pgu, x=x: pgu.model(x).sum() + (pgu.model[4].weight[0, 0] * 0).sqrt())  # 0, slope NaN
        assert all(map(torch.equal, before, parameters(pgu.model)))
        assert all(p.grad is None for p in pgu.model.parameters())


def build(**options):
    model = perceptron()
    return PGU(model, sgd(model), **options)


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 2)

    def forward(self, x):
        return self.inner(x + torch.rand_like(x))


def fit(model, batches=None, **options):
    return PGU(model, sgd(model), **options).fit([torch.ones(2, 6)] if batches is None else batches)


X, Y = torch.ones(4, 6, dtype=F64), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: build(gamma=0.0), ValueError, r"for default, a share .* must be in \(0, 1\]; got 0.0"),
        (lambda: build(gamma=1.5), ValueError, r"in \(0, 1\]; got 1.5"),
        (lambda: build(gamma=math.nan), ValueError, r"in \(0, 1\]; got nan"),
        (lambda: build(gamma={"0.weight": -1, "default": 1}), ValueError, r"gamma for 0.weight, a share .*; got -1"),
        (lambda: build(gamma={"0.bias": 0.5, "default": 1}), ValueError, "gamma names 0.bias"),
        (lambda: build(gamma={"0.weight": 0.5}), ValueError, 'must have "default" or name every weight.* 2.weight'),
        (lambda: build(rule="sum"), ValueError, "rule must be 'singular' or 'energy'; got 'sum'"),
        (lambda: build(soft=-1.0), ValueError, r"soft must be in \[0, inf\); got -1.0"),
        (lambda: PGU(m := nn.LayerNorm(3), sgd(m)), ValueError, "holds no weight with two or more dimensions"),
        (lambda: build().forget([X]), ValueError, r"forget: nothing is fitted; call fit\(\)"),
        (lambda: build().step(lambda: X), ValueError, "step: nothing is fitted"),
        (lambda: build().project_(), ValueError, "project_: nothing is fitted"),
        (lambda: build().save("x"), ValueError, "save: nothing is fitted"),
        (lambda: fitted()[0].project_(), ValueError, "no projected weight has a gradient"),
        (lambda: fitted()[0].forget([]), ValueError, "forget: the batches hold no samples"),
        (lambda: fit(perceptron(), []), ValueError, "fit: the batches hold no samples"),
        (lambda: fit(perceptron(), [X * math.nan]), FloatingPointError, "inputs of 0.weight hold NaN or Inf"),
        (lambda: fit(perceptron(), [3]), ValueError, r"samples along dimension 0; got shapes \[\]"),
        (lambda: fit(perceptron(), [torch.tensor(1.0)]), ValueError, r"dimension 0; got shapes \[\(\)\]"),
        (lambda: fit(perceptron(), [{"input": X, "y": X[:1]}]), ValueError, r"\(1, 6\)\]. check_samples=False looks"),
        (lambda: fit(perceptron(), [{X}], check_samples=False), ValueError, "samples along dimension 0"),
        (lambda: fit(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))), ValueError, "1 is a BatchNorm1d"),
        (lambda: fit(nn.Sequential(nn.Linear(6, 4), nn.Dropout())), ValueError, r"\(1 is dropout in training mode\)"),
        (lambda: fit(Draws()), ValueError, "draws random numbers, so that"),
        (lambda: fit(nn.Sequential(nn.Flatten(0), nn.Embedding(3, 2)), [torch.ones(2, 1).long()]), ValueError,
         "no weight can be projected .*weight: embedding"),
        (lambda: fitted(gamma=1.0)[0].step(lambda: X), ValueError, "every weight that the optimizer holds is frozen"),
        (lambda: fitted()[0].step(lambda: X), ValueError, r"forget\(\) must return one scalar loss; got \(4, 6\)"),
        (lambda: fitted()[0].step(lambda: X.sum()), ValueError, "does not depend on any trainable parameter"),
        (lambda: (p := fitted()[0]).step(lambda: p.model[0].bias.sum()), ValueError, "depends on no projected weight"),
        (lambda: unlearning_loss(X[0], X[0]), ValueError, r"logits must be \(n, classes\) and labels \(n,\)"),
        (lambda: unlearning_loss(X, torch.full((4,), 6)), ValueError, r"integers in \[0, 6\), .* got 6 to 6"),
        (lambda: unlearning_loss(X, Y, offset=-1), ValueError, r"offset must be in \[0, inf\); got -1"),
        (lambda: fitted()[0].run([], lambda: (1, 0)), ValueError, "run: an epoch without a batch"),
        (lambda: fitted()[0].run([X], lambda: (1, 0)), ValueError, r"a batch must be \(inputs, labels\)"),
        (lambda: fitted()[0].run([X], None, stop="never"), ValueError, "stop must be 'validation' or 'retain'"),
        (lambda: fitted()[0].run([X], None, lr=(0.1, 0)), ValueError, r"run: lr .* must be in \(0, inf\); got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
