"""Lists of closures with metric="optimizer" under fully_shard, for spread_union_checks.py."""

import contextlib
import itertools

import torch
from spread_lists import NONE, UNEQUAL, Lists, sharded
from spread_metric_twins import optimizer
from spread_twins import assert_same_bits, raises, whole
from torch.distributed.tensor import DTensor

from projgrad.methods.responses import Adam
from projgrad.tape import shards, union, weighted_union


def lists_in_the_metric(processes, name="adamw", sizes=UNEQUAL, after=True, **options):
    spreads = [sharded(processes, reshard_after_forward=after)]
    options = dict(optimizer=optimizer(name), metric="optimizer", alpha=0.3, per_sample=True) | options
    return Lists("wide", processes, spreads, sizes, **options)


def check_lists_in_the_metric(processes):
    """Of two optimizers, in both scopes; one process has no samples at all."""
    if processes.size == 2:
        assert lists_in_the_metric(processes, max_norm=0.1).compare(2).iterations > 2
        lists_in_the_metric(processes, "momentum", NONE, after=False, scope="per_tensor").compare(1)
    else:
        lists_in_the_metric(processes, scope="per_tensor").compare(1)


def check_metric_in_rounds(processes):
    """Few parameters are whole at one time; one process makes K anew in every pass, for which all gather D."""
    before = shards.ROUND, union.HELD
    try:
        shards.ROUND, union.HELD = 1000, 16
        lists_in_the_metric(processes).compare(1)
    finally:
        shards.ROUND, union.HELD = before


def check_failures_after_the_optimizer(processes):
    """On one process, or by hand on all of them: everything is what it was before the step, and the next is right."""
    lists, last = lists_in_the_metric(processes), processes.rank == processes.size - 1
    lists.compare(1)
    (model,), (unlearner,) = lists.models, lists.unlearners
    (forget, retain), states = lists.closures(model), unlearner.optimizer.state
    before, held = whole(model), {p: {key: t.clone() for key, t in state.items()} for p, state in states.items()}

    def check(kind, words, *more):
        with raises(kind, words):
            unlearner.step(forget, [*more, *retain])
        assert all(torch.equal(p, before[name]) for name, p in whole(model).items())
        for p, state in states.items():
            assert p.grad is None and state.keys() == held[p].keys()
            assert all(torch.equal(local(t), local(held[p][key])) for key, t in state.items())

    def failing(error, here, in_backward=False):
        """Fail after the forward pass or inside the backward pass of the second call, the first after the step."""
        calls = itertools.count()

        def fail(*_):
            raise error

        def inside(_, __, out):
            out.register_hook(fail)

        def run():
            now = next(calls) and here
            hook = model.norm.register_forward_hook(inside) if now and in_backward else None
            value = retain[0]()
            if hook is not None:
                hook.remove()
            elif now:
                fail()
            return value

        return run

    check((KeyError, RuntimeError), "a file is missing", failing(KeyError("a file is missing"), last))
    check(KeyboardInterrupt, "", failing(KeyboardInterrupt(), True, in_backward=True))
    for holder, name in ((Adam, "change"), (weighted_union.ChangeUnion, "finish_")):
        with broken(holder, name, last):
            check(ArithmeticError, "broken")
    lists.compare(1)
    assert_same_bits(model, processes)


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


@contextlib.contextmanager
def broken(holder, name, here):
    """Let a method fail, on one process."""

    def fail(*_):
        raise ArithmeticError("broken")

    good = getattr(holder, name)
    setattr(holder, name, fail if here else good)
    try:
        yield
    finally:
        setattr(holder, name, good)


CHECKS = {  # with how many processes
    check_lists_in_the_metric: (2, 4),
    check_failures_after_the_optimizer: (2,),
    check_metric_in_rounds: (2,),
}
