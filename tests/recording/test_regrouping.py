"""What belongs to a sample changes between two steps while every shape stays: what was found must not be believed.

On all models of the zoo: the losses are picked, ordered or summed in another way than in the step before, by numbers,
masks, indices and matrices that no gradient shows.
"""

import functools

import oracle
import pytest
import torch
from oracle import largest, random_direction, trained
from steps import ERROR
from zoo import ZOO

import projgrad

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:no rule covers", "ignore:the . losses are mixed"),
]


# Ways to pick losses, given the indices of those to take, in this order.


def _boosted_topk(losses, picked):
    boost = torch.ones_like(losses)
    boost[picked] = 10.0 ** torch.arange(9, 9 - len(picked), -1, dtype=losses.dtype)
    offset = (losses.detach() - 1).neg()  # all are 1 before they are boosted
    return ((losses + offset) * boost).topk(len(picked)).values


def _one_hot(losses, picked):
    return torch.nn.functional.one_hot(picked, len(losses)).to(losses.dtype)


PICKS = {
    "index": lambda l, i: l[i],
    "index_select": lambda l, i: l.index_select(0, i),
    "gather": lambda l, i: l.gather(0, i),
    "take": lambda l, i: l.take(i),
    "stack": lambda l, i: torch.stack([l[k] for k in i.tolist()]),
    "cat": lambda l, i: torch.cat([l[k : k + 1] for k in i.tolist()]),
    "unbind": lambda l, i: torch.stack([l.unbind()[k] for k in i.tolist()]),
    "split": lambda l, i: torch.cat([l.split(1)[k] for k in i.tolist()]),
    "matrix": lambda l, i: _one_hot(l, i) @ l,
    "mask_and_sum": lambda l, i: (_one_hot(l, i) * l).sum(1),
    "where_and_sum": lambda l, i: torch.where(_one_hot(l, i).bool(), l, 0.0).sum(1),
    "fill_and_sum": lambda l, i: l.expand(len(i), -1).masked_fill(~_one_hot(l, i).bool(), 0.0).sum(1),
    "masked_maximum": lambda l, i: (l.expand(len(i), -1) + 0).masked_fill(~_one_hot(l, i).bool(), -1e9).amax(1),
    "einsum": lambda l, i: torch.einsum("kn,n->k", _one_hot(l, i), l),
    "index_add": lambda l, i: l.new_zeros(len(i)).index_add(0, torch.arange(len(i)), l[i]),
    "scatter": lambda l, i: l.new_zeros(len(i)).scatter(0, torch.arange(len(i)), l[i]),
    "index_put": lambda l, i: l.new_zeros(len(i)).index_put((i.argsort(),), l[i.sort().values]),
    "written": lambda l, i: _written(l, i),
    "rolled": lambda l, i: l.roll(-int(i[0]), 0)[: len(i)],
    "flipped_where": lambda l, i: torch.where(i == torch.arange(len(l)), l, l.flip(0)),
    "topk": _boosted_topk,
}


def _written(losses, picked):
    out = losses.new_zeros(len(picked))
    for place, k in enumerate(picked.tolist()):
        out[place] = losses[k]
    return out


# Ways to sum losses into two groups, given the group of every loss.


def _membership(losses, group):
    return (group == torch.arange(2)[:, None]).to(losses.dtype)


GROUPS = {
    "mask": lambda l, g: (_membership(l, g) * l).sum(1),
    "matrix": lambda l, g: _membership(l, g) @ l,
    "mean_of_rows": lambda l, g: (_membership(l, g) * l).sum(1) / _membership(l, g).sum(1),
    "where": lambda l, g: torch.where(_membership(l, g).bool(), l, 0.0).sum(1),
    "filled": lambda l, g: l.expand(2, -1).masked_fill(_membership(l, g) == 0, 0.0).sum(1),
    "index_add": lambda l, g: l.new_zeros(2).index_add(0, g, l),
    "scatter_add": lambda l, g: l.new_zeros(2).scatter_add(0, g, l),
    "selected": lambda l, g: torch.stack([l[g == 0].sum(), l[g == 1].sum()]),
    "bilinear": lambda l, g: torch.einsum("kn,n->k", _membership(l, g), l),
    "baddbmm": lambda l, g: (_membership(l, g)[None] @ l[None, :, None])[0, :, 0],
}


def picks(name, n):
    """Picked indices of one step after the other: in order first."""
    if name == "rolled":
        return [torch.arange(n).roll(-k) for k in (0, 1, 2, 0)]
    if name == "flipped_where":
        straight = torch.arange(n)
        return [torch.where(torch.arange(n) < k, straight, straight.flip(0)) for k in (n, 0, n)]
    found = [torch.arange(n)]
    for seed in range(2):
        found.append(torch.randperm(n, generator=torch.Generator().manual_seed(seed)))
    return [*found, found[0]]


def groups(n):
    half = torch.arange(n) >= n - n // 2
    return [half.long(), (~half).long(), torch.arange(n) % 2, (torch.arange(n) == n - 1).long(), half.long()]


def steps(kind, name, n):
    """(function of the losses, A): the losses after it are A times those before."""
    if kind == "picks":
        for i in picks(name, n):
            yield functools.partial(lambda l, i: PICKS[name](l, i), i=i), torch.eye(n, dtype=torch.float64)[i]
    else:
        for g in groups(n):
            A = (g == torch.arange(2)[:, None]).double()
            scale = A.sum(1, keepdim=True) if name == "mean_of_rows" else 1
            yield functools.partial(lambda l, g: GROUPS[name](l, g), g=g), A / scale


WAYS = [*(("picks", name) for name in PICKS), *(("groups", name) for name in GROUPS)]


@functools.cache
def built(name):
    case = ZOO[name]()
    return case, oracle.gradients(case)


def regrouped(G, A, factor=1.0):
    return {name: torch.tensordot(A, g, 1) * factor for name, g in G.items()}


@pytest.mark.parametrize("name", ZOO)
def test_losses_regrouped_between_steps_are_followed_in_every_model(name):
    """Two ways each, others from model to model: every way meets 17 models, and all ways those of `REPRESENTATIVE`."""
    case, G = ZOO[name](), None
    G = oracle.gradients(case)
    if case.n < 2:
        return
    first = 2 * list(ZOO).index(name)
    for kind, way in (WAYS[(first + k) % len(WAYS)] for k in range(2)):
        for function, A in steps(kind, way, case.n):
            with projgrad.per_sample(case.model) as tape:
                losses = function(case.losses(case.model))
            check(kind, way, tape.gram(losses), G, A)


def check(kind, way, K, G, A):
    if way == "topk":  # boosted: another length, the same sample
        lengths = K.diagonal().sqrt().clamp_min(1e-300)
        K = K / lengths / lengths[:, None]
    rows = oracle.matrix(regrouped(G, A))
    if way == "topk":
        rows = torch.nn.functional.normalize(rows, dim=1, eps=1e-300)
    expected = rows @ rows.mT
    assert (K - expected).abs().max() <= ERROR * expected.abs().max(), (kind, way)


REPRESENTATIVE = ["mlp", "lstm", "weight_norm", "routed_experts", "checkpoint"]


@pytest.mark.parametrize("way", [w for w in WAYS if w[1] != "topk"], ids="-".join)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_products_are_exact_for_every_way_to_regroup(name, way):
    case, G = built(name)
    direction = random_direction(case)
    u = torch.cat([direction[name].flatten() for name in G])
    for function, A in steps(*way, case.n):
        truth = regrouped(G, A)
        rows = oracle.matrix(truth)
        with projgrad.per_sample(case.model) as tape:
            losses = function(case.losses(case.model))
        size = rows.norm() + 1e-300
        assert (tape.gram(losses) - rows @ rows.mT).norm() <= ERROR * size**2
        assert (tape.dot(losses, direction) - rows @ u).norm() <= ERROR * size * u.norm()
        w = torch.linspace(-1, 2, len(A), dtype=torch.float64)
        first, second = tape.moments(losses, w)
        combined = tape.combine(losses, w)
        for key, g in truth.items():
            weighted = torch.einsum("n,n...->n...", w, g)
            floor = 1e-6 * largest(G)
            for found, expected in ((first, weighted.sum(0)), (combined, weighted.sum(0))):
                assert (found[key] - expected).abs().max() <= ERROR * max(largest({key: G[key]}), floor)
            assert (second[key] - weighted.square().sum(0)).abs().max() <= ERROR * max(
                largest({key: G[key]}), floor
            ) ** 2 * 10


MODES = {
    "global": {},
    "per_tensor": {"scope": "per_tensor"},
    "two_passes": {"keep_output_gradients": False},
}


@pytest.mark.parametrize(
    "way", [("picks", "matrix"), ("picks", "stack"), ("picks", "index"), *(("groups", g) for g in GROUPS)], ids="-".join
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "gpt2", "routed_experts"])
def test_every_projection_is_orthogonal_to_the_gradients_of_its_own_step(name, mode, way):
    """One unlearner for all steps: what moves the parameters is orthogonal to the gradients of this step."""
    case, G = built(name)
    params = trained(case.model)
    before = {key: p.detach().clone() for key, p in params.items()}
    torch.manual_seed(1)
    direction = random_direction(case)
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    unlearner = projgrad.OrthoGrad(case.model, optimizer, alpha=0.0, **MODES[mode])
    for function, A in steps(*way, case.n):
        rows = regrouped(G, A)

        def forget():
            return sum((p * direction[key]).sum() for key, p in params.items())

        record = unlearner.step(forget, lambda function=function: function(case.losses(case.model)))
        moved = {key: p.detach() - before[key] for key, p in params.items()}
        with torch.no_grad():
            for key, p in params.items():
                p.copy_(before[key])
        parts = [[key] for key in rows] if mode == "per_tensor" else [list(rows)]
        for keys in parts:
            g = oracle.matrix({key: rows[key] for key in keys})
            d = torch.cat([moved[key].flatten() for key in keys])
            u = torch.cat([direction[key].flatten() for key in keys])
            assert (g @ d).abs().max() <= 1e-9 * (g.norm() * u.norm() + 1e-300)
        assert record.rank >= len(A) - 1 and record.preserved_norm < 1


@pytest.mark.parametrize("test", ["coordinate", "aggregate"])
@pytest.mark.parametrize("way", ["matrix", "index", "stack", "mask_and_sum"])
def test_feasible_updates_test_the_samples_of_their_own_step(way, test):
    case, G = built("mlp")
    params = trained(case.model)
    feasible = projgrad.FeasibleUpdates(case.model, torch.optim.SGD(params.values(), lr=1.0), test=test, delta=0.5)
    before = {key: p.detach().clone() for key, p in params.items()}
    for function, A in steps("picks", way, case.n):
        rows = oracle.matrix(regrouped(G, A))
        record = feasible.step(
            lambda: case.losses(case.model).sum(), lambda function=function: function(case.losses(case.model))
        )
        moved = torch.cat([(p.detach() - before[key]).flatten() for key, p in params.items()])
        with torch.no_grad():
            for key, p in params.items():
                p.copy_(before[key])
        tested = slice(1, None, 2) if test == "aggregate" else slice(None)
        change = (rows @ moved)[tested].mean()
        assert abs(record.retain_change - change) <= 1e-8 * (rows.norm() * moved.norm() + 1e-300)


def stepper(case, mode):
    """A function that takes one step with a retain closure and checks that it left every loss alone, to first order;
    the weights end as they were, the unlearner does not."""
    params = trained(case.model)
    unlearner = projgrad.OrthoGrad(case.model, torch.optim.SGD(params.values(), lr=1.0), alpha=0.0, **MODES[mode])
    before = {key: p.detach().clone() for key, p in params.items()}
    direction = random_direction(case)

    def step(retain):
        rows = [torch.autograd.grad(l, list(params.values()), retain_graph=True) for l in retain()]
        record = unlearner.step(lambda: sum((p * direction[key]).sum() for key, p in params.items()), retain)
        moved = [p.detach() - before[key] for key, p in params.items()]
        with torch.no_grad():
            for key, p in params.items():
                p.copy_(before[key])
        for row in rows:
            change = sum((g * d).sum() for g, d in zip(row, moved, strict=True))
            assert abs(change) <= 1e-9 * sum(g.norm() + d.norm() for g, d in zip(row, moved, strict=True))
        return record

    return step


@pytest.mark.parametrize("mode", MODES)
def test_another_of_several_forward_passes(mode):
    """Equal passes over other inputs, of which now this and now that one reaches the losses, or both."""
    case, _ = built("mlp")
    step = stepper(case, mode)
    views = torch.randn(3, *case.inputs[0].shape, dtype=torch.float64)
    for chosen in ([0], [1], [2], [0], [0, 1], [1, 2], [1], [0, 1]):

        def retain(chosen=chosen):
            passes = [case.loss(case.model, view, *case.inputs[1:]) for view in views]
            return sum(passes[k] for k in chosen)

        assert step(retain).rank >= case.n


HOOKS = {
    "tensor": lambda h, hook: h.register_hook(hook),
    "node": lambda h, hook: h.grad_fn.register_prehook(lambda grads: (hook(grads[0]),)),
    "several": lambda h, hook: (
        torch.autograd.graph.register_multi_grad_hook([h], lambda grads: None) and h.register_hook(hook)
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_begin_to_act(kind, mode):
    """A hook on a tensor of the forward pass scales at first, then reorders the samples."""
    case, _ = built("mlp")
    step = stepper(case, mode)
    for hook in (lambda g: 2 * g, lambda g: g.roll(1, 0), lambda g: 2 * g, lambda g: g.flip(0)):

        def retain(hook=hook):
            h = case.model[:2](*case.inputs[:1])
            HOOKS[kind](h, hook)
            return case.loss(case.model[2:], h)

        step(retain)


@pytest.mark.parametrize("n", [4, 8, 12, 16, 32])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_several_samples_begin_to_share(mode, n):
    """A ranking loss against one negative: at first one sample is active on it, then all are, with equal gradients."""
    case, _ = built("mlp")
    step = stepper(case, mode)
    x, negative = torch.randn(n, case.inputs[0].shape[1], dtype=torch.float64), case.inputs[0][:1]
    for active in ([0], range(n), range(0, n, 2), [1], range(n)):
        margin = torch.full((n,), -1e3, dtype=torch.float64).index_fill(0, torch.tensor(list(active)), 1e3)

        def retain(margin=margin):
            scores = case.model(torch.cat([x, negative])).sum(1)
            return (margin + scores[-1:] - scores[:-1]).relu() + 0.1 * scores[:-1].square()

        try:
            step(retain)
        except ValueError as error:
            assert "share terms" in str(error)
