"""`OrthoGrad.backward` over several processes: the same as `step`, and what only one of them does in between."""

import copy
import functools

import torch
from spread_twins import COUNTS, build, losses, raises, replicated, shard, whole
from torch import nn

import projgrad


def sides(processes, spread, metric, max_norm, pieces):
    """A model in two copies, one for `step` and one for `backward`, with its closures of this process."""
    model, x, y = build("tied", sum(COUNTS[processes.size]))
    counts, made = COUNTS[processes.size], []
    mine = [processes.part(t, counts) for t in (x, y)]
    for norm in (max_norm, None):
        one = spread(copy.deepcopy(model))
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        options = {"metric": metric, "max_norm": norm, "union_tolerance": 1e-10}
        unlearner = projgrad.OrthoGrad(one, optimizer, 0.3, **options)
        parts = [t.tensor_split(pieces) for t in mine]
        retain = [functools.partial(losses, one, *part) for part in zip(*parts, strict=True)]
        forget = functools.partial(lambda m: losses(m, x[:2], y[:2]).mean(), one)
        made.append((one, optimizer, unlearner, (forget, retain if pieces > 1 else retain[0])))
    return made


def check_backward(processes, spread, metric, pieces):
    """Clipping between backward and the optimizer's step is what max_norm is in a step."""
    (single, _, stepper, closures), (model, optimizer, unlearner, others) = sides(
        processes, spread, metric, 0.05, pieces
    )
    for _ in range(2):
        wanted = stepper.step(*closures)
        record = unlearner.backward(*others)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        for a, b in zip(whole(single).values(), whole(model).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert abs(record.preserved_norm - wanted.preserved_norm) < 1e-6 and record.residual < 1e-8


def check_drifts(processes, spread):
    """What only one process does is refused on all, and the next step is right."""
    drifts = {
        ".grad": lambda model, _: [p.grad.mul_(0.5) for p in model.parameters() if p.grad is not None],
        "learning rates": lambda _, optimizer: optimizer.param_groups[0].update(lr=0.5),
        "still what": lambda _, optimizer: optimizer.zero_grad(),
    }
    for words, drift in drifts.items():
        (_, _, stepper, closures), (model, optimizer, unlearner, others) = sides(
            processes, spread, "optimizer", None, 1
        )
        unlearner.backward(*others)
        before = whole(model)
        if processes.rank == processes.size - 1:
            drift(model, optimizer)
        with raises((ValueError, RuntimeError), words):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), whole(model).values(), strict=True))
        optimizer.param_groups[0]["lr"] = 1e-2
        for _ in range(2):
            stepper.step(*closures)
            unlearner.backward(*others)
            optimizer.step()
        for a, b in zip(whole(stepper.model).values(), whole(model).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def check_backward_of_all_kinds(processes):
    copies, shards = replicated(processes), lambda model: shard(model, processes.mesh)
    for spread, metric, pieces in (
        (copies, "gradient", 1),
        (copies, "optimizer", 1),
        (copies, "optimizer", 2),
        (shards, "gradient", 1),
        (shards, "gradient", 2),
        (shards, "optimizer", 1),
        (shards, "optimizer", 2),
    ):
        check_backward(processes, spread, metric, pieces)


def check_drifts_of_copies(processes):
    check_drifts(processes, replicated(processes))


def check_drifts_of_shards(processes):
    check_drifts(processes, lambda model: shard(model, processes.mesh))


CHECKS = {check_backward_of_all_kinds: (2,), check_drifts_of_copies: (2,), check_drifts_of_shards: (2,)}
