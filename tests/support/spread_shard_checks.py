"""Models under fully_shard, and what else shards parameters, over several processes."""

import copy
import datetime
import time

import torch
import torch.distributed as dist
from spread_twins import COUNTS, MODELS, Processes, Twins, assert_same, build, losses, raises, sgd, shard, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

import projgrad


def check_shards(processes):
    for kind in MODELS:
        ways = ("global", True), ("per_tensor", False)
        for scope, after in ways if processes.size == 2 else ways[: 1 + (kind == "tied")]:
            spread = lambda model, after=after: shard(model, processes.mesh, reshard_after_forward=after)  # noqa: E731
            twins = Twins(kind, processes, spread, scope=scope, max_norm=0.1)
            with torch.no_grad():
                twins.closures()["forget"]()  # leaves the parameters of the root whole
            twins.compare()
            assert not twins.unlearner._spread.gathers_all  # the graph is known in the second step
            with torch.no_grad():
                twins.closures()["forget"]()
            projgrad.OrthoGrad(twins.model, twins.unlearner.optimizer)  # it finds the shards again


def check_refusals_of_shards(processes):
    twins = Twins("convolutions", processes, lambda model: shard(model, processes.mesh))
    closures, none = twins.closures(), processes.rank == 1
    with raises(ValueError, "runs the model too, on an empty batch"):
        nothing = lambda: closures["retain"]()[:0].detach()  # noqa: E731
        twins.unlearner.step(closures["forget"], nothing if none else closures["retain"])
    scaler = torch.amp.GradScaler("cpu")
    with raises(ValueError, "not supported with fully_shard"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model), scaler=scaler).step(**closures)
    twins.unlearner = projgrad.OrthoGrad(twins.model, sgd(twins.model))
    twins.compare(1)


def check_adapters_that_stay_whole(processes):
    """Of a sharded model: added after fully_shard, they are copies that nothing averages but the step."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 11, bias=False)

        def forward(self, ids):
            return self.base(ids) + self.b(self.a(self.base.table(ids)))

    counts = COUNTS[processes.size]
    base, x, y = build("tied", sum(counts))
    single = Adapted(base).double()
    model = copy.deepcopy(single)
    fully_shard(model.base, mesh=processes.mesh)
    alone, spread = (projgrad.OrthoGrad(m, sgd(m), max_norm=0.1) for m in (single, model))
    fx, fy = x[: processes.size], y[: processes.size]
    ones = (1,) * processes.size
    for _ in range(2):
        alone.step(lambda: losses(single, fx, fy).mean(), lambda: losses(single, x, y))
        spread.step(
            lambda: losses(model, processes.part(fx, ones), processes.part(fy, ones)).mean(),
            lambda: losses(model, processes.part(x), processes.part(y)),
        )
    assert_same(model, single)


def check_mixed_precision(processes):
    """Parameters are gathered in bfloat16 and gradients summed in float32: as near to one process as that rounds."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    model = shard(copy.deepcopy(single), processes.mesh, mp_policy=policy)
    start = whole(single)
    x, y = torch.randn(sum(COUNTS[processes.size]), 8), torch.arange(sum(COUNTS[processes.size])) % 3
    forget, retain = (lambda m: losses(m, -x, y).float().mean()), (lambda m, x, y: losses(m, x, y).float())
    projgrad.OrthoGrad(single, sgd(single), alpha=0.1).step(lambda: forget(single), lambda: retain(single, x, y))
    record = projgrad.OrthoGrad(model, sgd(model), alpha=0.1).step(
        lambda: forget(model), lambda: retain(model, processes.part(x), processes.part(y))
    )
    assert record.residual < 0.05
    moved = [torch.cat([(whole(m)[name] - start[name]).flatten() for name in start]) for m in (single, model)]
    assert F.cosine_similarity(*moved, dim=0) > 0.99


def check_tensor_parallelism_is_refused(processes):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    parallelize_module(model, processes.mesh, {"0": ColwiseParallel()})
    x = torch.randn(3, 8)
    with raises(ValueError, "tensor parallelism is not supported"):
        projgrad.OrthoGrad(model, sgd(model)).step(lambda: model(x).sum(), lambda: model(x).sum(1))


def check_shards_of_replicas(mesh):
    """A mesh of two dimensions: shards over one, copies over the other."""
    everyone = dist.init_device_mesh("cpu", (4,))
    Twins("tied", Processes(everyone), lambda model: shard(model, mesh)).compare()


def check_failure_inside_a_sharded_model(_):
    """The others wait for shards that never come: they stop when the timeout of the group is over."""
    # Of processes that share no other mesh: torch takes meshes of the same processes for one, with one timeout.
    group = dist.new_group([0, 1, 2], timeout=datetime.timedelta(seconds=2))
    if dist.get_rank() == 3:
        return
    processes = Processes(DeviceMesh.from_group(group, "cpu"))
    twins = Twins("tied", processes, lambda model: shard(model, processes.mesh))
    forget = twins.closures()["forget"]

    def broken():
        if processes.rank == 2:
            raise KeyError("a file is missing")
        return forget()

    start = time.monotonic()
    with raises((KeyError, RuntimeError), ""):
        twins.unlearner.step(broken, twins.closures()["retain"])
    assert time.monotonic() - start < 60


CHECKS = {  # with how many processes
    check_shards: (2, 4),
    check_refusals_of_shards: (2,),
    check_adapters_that_stay_whole: (2,),
    check_mixed_precision: (2,),
    check_tensor_parallelism_is_refused: (2,),
}
ON_A_GRID = [check_shards_of_replicas, check_failure_inside_a_sharded_model]
