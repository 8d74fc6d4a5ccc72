"""What several processes do together under metric="optimizer": every check of tests/methods/test_spread_metric.py."""

import copy
import time
import warnings

import torch
import torch.distributed as dist
from spread_checks import Processes, Twins, assert_same, assert_same_bits, raises, replicated, shard, whole
from torch import nn
from torch.distributed.tensor import DTensor

import projgrad

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
OPTIMIZERS = {
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd": (SGD, {"lr": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
}


def optimizer(name, ratio=0.3):
    """A function that makes an optimizer with two parameter groups, of which one is slower."""
    kind, options = OPTIMIZERS[name]

    def make(model):
        params = [p for p in model.parameters() if p.requires_grad]
        return kind([{"params": params[::2], "lr": ratio * options["lr"]}, {"params": params[1::2]}], **options)

    return make


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


class MetricTwins(Twins):
    """The steps of one process and of several, with all that they leave behind."""

    def __init__(self, kind, processes, spread, name="adamw", **options):
        super().__init__(kind, processes, spread, optimizer=optimizer(name), metric="optimizer", **options)

    def compare(self, steps=3, prefix="", bound=1e-8):
        record = super().compare(steps, prefix, bound)
        mine, every = dict(self.model.named_parameters()), {}
        for name, q in self.single.named_parameters():
            p, state = mine[prefix + name], self.alone.optimizer.state.get(q, {})
            assert self.unlearner.optimizer.state.get(p, {}).keys() == state.keys()
            every[name, "grad"] = p.grad, q.grad
            every |= {(name, key): (self.unlearner.optimizer.state[p][key], value) for key, value in state.items()}
        every = {key: (full(a), b) for key, (a, b) in every.items() if a is not None or b is not None}
        sizes = {kind: max(b.norm() for (_, key), (_, b) in every.items() if key == kind) for _, kind in every}
        for (name, key), (a, b) in every.items():  # what a projection leaves of a short tensor is its rounding
            assert (a - b).norm() <= bound * b.norm() + 1e-13 * sizes[key], (name, key)
        return record


def check_metric_of_replicas(processes):
    for kind, name, scope in (
        ("tied", "adamw", "global"),
        ("convolutions", "adam", "per_tensor"),
        ("adapted", "momentum", "global"),
        ("tied", "rmsprop", "per_tensor"),
        ("convolutions", "sgd", "global"),
    ):
        MetricTwins(kind, processes, replicated(processes), name, scope=scope, max_norm=0.1).compare(prefix="module.")
    MetricTwins("adapted", processes, replicated(processes), alpha=0.0, damping=1e-2).compare(1, prefix="module.")


def check_metric_of_copies(processes):
    MetricTwins("convolutions", processes, lambda model: model, process_group=processes.group).compare()


def check_metric_of_shards(processes):
    for kind, name, scope, after in (
        ("tied", "adamw", "global", True),
        ("adapted", "adam", "per_tensor", False),
        ("convolutions", "momentum", "global", False),
        ("convolutions", "rmsprop", "per_tensor", True),
    ):
        spread = lambda model, after=after: shard(model, processes.mesh, reshard_after_forward=after)  # noqa: E731
        MetricTwins(kind, processes, spread, name, scope=scope, max_norm=0.1).compare()


CHECKS = [check_metric_of_replicas, check_metric_of_copies, check_metric_of_shards]


def run(rank, file):
    """Run every check with two processes, twice side by side, and with all four."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4)
    pairs = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "member"))
    everyone = dist.init_device_mesh("cpu", (4,))
    for check in CHECKS:
        for mesh in (pairs["member"], everyone):
            start = time.perf_counter()
            check(Processes(mesh))
            if rank == 0:
                print(f"{check.__name__} with {mesh.size()}: {time.perf_counter() - start:.1f} s", flush=True)
    dist.barrier()
