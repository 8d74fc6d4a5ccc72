"""OrthoGrad on a subset of the coordinates, against explicit gradients in float64; masks that do not fit."""

import pytest
import torch
from metric_problems import ALPHA, SGD, Adam, AdamW, RMSprop, Text
from torch import nn
from torch.nn import functional as F
from unlearners import flat_parameters

import projgrad
from projgrad import projectors

pytestmark = pytest.mark.same_without_extension
N = 5
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.0, "foreach": True}),
    "rmsprop": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "centered": (RMSprop, {"lr": 0.01, "centered": True}),
}


class Scaled(Text):
    """With a head of its own, whose weight is the table, and a scalar."""

    def __init__(self):
        super().__init__()
        del self.bias
        self.head = nn.Linear(4, 9)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, ids):
        return self.head(self.hidden(ids) * self.scale)


class Problem:
    def __init__(self, kind="sgd", dtype=torch.float64):
        torch.manual_seed(0)
        self.model = Scaled().to(dtype)
        self.forgotten, self.kept = torch.randint(9, (4, 6)), torch.randint(9, (N, 6))
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        make, options = OPTIMIZERS[kind]
        self.optimizer = make(self.params.values(), **options)

    def losses(self, ids):
        return F.cross_entropy(self.model(ids)[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    def forget(self):
        return self.losses(self.forgotten).mean()

    def retain(self):
        return self.losses(self.kept)

    def unlearner(self, mask, **options):
        return projgrad.OrthoGrad(self.model, self.optimizer, metric="optimizer", mask=mask, **options)

    def step(self, mask, **options):
        return self.unlearner(mask, **options).step(self.forget, self.retain)

    def explicit(self):
        """u and G by parameter, flattened."""
        gradients = lambda loss: torch.autograd.grad(loss, list(self.params.values()), retain_graph=True)  # noqa: E731
        u, rows = gradients(self.forget()), [gradients(loss) for loss in self.retain()]
        G = [torch.stack([g.flatten() for g in some]) for some in zip(*rows, strict=True)]
        return [g.flatten() for g in u], G

    def state(self):
        return {name: p.detach().clone() for name, p in self.params.items()}


def random_mask(params, share=0.6):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in params.items()}


def filled(params, value):
    return {name: torch.full(p.shape, value) for name, p in params.items()}


MASKS = {
    "random": random_mask,
    "few": lambda params: random_mask(params, 0.1),
    "ones": lambda params: filled(params, True),
    "zeros": lambda params: filled(params, False),
    "one_tensor": lambda params: filled(params, False) | {"packed": torch.ones(8, 4, dtype=torch.bool)},
}


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("name", MASKS)
def test_the_update_is_the_projection_of_the_masked_gradient(name, scope):
    problem = Problem()
    mask, (u, G) = MASKS[name](problem.params), problem.explicit()
    m = [mask[name].flatten() for name in problem.params]
    u, masked = [a * b for a, b in zip(u, m, strict=True)], [a * b for a, b in zip(G, m, strict=True)]
    if scope == "global":
        u_perp = projectors.lstsq(torch.cat(u), torch.cat(masked, 1))
    else:
        u_perp = torch.cat([projectors.lstsq(a, b) for a, b in zip(u, masked, strict=True)])
    update = ALPHA * torch.cat(G, 1).mean(0) - (1 - ALPHA) * u_perp
    expected = flat_parameters(problem.model) * 1.0
    kept = torch.cat([torch.full((p.numel(),), name in problem.params) for name, p in problem.model.named_parameters()])
    expected[kept] -= 0.1 * update
    record = problem.step(mask, alpha=ALPHA, scope=scope)
    torch.testing.assert_close(flat_parameters(problem.model), expected, rtol=1e-10, atol=1e-12)
    if torch.cat(u).any():
        assert record.preserved_norm == pytest.approx(float(u_perp.norm() / torch.cat(u).norm()), rel=1e-6, abs=1e-9)
    else:
        assert record.preserved_norm == 1.0 and record.residual == 0.0


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_outside_keeps_its_bits_and_every_retain_loss_its_value(kind, scope):
    """With α = 0, for three steps of every optimizer: the whole change is the forgetting part."""
    problem = Problem(kind)
    mask = random_mask(problem.params)
    unlearner = problem.unlearner(mask, alpha=0.0, scope=scope)
    for _ in range(3):
        before, (_, G) = problem.state(), problem.explicit()
        record = unlearner.step(problem.forget, problem.retain)
        change = {name: p.detach() - before[name] for name, p in problem.params.items()}
        assert not any(d[~mask[name]].any() for name, d in change.items())
        moved, G = torch.cat([d.flatten() for d in change.values()]), torch.cat(G, 1)
        assert ((G @ moved).abs() <= 1e-9 * G.norm(dim=1) * moved.norm()).all() and moved.any()
        assert record.residual < 1e-9


@pytest.mark.parametrize("how", ["entries", "in place", "another unlearner", "after steps without"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_mask_may_be_changed_between_steps(kind, how):
    """What was forgotten outside of the new mask moves on in no momentum."""
    problem = Problem(kind)
    mask = random_mask(problem.params)
    unlearner = problem.unlearner(None if how == "after steps without" else mask, alpha=0.0)
    for _ in range(2):
        unlearner.step(problem.forget, problem.retain)
    if how == "in place":
        for m in mask.values():
            m.logical_not_()
    else:
        opposite = {name: ~m for name, m in mask.items()}
        mask.update(opposite)
    if how in ("another unlearner", "after steps without"):
        unlearner = problem.unlearner(mask, alpha=0.0)
    for _ in range(2):
        before, (_, G) = problem.state(), problem.explicit()
        unlearner.step(problem.forget, problem.retain)
        change = {name: p.detach() - before[name] for name, p in problem.params.items()}
        assert not any(p.grad[~mask[name]].any() for name, p in problem.params.items())
        assert max(float(d[~mask[name]].abs().max()) for name, d in change.items() if not mask[name].all()) < 1e-12
        moved, G = torch.cat([d.flatten() for d in change.values()]), torch.cat(G, 1)
        assert ((G @ moved).abs() <= 1e-9 * G.norm(dim=1) * moved.norm()).all() and moved.any()


def test_a_parameter_that_was_frozen_for_a_while_keeps_its_mask():
    problem = Problem()
    unlearner = problem.unlearner(random_mask(problem.params))
    problem.model.scale.requires_grad_(False)
    unlearner.step(problem.forget, problem.retain)
    problem.model.scale.requires_grad_(True)
    unlearner.step(problem.forget, problem.retain)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_micro_batches_make_the_same_step(kind, scope):
    ends = []
    for parts in (False, True):
        problem = Problem(kind)
        options = {"union_tolerance": 1e-11, "max_passes": 800, "scope": scope, "alpha": ALPHA, "max_norm": 0.5}
        unlearner = problem.unlearner(random_mask(problem.params), **options)
        lists = projgrad.micro_batches(problem.losses, [(ids,) for ids in problem.kept.split(2)])
        for _ in range(2):
            unlearner.step(problem.forget, lists if parts else problem.retain)
        ends.append(flat_parameters(problem.model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-9)


def test_a_mask_of_ones_is_no_mask_in_float32():
    for kind in ("sgd", "adamw"):
        ends = []
        for mask in (False, True):
            problem = Problem(kind, torch.float32)
            record = problem.step(filled(problem.params, True) if mask else None)
            ends.append(flat_parameters(problem.model))
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)
        assert record.residual < 1e-5


def test_hard_rows_within_a_mask():
    """Rows that are equal, zero, tiny and huge, and rows that are zero within the mask alone."""
    torch.manual_seed(0)
    model = nn.Linear(20, 3, bias=False)
    x, xf, mask = torch.randn(6, 20), torch.randn(4, 20), torch.rand(3, 20) < 0.7
    x[1], x[2], x[4], x[5] = x[0], 0.0, 1e12 * x[4], 1e-12 * x[5]
    mask[:, 7] = False
    x[3] = 0.0
    x[3, 7] = 1.0
    weights = torch.tensor([1.0, -2, 3])
    unlearner = projgrad.OrthoGrad(
        model, SGD(model.parameters(), lr=0.1), alpha=0.0, metric="optimizer", mask={"weight": mask}
    )
    record = unlearner.step(lambda: model(xf).square().mean(), lambda: model(x) @ weights)
    assert record.rank == 3 and record.residual <= 1e-6 and not model.weight.grad[~mask].any()
    truth = projectors.lstsq(model.weight.grad.flatten().double(), (weights[:, None] * x[:, None]).flatten(1).double())
    assert (truth - model.weight.grad.flatten()).norm() <= 1e-5 * truth.norm()


def test_backward_writes_the_masked_step_for_a_loop_of_somebody_else():
    ends = []
    for by_hand in (False, True):
        problem = Problem("adamw")
        unlearner = problem.unlearner(random_mask(problem.params), alpha=ALPHA)
        if by_hand:
            unlearner.backward(problem.forget, problem.retain)
            problem.optimizer.step()
        else:
            unlearner.step(problem.forget, problem.retain)
        ends.append(flat_parameters(problem.model))
    assert torch.equal(*ends)


def test_a_tied_weight_goes_by_any_of_its_names_and_a_frozen_one_needs_none():
    problem, ends = Problem(), []
    mask = random_mask(problem.params)
    table = mask["table.weight"]
    without = {name: m for name, m in mask.items() if name != "table.weight"}
    frozen = {"frozen.weight": torch.ones(4, 4, dtype=torch.bool)}
    for given in (mask, without | {"head.weight": table}, mask | {"head.weight": table.clone()} | frozen):
        problem = Problem()
        problem.step(given)
        ends.append(flat_parameters(problem.model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    with pytest.raises(ValueError, match=r"differs for two names of one tied parameter, table.weight and head.weight"):
        problem.unlearner(mask | {"head.weight": ~table})


def _without(mask, name):
    return {other: m for other, m in mask.items() if other != name}


WRONG = {
    "no_mapping": (lambda mask: list(mask.values()), TypeError, "must be a dictionary of boolean tensors"),
    "no_tensor": (lambda mask: mask | {"packed": True}, TypeError, "must be a boolean tensor; got a bool"),
    "float": (lambda mask: mask | {"packed": torch.ones(8, 4)}, ValueError, "boolean, such as m > 0; got torch.float"),
    "shape": (
        lambda mask: mask | {"packed": mask["packed"][:4]},
        ValueError,
        r"mask of packed has shape \(4, 4\), the parameter \(8, 4\)",
    ),
    "transposed": (lambda mask: mask | {"packed": mask["packed"].T}, ValueError, r"has shape \(4, 8\)"),
    "unknown": (lambda mask: mask | {"module.packed": mask["packed"]}, ValueError, "no parameter of the model; it has"),
    "missing": (lambda mask: _without(mask, "norm.bias"), ValueError, r"nothing for norm.bias: .* torch.zeros"),
    "empty": (lambda mask: {}, ValueError, "mask has nothing for packed, scale, table.weight, norm.weight and 2 more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mask_that_does_not_fit_is_refused(name):
    problem = Problem()
    change, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        problem.unlearner(change(random_mask(problem.params)))


def test_a_mask_needs_the_metric_of_the_optimizer():
    problem = Problem()
    for options in ({}, {"projector": projectors.qr}, {"keep_output_gradients": False}):
        with pytest.raises(ValueError, match='mask needs metric="optimizer"'):
            projgrad.OrthoGrad(problem.model, problem.optimizer, mask=random_mask(problem.params), **options)


def test_a_mask_that_is_set_later_counts():
    problem = Problem("adamw")
    unlearner = problem.unlearner(filled(problem.params, True), alpha=0.0)
    unlearner.mask = filled(problem.params, False)
    before = flat_parameters(problem.model)
    assert unlearner.step(problem.forget, problem.retain).preserved_norm == 1  # of nothing
    assert torch.equal(flat_parameters(problem.model), before)
    unlearner.mask = {"scale": unlearner.mask["scale"]}
    with pytest.raises(ValueError, match="mask has nothing for"):
        unlearner.step(problem.forget, problem.retain)
    plain = projgrad.OrthoGrad(problem.model, problem.optimizer)
    plain.mask = filled(problem.params, True)
    with pytest.raises(ValueError, match='mask needs metric="optimizer"'):
        plain.step(problem.forget, problem.retain)


def test_a_refused_step_changes_nothing():
    """A parameter that was thawed later, and NaN outside of the mask."""
    problem = Problem("adamw")
    unlearner, before = problem.unlearner(random_mask(problem.params)), flat_parameters(problem.model)
    problem.optimizer.add_param_group({"params": list(problem.model.frozen.requires_grad_().parameters())})
    with pytest.raises(ValueError, match=r"nothing for frozen.weight, frozen.bias"):
        unlearner.step(problem.forget, problem.retain)
    problem.model.frozen.requires_grad_(False)
    mask = unlearner.mask
    unlearner.mask = filled(problem.params, False)
    infinite = lambda: problem.forget() + (problem.model.scale - problem.model.scale.detach()) * 1e400  # noqa: E731
    with pytest.raises(FloatingPointError):
        unlearner.step(infinite, problem.retain)
    assert torch.equal(flat_parameters(problem.model), before) and not problem.optimizer.state
    unlearner.mask = mask
    unlearner.step(problem.forget, problem.retain)
