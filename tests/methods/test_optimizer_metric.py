"""The change that metric="optimizer" applies, read from the parameters, against explicit gradients in float64."""

import copy

import pytest
import torch
from metric_problems import ALPHA, SGD, Adam, AdamW, RMSprop, Text, blocks_of, flat
from torch import nn
from torch.nn import functional as F

import projgrad
from projgrad.methods.optimizer_metric import MOMENTUM

N = 5
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "decay": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam_amsgrad": (Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw_amsgrad": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw_no_momentum": (AdamW, {"lr": 0.01, "betas": (0.0, 0.9)}),
    "rmsprop": (RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop_no_decay": (RMSprop, {"lr": 0.01}),
    "rmsprop_momentum_only": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "rmsprop_centered": (RMSprop, {"lr": 0.01, "centered": True, "weight_decay": 0.1}),
    "rmsprop_momentum": (RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
}
VARIANTS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CASES = [(name, v) for name in OPTIMIZERS for v in VARIANTS if v != "fused" or not name.startswith("rmsprop")]
REMEMBERED = ("momentum", "dampening", "adam", "adam_amsgrad", "adamw", "adamw_amsgrad", "rmsprop_momentum")
REMEMBERED += ("rmsprop_momentum_only",)
DECOUPLED = {"adamw": 0.1, "adamw_amsgrad": 0.1, "adamw_no_momentum": 0.01}  # weight decay of every step
OWN = {SGD: "momentum_buffer", Adam: "exp_avg", AdamW: "exp_avg", RMSprop: "momentum_buffer"}


class Problem:
    """The model, a forget and a retain batch for every step, and both closures."""

    def __init__(self, dtype=torch.float64):
        self.model = Text().to(dtype)
        self.batches = [(torch.randint(9, (3, 6)), torch.randint(9, (N, 6))) for _ in range(4)]
        self.turn = 0

    def losses(self, ids, model=None):
        logits = (model or self.model)(ids)[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    def forget(self):
        return self.losses(self.batches[self.turn][0]).mean()

    def retain(self):
        return self.losses(self.batches[self.turn][1])

    def optimizer(self, name, variant, ratio=0.3):
        """An optimizer with two parameter groups, of which one is slower."""
        kind, options = OPTIMIZERS[name]
        params = [p for p in self.model.parameters() if p.requires_grad]
        slow = {"params": params[::2], "lr": ratio * options["lr"]}
        return kind([slow, {"params": params[1::2]}], **options, **VARIANTS[variant])


def explicit(problem):
    """u and G, from one backward pass per loss."""
    params = [p for p in problem.model.parameters() if p.requires_grad]
    gradients = lambda loss: flat(torch.autograd.grad(loss, params))  # noqa: E731
    return gradients(problem.forget()), torch.stack(
        [gradients(problem.losses(x[None])) for x in problem.batches[problem.turn][1]]
    )


def proposal(optimizer, params, gradient, momentum=None, after=None):
    """What the optimizer's own code does to the parameters for a gradient, and the momentum that it has then.

    momentum: what it has before, instead of its own. after: an optimizer that has stepped, whose second moments (the
    diagonal, that is) this step shall end with.
    """
    twin_params = [nn.Parameter(p.detach().clone()) for p in params]
    place = {id(p): k for k, p in enumerate(params)}
    groups = [{**g, "params": [twin_params[place[id(p)]] for p in g["params"]]} for g in optimizer.param_groups]
    for group in groups:
        group["fused"], group["foreach"] = None, False
    twin = type(optimizer)(groups, lr=1.0)
    sizes = [p.numel() for p in params]
    for k, (p, q, g) in enumerate(zip(params, twin_params, gradient.split(sizes), strict=True)):
        q.grad = g.view_as(q).clone()
        state = {key: copy.deepcopy(value) for key, value in optimizer.state.get(p, {}).items() if key != MOMENTUM}
        group = next(group for group in optimizer.param_groups if any(p is x for x in group["params"]))
        own = OWN[type(optimizer)]
        if after is not None and after.state[p].get("step") is not None:
            entering = q.grad + (0 if group.get("decoupled_weight_decay") else group["weight_decay"] * q.detach())
            done = after.state[p]
            if not state:
                state = {key: torch.zeros_like(value) for key, value in done.items() if key != MOMENTUM}
            beta = group["betas"][1] if "betas" in group else group["alpha"]
            second = "exp_avg_sq" if "betas" in group else "square_avg"
            state[second] = (done[second] - (1 - beta) * entering**2) / beta
            if "max_exp_avg_sq" in done:
                state["max_exp_avg_sq"] = done["max_exp_avg_sq"].clone()
            if group.get("centered"):
                state["grad_avg"] = (done["grad_avg"] - (1 - beta) * entering) / beta
        if momentum is not None and state.get(own) is not None:
            state[own] = momentum[k].clone()
        if state:
            twin.state[q] = state
    twin.step()
    kept = [twin.state[q].get(OWN[type(optimizer)]) for q in twin_params]
    kept = [torch.zeros_like(p) if m is None else m for p, m in zip(params, kept, strict=True)]
    return flat(twin_params) - flat(params), kept


def worst_cosine(G, change):
    norm = G.norm(dim=1) * change.norm()
    return float((G @ change).abs().div(norm.where(norm > 0, 1)).max())


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_applied_forgetting_part_is_orthogonal_to_every_retain_gradient(name, variant, scope):
    problem = Problem()
    optimizer = problem.optimizer(name, variant)
    unlearner = projgrad.OrthoGrad(problem.model, optimizer, ALPHA, scope=scope, max_norm=0.5, metric="optimizer")
    params = [p for p in problem.model.parameters() if p.requires_grad]
    frozen = problem.model.frozen.weight.clone()
    retained = [torch.zeros_like(p) for p in params]  # the momentum of the retain parts alone
    for problem.turn in range(3):
        u, G = explicit(problem)
        r = ALPHA * G.mean(0)
        h = r - (1 - ALPHA) * u
        clip = (0.5 / (h.norm() + 1e-6)).clamp(max=1)
        before, start = copy.deepcopy(optimizer), flat(params)
        twins = [p for group in before.param_groups for p in group["params"]]
        order = {id(p): k for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        twins = [twins[order[id(p)]] for p in params]
        record = unlearner.step(problem.forget, problem.retain)
        moved = flat(params) - start
        # What would have happened: by the optimizer's own code, with the diagonal of this step.
        stepped = copy.copy(optimizer)
        stepped.state = {twin: optimizer.state[p] for twin, p in zip(twins, params, strict=True)}
        plain, moments = proposal(before, twins, clip * h)
        lift = lift_of_rmsprop(name, optimizer, params, clip * u * (ALPHA - 1), clip * r)
        alone, retained = proposal(before, twins, lift * clip * r, retained, stepped)
        if name.startswith("adam"):
            decay = -flat([rate_of(before, p) * DECOUPLED.get(name, 0.0) * p for p in twins])
            lift = lift_of_adam(optimizer, params, moments, retained, problem.turn + 1)
            alone = decay + lift * (alone - decay)
        applied, wanted = moved - alone, plain - alone
        for part in blocks_of(params, scope):
            rows, change, unprojected = G[:, part], applied[part], wanted[part]
            noise = 1e-13 * start.norm()  # of parameters near 1
            assert (rows @ change).abs().max() <= rows.norm(dim=1).max() * (1e-9 * change.norm() + noise)
            # The correction is P Gᵀ c: in the metric P⁻¹ nothing smaller would do.
            lifted = metric(optimizer, params)[part] * rows
            c = torch.linalg.lstsq(lifted.T, (unprojected - change)[:, None], driver="gelsd").solution[:, 0]
            assert (lifted.T @ c - (unprojected - change)).norm() <= 1e-9 * unprojected.norm() + noise
        if scope == "global":
            assert 0.05 < applied.norm() / wanted.norm() < 1.5
            assert abs(record.preserved_norm - float(applied.norm() / wanted.norm())) < 1e-8
        held = flat([p.grad for p in params])
        assert (held - applied).norm() <= 1e-9 * wanted.norm() + 1e-13 * start.norm()
        for p, own in zip(params, retained, strict=True):  # what the optimizer keeps is both parts, as applied
            state = optimizer.state[p]
            if MOMENTUM in state:
                difference = state[OWN[type(optimizer)]] - state[MOMENTUM] - own
                assert difference.norm() <= 1e-9 * (own.norm() + state[MOMENTUM].norm())
        if name in REMEMBERED:  # and the forget part of it is what moved the parameters
            kept = flat([optimizer.state[p][MOMENTUM] for p in params])
            D = optimizer_diagonal(optimizer, params, whole=not name.startswith("rmsprop"))
            bias = 1 - 0.9 ** (problem.turn + 1) if name.startswith("adam") else 1
            lifted_rest = (1 - lift) * D * flat(retained) / bias if name.startswith("adam") else 0.0
            assert (D * kept / bias + lifted_rest + applied).norm() <= 1e-9 * wanted.norm() + 1e-13 * start.norm()
    assert torch.equal(problem.model.frozen.weight, frozen)


def rate_of(optimizer, p):
    return next(group["lr"] for group in optimizer.param_groups if any(p is x for x in group["params"]))


def lift_of_adam(optimizer, params, moments, rests, t):
    """E / D: the √v̂ of this step, over what it has to be at least for the longer one of both parts alone."""
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    ages = torch.arange(t, dtype=torch.float64)
    first, second = (beta**ages / (beta**ages).sum() for beta in (beta1, beta2))
    least = (first**2 / second).sum() ** -0.5
    lifts = []
    for p, both, rest in zip(params, moments, rests, strict=True):
        state = optimizer.state[p]
        root = (state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - beta2**t)).sqrt()
        longer = torch.maximum((both - rest).abs(), rest.abs()) / (1 - beta1**t)
        lifts.append((root + 1e-8) / (torch.maximum(root, 0.999 * least * longer) + 1e-8))
    return flat(lifts)


def lift_of_rmsprop(name, optimizer, params, u, r):
    """The same for one step's gradients, where RMSprop has neither decay nor a mean."""
    if name not in ("rmsprop_no_decay", "rmsprop_momentum_only"):
        return torch.ones_like(u)
    root = flat([optimizer.state[p]["square_avg"].sqrt() for p in params])
    return (root + 1e-8) / (torch.maximum(root, 0.0999 * torch.maximum(u.abs(), r.abs())) + 1e-8)


def metric(optimizer, params):
    """1 / P is 1 / D and a tenth of its root mean square in the tensor."""
    parts = []
    for D in optimizer_diagonal(optimizer, params).split([p.numel() for p in params]):
        uniform = bool((D[0] == D).all())
        parts.append(D if uniform else 1 / (1 / D + 0.1 * (1 / D).square().mean().sqrt()))
    return torch.cat(parts)


def optimizer_diagonal(optimizer, params, whole=True):
    """D of a step, as the documents of torch have it, or the learning rates only."""
    parts = []
    for p in params:
        group = next(group for group in optimizer.param_groups if any(p is x for x in group["params"]))
        state = optimizer.state.get(p, {})
        if not whole:
            parts.append(torch.full_like(p, group["lr"]))
            continue
        if "betas" in group:
            v = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
        elif "alpha" in group:
            v = state["square_avg"] - (state["grad_avg"] ** 2 if group["centered"] else 0)
        else:
            parts.append(torch.full_like(p, group["lr"]))
            continue
        parts.append(group["lr"] / (v.sqrt() + group["eps"]))
    return flat(parts)
