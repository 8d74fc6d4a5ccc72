"""Lists of closures over several processes, of models under fully_shard: beside one process with one batch."""

import copy
import runpy
from pathlib import Path

import torch
import torch.distributed as dist
from spread_lists import EQUAL, TOLERANCE, UNEQUAL, Lists, sharded, two_rates
from spread_twins import Processes, assert_same, assert_same_bits, build, losses, raises, replicated, sgd, shard, whole
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import projgrad
from projgrad.tape import shards


def check_lists(processes):
    """Both scopes, both ways to reshard, tied and frozen weights; beside DistributedDataParallel."""
    both = [sharded(processes), replicated(processes)] if processes.size == 2 else [sharded(processes)]
    lists = Lists("wide", processes, both, UNEQUAL, per_sample=True, optimizer=two_rates, alpha=0.3)
    assert lists.compare(2, ("", "module.")[: len(both)]).iterations > 2
    assert not lists.unlearners[0]._spread.gathers_all  # the graphs are known in the second step
    if processes.size == 2:
        keep = [sharded(processes, reshard_after_forward=False)]
        assert Lists("wide", processes, keep, UNEQUAL, scope="per_tensor", max_norm=0.1).compare(1).iterations > 2
        Lists("tied", processes, [sharded(processes)], EQUAL).compare(2)  # small enough to be projected exactly
    else:  # a process has an empty shard of a bias
        Lists("convolutions", processes, [sharded(processes)], UNEQUAL, max_norm=0.1).compare(1)


def check_rounds(processes):
    """Few parameters are whole at one time."""
    before, shards.ROUND = shards.ROUND, 1000
    most = []
    try:
        lists = Lists("wide", processes, [sharded(processes)], UNEQUAL)
        gathered = shards.Shards.gathered

        def counted(self, vector, names):
            whole = gathered(self, vector, names)
            most.append(len(whole))
            return whole

        shards.Shards.gathered = counted
        lists.compare(1)
    finally:
        shards.ROUND, shards.Shards.gathered = before, gathered
    assert set(most) == {1, 2}  # the table alone, then the two tensors of the norm


class Adapted(nn.Module):
    """A sharded model with an adapter that stays whole."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(48, 2, bias=False), nn.Linear(2, 11, bias=False)

    def forward(self, ids):
        return self.base(ids) + self.b(self.a(self.base.table(ids)))


def check_adapters_that_stay_whole(processes):
    def spread(model):
        fully_shard(model.base, mesh=processes.mesh)
        return model

    torch.manual_seed(3)
    single = Adapted(build("wide", 1)[0]).double()
    Lists("wide", processes, [spread], UNEQUAL, single=single, max_norm=0.1).compare(1)


def check_failures(processes):
    """An error on one process stops all of them, changes nothing, and the next step is right."""
    lists = Lists("wide", processes, [sharded(processes)], UNEQUAL)
    (model,), (unlearner,), last = lists.models, lists.unlearners, processes.size - 1
    forget, retain = lists.closures(model)
    before = whole(model)

    def late(closure, error, calls=0):
        """Fail after the model ran, in one of the calls."""
        left = [calls]

        def run():
            value = closure()
            left[0] -= 1
            if processes.rank == last and left[0] < 0:
                raise error
            return value

        return run

    for calls in (0, 2):  # in the first pass, and later
        with raises(KeyError if processes.rank == last else RuntimeError, "" if processes.rank == last else "failed"):
            unlearner.step(forget, [*retain[:-1], late(retain[-1], KeyError("a file is missing"), calls)])
    with raises(KeyError if processes.rank == last else RuntimeError, "" if processes.rank == last else "failed"):
        unlearner.step([*forget[:-1], late(forget[-1], KeyError("a file is missing"))], retain)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in whole(model).items())
    lists.compare(1)


def check_refusals(processes):
    """What one process finds stops all of them, changes nothing, and the next step is right."""
    lists = Lists("wide", processes, [sharded(processes)], UNEQUAL)
    (model,), (unlearner,), last = lists.models, lists.unlearners, processes.size - 1
    forget, retain = lists.closures(model)
    before = whole(model)

    def ended():
        value = retain[-1]()
        if processes.rank == last:
            raise StopIteration
        return value

    words = "retain" if processes.rank == last else f"process {last} failed, so all stop: retain"
    with raises(ValueError, words):
        unlearner.step(forget, [*retain[:-1], ended])
    nan = lambda: retain[-1]() * (float("nan") if processes.rank == last else 1.0)  # noqa: E731
    with raises(FloatingPointError, "NaN or Inf in the losses"):
        unlearner.step(forget, [*retain[:-1], nan])
    nan = lambda: forget[-1]() * (float("nan") if processes.rank == last else 1.0)  # noqa: E731
    with raises(FloatingPointError, "NaN or Inf in the losses"):
        unlearner.step([*forget[:-1], nan], retain)
    calls = []

    def drifts():
        calls.append(0)
        return retain[-1]() * (len(calls) if processes.rank == last else 1.0)

    with raises(ValueError, "returned other losses than when it was first called"):
        unlearner.step(forget, [*retain[:-1], drifts])

    def mixed():
        each = losses(model, lists.fx[:2], lists.fy[:2])
        return each * each.flip(0)

    with raises(ValueError, "share"):  # found in the backward passes of one process
        unlearner.step(forget, [*retain[:-1], mixed] if processes.rank == last else retain)
    with raises(ValueError, "without closures"):
        unlearner.step(forget, [] if processes.rank == last else retain)
    none = [lambda: retain[0]()[:0], lambda: retain[0]()[:0]]
    with raises(ValueError, "no process has a retain sample"):
        unlearner.step(forget, none)
    with raises(ValueError, "runs the model too, on an empty batch"):
        unlearner.step(forget, [lambda: retain[0]()[:0].detach()] if processes.rank == last else retain)
    with raises(ValueError, "need equally many forget samples in a micro-batch"):
        some = lambda k: lambda: losses(model, lists.fx[:k], lists.fy[:k])  # noqa: E731
        unlearner.step([some(2), some(3 if processes.rank == last else 2)], retain)
    with raises(ValueError, "damping"):
        projgrad.OrthoGrad(model, sgd(model), damping=0.1).step(forget, retain)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in whole(model).items())
    lists.compare(1)
    shift = torch.ones((), dtype=torch.float64)

    def steep():
        each = retain[-1]()
        return each + (each - each.detach() + shift).sqrt()

    unlearner.step(forget, [*retain[:-1], steep])
    shift.fill_(float(processes.rank != last))  # the losses are finite, and the gradients of a known graph are not
    with raises(FloatingPointError, "NaN or Inf"):
        unlearner.step(forget, [*retain[:-1], steep])
    lists.unlearners[0].step(forget, retain)
    assert_same_bits(model, processes)


def check_forgets_of_other_lengths(processes):
    """A process with fewer forget closures than others: the mean of its own counts as much as that of the others."""
    single, x, y = build("wide", 3)
    _, fx, fy = build("wide", 4, seed=2)
    model = shard(copy.deepcopy(single), processes.mesh)
    alone, unlearner = (projgrad.OrthoGrad(m, sgd(m), union_tolerance=TOLERANCE) for m in (single, model))
    is_first = processes.rank == 0
    forget = [lambda k=k: losses(model, fx[k : k + 1], fy[k : k + 1]) for k in range(3 if is_first else 2)]
    rest = processes.size - 1

    def expected():
        each = losses(single, fx, fy)
        return (each[:3].mean() + rest * each[:2].mean()) / processes.size

    record = unlearner.step(forget, lambda: losses(model, x, y)[: 3 if is_first else 0])
    assert abs(record.forget_loss - float(alone.step(expected, lambda: losses(single, x, y)).forget_loss)) <= 1e-10
    assert_same(model, single)


def check_mixed_precision(processes):
    """Parameters are gathered in bfloat16, the vectors are in float32: as near to one process as that rounds."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 3))
    model, x, y = (
        shard(copy.deepcopy(single), processes.mesh, mp_policy=policy),
        torch.randn(6, 40),
        torch.arange(6) % 3,
    )
    forget, retain = (lambda m: losses(m, -x, y).float().mean()), (lambda m, x, y: losses(m, x, y).float())
    alone, unlearner = (projgrad.OrthoGrad(m, sgd(m), alpha=0.1, union_tolerance=1e-2) for m in (single, model))
    start = whole(single)
    alone.step(lambda: forget(single), lambda: retain(single, x, y))
    mine = x.split(3)[processes.rank], y.split(3)[processes.rank]
    parts = projgrad.micro_batches(lambda x, y: retain(model, x, y), zip(*(z.split(2) for z in mine), strict=True))
    record = unlearner.step(lambda: forget(model), parts)
    assert record.residual < 0.05 and record.iterations > 0
    moved = [torch.cat([(whole(m)[name] - start[name]).flatten() for name in start]) for m in (single, model)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99


class Pair(nn.Module):
    """Two parameters of one shape, of which a forward pass uses one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x, first):
        return self.a(x) if first else self.b(x)


def check_forgets_that_use_other_parameters(processes):
    """fully_shard would add the gradient of one to that of the other: over the whole list all use both."""
    model = fully_shard(Pair(), mesh=processes.mesh)
    unlearner, x = projgrad.OrthoGrad(model, sgd(model)), torch.randn(3, 4)
    order = (True, False) if processes.rank == 0 else (False, True)
    with raises(ValueError, "which parameters forget() uses"):
        unlearner.step([lambda first=first: model(x, first).sum() for first in order], lambda: model(x, True).sum(1))


def check_random_numbers(processes):
    """Dropout of every micro-batch is the same in all passes, and visits that do not count draw nothing."""
    lists = Lists("wide", processes, [sharded(processes)], UNEQUAL)
    (model,), (unlearner,), dropout = lists.models, lists.unlearners, nn.Dropout(0.2)
    after = []
    for m in (lists.single, model):
        m.norm.register_forward_hook(lambda module, _, out: dropout(out))
        forget, retain = lists.closures(m)
        forget = forget[: 1 + (processes.rank == 0)]
        torch.manual_seed(processes.rank)
        if m is model:
            assert unlearner.step(forget, retain).residual <= TOLERANCE
        else:
            for closure in (*forget, *retain):
                closure()
        after.append(torch.rand(3))
    assert torch.equal(*after)


def check_shards_of_replicas(mesh):
    """A mesh of two dimensions: shards over one, copies over the other."""
    everyone = Processes(dist.init_device_mesh("cpu", (4,)))
    Lists("wide", everyone, [lambda model: shard(model, mesh)], UNEQUAL).compare(1)


def check_example(_):
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "several_processes.py"))["main"]
    assert main("fsdp", "lists", steps=1) <= 1e-4


CHECKS = {  # with how many processes
    check_refusals: (2,),
    check_lists: (2, 4),
    check_failures: (2, 4),
    check_rounds: (2,),
    check_adapters_that_stay_whole: (2,),
    check_mixed_precision: (2,),
    check_forgets_of_other_lengths: (2,),
    check_forgets_that_use_other_parameters: (2,),
    check_random_numbers: (2,),
}
ON_A_GRID = [check_shards_of_replicas, check_example]
