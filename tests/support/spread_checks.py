"""What several processes do together with copies of a model: every check runs on all of them at once."""

import copy
import datetime
import functools
import itertools
import runpy
import time
from pathlib import Path

import torch
import torch.distributed as dist
from spread_twins import (
    COUNTS,
    MODELS,
    Twins,
    Uneven,
    assert_same,
    assert_same_bits,
    build,
    losses,
    raises,
    replicated,
    sgd,
    whole,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import projgrad
from projgrad.tape import crossing


def check_replicas(processes):
    for kind in MODELS:
        for scope in ("global", "per_tensor") if processes.size == 2 else ("per_tensor",):
            Twins(kind, processes, replicated(processes), scope=scope).compare(prefix="module.")
    options = dict(find_unused_parameters=True, gradient_as_bucket_view=True)
    Twins("tied", processes, replicated(processes, **options), alpha=0.3, max_norm=0.1).compare(prefix="module.")


def check_learning_rates_and_damping(processes):
    def two_rates(model):
        first, *rest = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": rest}], lr=0.1)

    Twins("tied", processes, replicated(processes), optimizer=two_rates).compare(prefix="module.")
    Twins("tied", processes, replicated(processes), damping=1e-2).compare(1, prefix="module.")


def check_the_module_inside(processes):
    """The step is given what is inside, and the closures run the wrapper or not."""
    twins = Twins("convolutions", processes, lambda model: model, process_group=processes.group)
    wrapper = DistributedDataParallel(twins.model, process_group=processes.group)
    twins.step_alone()
    twins.unlearner.step(**twins.closures(wrapper))
    twins.compare(1)
    out = losses(
        wrapper, processes.part(twins.x, (1,) * processes.size), processes.part(twins.y, (1,) * processes.size)
    )
    twins.model.zero_grad()
    out.mean().backward()  # the wrapper averages as before
    assert_same_bits(nn.ParameterList([p.grad for p in twins.model.parameters()]), processes)


def check_hard_rows(processes):
    """Gradients that are the same on several processes, zero, tiny and huge, in float32."""
    torch.manual_seed(0)
    model = nn.Linear(20, 3)
    x = torch.randn(6, 20)
    x[1], x[2], x[4] = x[0], 0.0, 1e12 * x[4]
    x[5] *= 1e-18
    fx = torch.randn(4, 20)
    single = copy.deepcopy(model)
    counts = (3, 3) if processes.size == 2 else (1, 2, 3, 0)
    forget, retain = (lambda m: m(fx).square().mean()), (lambda m, x: (m(x) * torch.tensor([1.0, -2, 3])).sum(1))
    record = projgrad.OrthoGrad(single, sgd(single), alpha=0).step(lambda: forget(single), lambda: retain(single, x))
    spread = DistributedDataParallel(model, process_group=processes.group)
    mine = processes.part(x, counts)
    found = projgrad.OrthoGrad(spread, sgd(spread), alpha=0).step(lambda: forget(spread), lambda: retain(spread, mine))
    assert found.rank == record.rank and found.residual <= 1e-6
    assert_same(spread, single, 1e-5, "module.")


def check_micro_batches(processes):
    """The losses of several forward passes, one after the other."""
    twins = Twins("tied", processes, replicated(processes))
    x, y = processes.part(twins.x), processes.part(twins.y)
    pieces = list(zip(x.split(2), y.split(2), strict=True)) if len(x) else [(x, y)]
    twins.step_alone()
    retain = lambda: torch.cat([losses(twins.model, a, b) for a, b in pieces])  # noqa: E731
    twins.unlearner.step(twins.closures()["forget"], retain)
    assert_same(twins.model, twins.single, 1e-8, "module.")


def check_uneven_uses(processes):
    """Shares that are factors of other lengths, gradients in full, and so many that they come in rounds."""
    torch.manual_seed(0)
    single = Uneven().double()
    inputs = [torch.randn(n, 2 + rank, 6, dtype=torch.float64) for rank, n in enumerate(COUNTS[processes.size])]
    mine, before = inputs[processes.rank], crossing.AT_ONCE
    for scope, at_once in itertools.product(("global", "per_tensor"), (before, 500)):
        alone, model = copy.deepcopy(single), copy.deepcopy(single)
        expected = projgrad.OrthoGrad(alone, sgd(alone, 1e-3), scope=scope).step(
            functools.partial(alone.forgotten, inputs[0]),
            lambda m=alone: torch.cat([m.losses(x, rank) for rank, x in enumerate(inputs)]),
        )
        unlearner = projgrad.OrthoGrad(model, sgd(model, 1e-3), scope=scope, process_group=processes.group)
        crossing.AT_ONCE = at_once
        retain = functools.partial(model.losses, mine, processes.rank)
        record = unlearner.step(functools.partial(model.forgotten, inputs[0]), retain)
        crossing.AT_ONCE = before
        assert record.rank == expected.rank
        assert_same(model, alone)


def check_failures(processes):
    """An error on one process stops all of them, changes nothing, and the next step is right."""
    twins = Twins("tied", processes, replicated(processes))
    closures, last = twins.closures(), processes.size - 1
    before = whole(twins.model)

    def broken(closure):
        def run():
            if processes.rank == last:
                raise KeyError("a file is missing")
            return closure()

        return run

    for name in closures:
        kind, words = (KeyError, "missing") if processes.rank == last else (RuntimeError, f"process {last} failed")
        with raises(kind, words):
            twins.unlearner.step(**closures | {name: broken(closures[name])})
    with raises(TypeError if processes.rank == 0 else Exception, "must be a function"):  # before anything is exchanged
        twins.unlearner.step(**closures | ({"forget": 1.0} if processes.rank == 0 else {}))
    made = closures["retain"]() * 1.0
    with raises(ValueError, "forward pass that was made before"):
        twins.unlearner.step(closures["forget"], lambda: made)
    nan = lambda: closures["retain"]() * (float("nan") if processes.rank == 0 else 1)  # noqa: E731
    with raises(FloatingPointError, "NaN or Inf in the losses"):
        twins.unlearner.step(closures["forget"], nan)
    mean = lambda: closures["retain"]().sum() if processes.rank == 0 else closures["retain"]()  # noqa: E731
    with raises(ValueError, "one loss per sample is needed"):
        twins.unlearner.step(closures["forget"], mean)
    with raises(ValueError, "no process has a retain sample"):
        twins.unlearner.step(closures["forget"], lambda: torch.zeros(0))
    with raises(ValueError, "disagree on the options"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model), alpha=0.1 * processes.rank).step(**closures)
    with raises(ValueError, "disagree on the options"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model, 0.1 + processes.rank)).step(**closures)
    with raises(ValueError, "disagree on the options"):
        optimizer = torch.optim.SGD(twins.model.parameters(), lr=0.1, weight_decay=0.1 * processes.rank)
        projgrad.OrthoGrad(twins.model, optimizer).step(**closures)
    with raises(ValueError, "not supported: the projection is made of the rules"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model), keep_output_gradients=False).step(**closures)
    static = DistributedDataParallel(build("tied", 1)[0], process_group=processes.group, static_graph=True)
    with raises(ValueError, "static_graph=True"):
        projgrad.OrthoGrad(static, sgd(static)).step(**twins.closures(static))
    assert all(p.grad is None for p in twins.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())
    twins.compare(1, prefix="module.")
    if processes.size == 2:
        with raises(ValueError, "over other processes than others"):
            projgrad.OrthoGrad(twins.model, sgd(twins.model), process_group=dist.group.WORLD).step(**closures)
    other = build("tied", 1)[0]
    if processes.rank == 0:
        with torch.no_grad():
            other.table.weight[0, 0] += 1
    with raises(ValueError, "processes 0 and 1 disagree on the weights"):
        projgrad.OrthoGrad(other, sgd(other), process_group=processes.group).step(**twins.closures(other))
    other.norm.weight.requires_grad_(processes.rank == 0)
    with raises(ValueError, "disagree on the parameters"):
        projgrad.OrthoGrad(other, sgd(other), process_group=processes.group).step(**twins.closures(other))


def check_scaler(processes):
    """A step with infinite losses on one process is skipped on all of them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    twins = Twins("tied", processes, replicated(processes), scaler=scaler)
    before, closures = whole(twins.model), twins.closures()
    forget = lambda: closures["forget"]() * (float("inf") if processes.rank == 1 else 1)  # noqa: E731
    assert twins.unlearner.step(forget, closures["retain"]).skipped
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())
    twins.compare(1, prefix="module.")


def check_timeout(_):
    """A process that never comes: the others stop with an error instead of waiting."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model, x, y = build("tied", 2)
    unlearner = projgrad.OrthoGrad(model, sgd(model), process_group=group)
    if dist.get_rank() == 3:
        time.sleep(4)
        return
    start = time.monotonic()
    with raises(RuntimeError, "the other processes did not answer"):
        unlearner.step(lambda: losses(model, x, y).mean(), lambda: losses(model, x, y))
    assert time.monotonic() - start < 60
    assert all(p.grad is None for p in model.parameters())


def check_example(_):
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "several_processes.py"))["main"]
    for way in ("ddp", "fsdp"):
        assert main(way, steps=2) < 1e-6


CHECKS = {  # with how many processes
    check_replicas: (2, 4),
    check_learning_rates_and_damping: (2,),
    check_the_module_inside: (2,),
    check_hard_rows: (2, 4),
    check_micro_batches: (2,),
    check_uneven_uses: (2, 4),
    check_failures: (2, 4),
    check_scaler: (2,),
}
ON_A_GRID = [check_timeout, check_example]
