"""Lists of closures over several processes, of copies of a model, in both metrics."""

import copy
import functools
import itertools

import torch
from spread_twins import assert_same, assert_same_bits, build, losses, raises, replicated, sgd, whole

import projgrad


def lists_of_micro_batches(processes, scope, reduction, make=sgd, **more):
    """Compare two steps; return the model, the closures of this process, and its unlearner."""
    sizes = {2: ((2, 1), (2,)), 4: ((1, 2), (2,), (1, 1, 1), (1,))}[processes.size]  # of a process's micro-batches
    counts, pieces, times = [sum(some) for some in sizes], sizes[processes.rank], 1 if reduction == "mean" else 2
    single, x, y = build("tied", sum(counts))
    _, fx, fy = build("tied", 2 * processes.size, seed=2)
    model = replicated(processes)(copy.deepcopy(single))
    alone = projgrad.OrthoGrad(single, make(single), scope=scope, alpha=0.4, **more)
    options = dict(scope=scope, alpha=0.4, union_tolerance=1e-9, forget_reduction=reduction)
    unlearner = projgrad.OrthoGrad(model, make(model), **options | more)
    mine = zip(*(processes.part(z, counts).split(pieces) for z in (x, y)), strict=True)
    forgets = zip(*(processes.part(z, (2,) * processes.size).split(1) for z in (fx, fy)), strict=True)
    retain = [lambda a=a, b=b: losses(model, a, b) for a, b in mine]
    forget = [lambda a=a, b=b: losses(model, a, b).mean() for a, b in forgets]
    for _ in range(2):
        expected = alone.step(lambda: times * losses(single, fx, fy).mean(), lambda: losses(single, x, y))
        record = unlearner.step(forget, retain)
        assert record.micro_batches == sum(map(len, sizes)) and record.residual <= 1e-9
        for name in ("preserved_norm", "forget_loss", "retain_loss"):
            assert abs(getattr(record, name) - getattr(expected, name)) <= 1e-7, name
    assert_same(model, single, 1e-7, "module.")
    assert_same_bits(model, processes)
    return model, forget, retain, unlearner


def check_lists_of_micro_batches(processes):
    """Lists of closures, of other lengths and sizes on every process: the step of one process with all samples."""
    for scope, reduction in (("global", "mean"), ("per_tensor", "sum")):
        model, forget, retain, unlearner = lists_of_micro_batches(processes, scope, reduction)
    before = whole(model)
    last = lambda: retain[-1]() * (float("nan") if processes.rank == 1 else 1.0)  # noqa: E731
    with raises(FloatingPointError, "NaN"):
        unlearner.step(forget, [*retain[:-1], last])
    with raises(ValueError, "without closures"):
        unlearner.step(forget, [] if processes.rank == 1 else retain)
    assert all(torch.equal(p, before[name]) for name, p in whole(model).items())


def check_lists_in_the_metric_of_the_optimizer(processes):
    """The same with AdamW; an error after its step, on one process, leaves everything as it was on all of them."""
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for scope in ("global", "per_tensor"):
        more = dict(max_norm=0.5, metric="optimizer", max_passes=400)
        model, forget, retain, unlearner = lists_of_micro_batches(
            processes, scope, "mean", lambda m: adamw(m.parameters()), **more
        )
    before, states = whole(model), copy.deepcopy(list(unlearner.optimizer.state.values()))
    calls = itertools.count()

    def broken():
        if processes.rank == 1 and next(calls):
            raise KeyError("a file is missing")
        return retain[-1]()

    with raises((KeyError, RuntimeError), "a file is missing"):
        unlearner.step(forget, [*retain[:-1], broken])
    assert all(torch.equal(p, before[name]) for name, p in whole(model).items())
    for state, held in zip(unlearner.optimizer.state.values(), states, strict=True):
        assert state.keys() == held.keys() and all(torch.equal(value, held[key]) for key, value in state.items())
    unlearner.step(forget, retain)
    assert_same_bits(model, processes)


CHECKS = {  # with how many processes
    check_lists_of_micro_batches: (2, 4),
    check_lists_in_the_metric_of_the_optimizer: (2, 4),
}
