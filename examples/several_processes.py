"""OrthoGrad over several processes: `torchrun --nproc-per-node 2 examples/several_processes.py [ddp|fsdp] [lists]`.

Every process holds some of the forget and of the retain samples. All take the step that one process with all samples
would take. With "lists" the retain samples come in micro-batches of eight, and processes have other numbers of them.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import projgrad


def main(way: str = "ddp", how: str = "batch", steps: int = 20) -> float:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same weights everywhere
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    if way == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    torch.manual_seed(1 + rank)  # other samples on every process, and not equally many
    xf, yf, xr, yr = (
        torch.randn(8, 20),
        torch.randint(5, (8,)),
        torch.randn(16 + rank, 20),
        torch.randint(5, (16 + rank,)),
    )
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.05), alpha=0.5, max_norm=1.0)
    parts = zip(xr.split(8 if how == "lists" else len(xr)), yr.split(8 if how == "lists" else len(yr)), strict=True)
    retain = projgrad.micro_batches(lambda x, y: cross_entropy(model(x), y, reduction="none"), parts)
    for step in range(steps):
        record = unlearner.step(forget=lambda: cross_entropy(model(xf), yf), retain=retain)
        if rank == 0 and step % 5 == 0:
            print(f"rank {record.rank}, residual {record.residual:.0e}, forget loss {record.forget_loss:.3f}")
    return record.residual


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.destroy_process_group()
