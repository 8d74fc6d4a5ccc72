"""What several processes do together under metric="optimizer"."""

import copy
import functools
import itertools

import torch
import torch.distributed as dist
from spread_metric_twins import AdamW, Beside, MetricTwins, RMSprop, optimizer
from spread_twins import (
    COUNTS,
    Processes,
    Uneven,
    assert_same,
    build,
    losses,
    raises,
    replicated,
    shard,
    whole,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import projgrad
from projgrad.tape import correction, crossing
from projgrad.tape.spread import SpreadGradients
from projgrad.tape.spread_weighted import SpreadHeld


def check_metric_of_replicas(processes):
    ways = ("tied", "adamw", "global"), ("convolutions", "adam", "per_tensor"), ("tied", "rmsprop", "per_tensor")
    ways += ("convolutions", "momentum", "global"), ("convolutions", "sgd", "per_tensor")
    for kind, name, scope in ways:
        MetricTwins(kind, processes, replicated(processes), name, scope=scope, max_norm=0.1).compare(prefix="module.")


def check_metric_of_adapters(processes):
    """Of a frozen base, as copies and in shards; α = 0, and damping."""
    MetricTwins("lora", processes, replicated(processes), alpha=0.0, damping=1e-2).compare(1, prefix="module.")
    spread = lambda model: shard(model, processes.mesh)  # noqa: E731
    MetricTwins("lora", processes, spread, "adam", scope="per_tensor").compare(2)


def check_metric_of_shards(processes):
    ways = ("tied", "adamw", "global", True), ("tied", "momentum", "per_tensor", False)
    ways += ("convolutions", "adam", "global", False), ("convolutions", "rmsprop", "per_tensor", True)
    every, steps = (1, 3) if processes.size == 2 else (2, 2)
    for kind, name, scope, after in ways[::every]:
        spread = lambda model, after=after: shard(model, processes.mesh, reshard_after_forward=after)  # noqa: E731
        MetricTwins(kind, processes, spread, name, scope=scope, max_norm=0.1).compare(steps)


def check_metric_where_processes_use_other_parts(processes):
    """Factors, windows and whole gradients of which processes use others, in one exchange and row by row.

    One parameter is of the retain samples alone. With little memory tensors are corrected one after the other.
    """
    torch.manual_seed(0)
    single, before = Uneven().double(), (crossing.AT_ONCE, correction.HELD)
    single.more = nn.Parameter(torch.ones(6, dtype=torch.float64))
    retain = lambda model, x, rank: model.losses(x, rank) + (x.sum(1) * model.more).sum(1).sin()  # noqa: E731
    inputs = [torch.randn(n, 2 + rank, 6, dtype=torch.float64) for rank, n in enumerate(COUNTS[processes.size])]
    for scope, memory in itertools.product(("global", "per_tensor"), (before, (500, 1))):
        alone, model = copy.deepcopy(single), copy.deepcopy(single)
        make = lambda model: AdamW(model.parameters(), lr=1e-3)  # noqa: E731
        expected = projgrad.OrthoGrad(alone, make(alone), scope=scope, metric="optimizer").step(
            functools.partial(alone.forgotten, inputs[0]),
            lambda m=alone: torch.cat([retain(m, x, rank) for rank, x in enumerate(inputs)]),
        )
        options = {"scope": scope, "metric": "optimizer", "process_group": processes.group}
        unlearner, rank = projgrad.OrthoGrad(model, make(model), **options), processes.rank
        crossing.AT_ONCE, correction.HELD = memory
        record = unlearner.step(
            functools.partial(model.forgotten, inputs[0]), functools.partial(retain, model, inputs[rank], rank)
        )
        crossing.AT_ONCE, correction.HELD = before
        assert record.rank == expected.rank
        assert_same(model, alone)


def check_metric_of_hard_rows(processes):
    """Gradients that are the same on several processes, zero, tiny and huge, in float32."""
    for spread in (replicated(processes), lambda model: shard(model, processes.mesh)):
        torch.manual_seed(0)
        single, x, fx = nn.Sequential(nn.Linear(20, 3)), torch.randn(6, 20), torch.randn(4, 20)
        x[1], x[2], x[4] = x[0], 0.0, 1e12 * x[4]
        x[5] *= 1e-18
        _orthogonal_to_all_rows(processes, single, spread(copy.deepcopy(single)), fx, x)
        x[1:] = x[0] + 1e-3 * torch.randn(5, 20)  # nearly the same: the correction is the difference of large terms
        record = _orthogonal_to_all_rows(processes, single, spread(copy.deepcopy(single)), fx, x)
        assert record.refinements and record.rank == 6


def _orthogonal_to_all_rows(processes, single, model, fx, x):
    def losses(model, x):
        return (model(x) * torch.tensor([1.0, -2, 3])).sum(1)

    start, mine = whole(single), processes.part(x, (3, 3) if processes.size == 2 else (1, 2, 3, 0))
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    record = projgrad.OrthoGrad(model, optimizer, alpha=0, metric="optimizer").step(
        lambda: model(fx).square().mean(), lambda: losses(model, mine) if len(mine) else losses(model, fx)[:0]
    )
    assert record.residual <= 1e-6
    moved = [(w - start[name.removeprefix("module.")]).flatten() for name, w in whole(model).items()]
    moved = torch.cat(moved).double()
    for loss in losses(single, x):
        g = torch.autograd.grad(loss, list(single.parameters()), retain_graph=True)
        g = torch.cat([one.flatten() for one in g]).double()
        assert abs(g @ moved) <= 1e-6 * g.norm() * moved.norm()
    return record


def check_metric_of_whole_adapters_and_resuming(processes):
    """Of a sharded model with parameters that are no shards; a new optimizer goes on from the state of the first."""
    counts, ones = COUNTS[processes.size], (1,) * processes.size
    base, x, y = build("tied", sum(counts))
    single = Beside(base).double()
    model = copy.deepcopy(single)
    fully_shard(model.base, mesh=processes.mesh)
    alone, unlearner = (
        projgrad.OrthoGrad(m, optimizer("adamw")(m), max_norm=0.1, metric="optimizer") for m in (single, model)
    )
    fx, fy = x[: processes.size], y[: processes.size]
    for _ in range(3):
        alone.step(lambda: losses(single, fx, fy).mean(), lambda: losses(single, x, y))
        unlearner.step(
            lambda: losses(model, processes.part(fx, ones), processes.part(fy, ones)).mean(),
            lambda: losses(model, processes.part(x), processes.part(y)),
        )
        again = optimizer("adamw")(model)
        again.load_state_dict(unlearner.optimizer.state_dict())
        unlearner = projgrad.OrthoGrad(model, again, max_norm=0.1, metric="optimizer")
    assert_same(model, single)


def check_metric_of_mixed_precision(processes):
    """Parameters are gathered in bfloat16: the change is orthogonal as far as that rounds gradients."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    model = shard(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), processes.mesh, mp_policy=policy)
    x, y = torch.randn(sum(COUNTS[processes.size]), 8), torch.arange(sum(COUNTS[processes.size])) % 3
    unlearner = projgrad.OrthoGrad(model, optimizer("adamw")(model), metric="optimizer")
    for _ in range(2):
        record = unlearner.step(
            lambda: losses(model, -x, y).float().mean(),
            lambda: losses(model, processes.part(x), processes.part(y)).float(),
        )
        assert record.residual < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.full_tensor().any() for p in model.parameters())


def check_metric_with_a_scaler(processes):
    """A step with infinite losses on one process is skipped on all of them."""
    twins = MetricTwins("tied", processes, replicated(processes), scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    before, closures = whole(twins.model), twins.closures()
    forget = lambda: closures["forget"]() * (float("inf") if processes.rank == 1 else 1)  # noqa: E731
    assert twins.unlearner.step(forget, closures["retain"]).skipped
    assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())
    assert not twins.unlearner.optimizer.state
    twins.compare(2, prefix="module.")


def check_metric_of_an_optimizer_that_says_its_diagonal(processes):
    for spread in (replicated(processes), lambda model: shard(model, processes.mesh)):
        twins = MetricTwins("tied", processes, spread, "scaled")
        twins.compare(1, prefix="module." if hasattr(twins.model, "module") else "")
        before = whole(twins.model)
        twins.unlearner.optimizer.factor = -1.0
        with raises(ValueError, "must be positive and finite"):
            twins.unlearner.step(**twins.closures())
        assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())


def check_metric_with_a_mask(processes):
    """As copies, in shards, with lists of closures, and where the processes have other masks."""
    for kind, name, scope in (("tied", "adamw", "global"), ("convolutions", "sgd", "per_tensor")):
        for spread in (replicated(processes), lambda model: shard(model, processes.mesh)):
            exact = {"union_tolerance": 1e-10, "max_passes": 800}
            twins = MetricTwins(kind, processes, spread, name, scope=scope, alpha=0.3, **exact)
            prefix = "module." if hasattr(twins.model, "module") else ""
            generator = torch.Generator().manual_seed(1)
            mask = {
                name: torch.rand(p.shape, generator=generator) < 0.6
                for name, p in twins.single.named_parameters()
                if p.requires_grad
            }
            twins.alone.mask = mask
            twins.unlearner.mask = {prefix + name: m for name, m in mask.items()}
            twins.compare(1, prefix)
            twins.step_alone()
            closures = twins.closures()
            twins.unlearner.step(closures["forget"], [closures["retain"]] * 2)  # the same span and the same mean
            assert_same(twins.model, twins.single, prefix=prefix)
            before, mask = whole(twins.model), {name: m.clone() for name, m in twins.unlearner.mask.items()}
            m = max(mask.values(), key=torch.Tensor.numel).view(-1)
            ends = [int(m.int().argmax()), int(m.int().argmin())]
            if processes.rank:  # as many coordinates, of which one is another
                m[ends] = torch.tensor([False, True])
            again = projgrad.OrthoGrad(twins.model, twins.unlearner.optimizer, metric="optimizer", mask=mask)
            with raises(ValueError, "disagree on the mask"):
                again.step(**twins.closures())
            assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())
    twins.unlearner.mask = mask  # later it is compared where it is another one
    with raises(ValueError, "disagree on the mask"):
        twins.unlearner.step(**twins.closures())
    if not processes.rank:
        m[ends] = torch.tensor([False, True])
    twins.unlearner.step(**twins.closures())
    if processes.rank:
        m[ends] = torch.tensor([True, False])
    with raises(ValueError, "disagree on the options"):
        twins.unlearner.step(**twins.closures())


def check_metric_failures(processes):
    """An error on one process stops all of them before the optimizer steps, and the next step is right."""
    twins = MetricTwins("tied", processes, replicated(processes))
    closures, last = twins.closures(), processes.size - 1
    before = whole(twins.model)
    for name, closure in closures.items():
        nan = lambda closure=closure: closure() * (float("nan") if processes.rank == last else 1)  # noqa: E731
        with raises(FloatingPointError, "NaN" if name == "retain" else "nan"):
            twins.unlearner.step(**closures | {name: nan})

    for metric, betas in (("optimizer", (0.9 if processes.rank else 0.8, 0.999)), ("gradient", (0.9, 0.999))):
        metric = metric if processes.rank == last else "optimizer"
        with raises(ValueError, "disagree on the options"):
            other = AdamW(twins.model.parameters(), lr=0.01, betas=betas)
            projgrad.OrthoGrad(twins.model, other, metric=metric).step(**closures)
    kind = RMSprop if processes.rank == last else AdamW
    with raises(ValueError, "disagree on the options"):
        projgrad.OrthoGrad(twins.model, kind(twins.model.parameters(), lr=0.01), metric="optimizer").step(**closures)
    combine, make_checks = SpreadGradients.combine_, SpreadHeld.make_checks
    if processes.rank == last:  # wrong rules, and a check that only this process makes
        SpreadGradients.combine_ = lambda self, sums, w, *rest: combine(self, sums, 2 * w, *rest)
    with raises(ArithmeticError, "disagree"):
        twins.unlearner.step(**closures)
    SpreadGradients.combine_ = combine
    if processes.rank == last:
        SpreadHeld.make_checks = broken
    with raises(ArithmeticError, "broken"):
        twins.unlearner.step(**closures)
    SpreadHeld.make_checks = make_checks
    assert not twins.unlearner.optimizer.state and all(p.grad is None for p in twins.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())
    twins.compare(1, prefix="module.")
    other = optimizer("adamw")(twins.model)
    if processes.rank == last:
        other.load_state_dict(twins.unlearner.optimizer.state_dict())
    with raises(ValueError, "disagree on the state of the optimizer"):
        projgrad.OrthoGrad(twins.model, other, metric="optimizer").step(**closures)


def check_metric_failures_after_the_optimizer(processes):
    """An error on one process stops the others there too."""
    twins, last = MetricTwins("tied", processes, replicated(processes), alpha=0.0), processes.size - 1
    twins.compare(1, prefix="module.")
    combine = SpreadGradients.combine_
    if processes.rank == last:
        SpreadGradients.combine_ = broken
    with raises(ArithmeticError, "broken"):
        twins.unlearner.step(**twins.closures())
    SpreadGradients.combine_ = combine
    if processes.rank == last:
        next(iter(twins.unlearner.optimizer.state.values()))["exp_avg_sq"].fill_(float("nan"))
    with raises(FloatingPointError, "NaN or Inf in the state of the optimizer"):
        twins.unlearner.step(**twins.closures())


def broken(*_):
    raise ArithmeticError("broken")


def check_metric_of_shards_of_replicas(mesh):
    """A mesh of two dimensions: shards over one, copies over the other."""
    everyone = dist.init_device_mesh("cpu", (4,))
    MetricTwins("tied", Processes(everyone), lambda model: shard(model, mesh)).compare(2)


CHECKS = {  # with how many processes
    check_metric_of_shards: (2, 4),
    check_metric_of_replicas: (2, 4),
    check_metric_of_adapters: (2,),
    check_metric_where_processes_use_other_parts: (2,),
    check_metric_of_hard_rows: (2,),
    check_metric_of_whole_adapters_and_resuming: (2,),
    check_metric_of_mixed_precision: (2,),
    check_metric_with_a_scaler: (2,),
    check_metric_of_an_optimizer_that_says_its_diagonal: (2,),
    check_metric_with_a_mask: (2,),
    check_metric_failures: (2, 4),
    check_metric_failures_after_the_optimizer: (2,),
}
ON_A_GRID = [check_metric_of_shards_of_replicas]
