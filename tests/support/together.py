"""Checks that several processes run together, each of them on all at once.

There are four. As two pairs they share the checks for two: so both halves of a machine are busy. Those for four all of
them run. They are forks of one process that has imported everything, which takes seconds.
"""

import datetime
import importlib
import multiprocessing
import os
import time
import warnings

import torch
import torch.distributed as dist
from spread_twins import Processes

IMPORTED = "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "projgrad", "peft", "trainer_checks", "zoo"


def start(work, arguments, nprocs):
    """Call work(rank, *arguments) in processes that have imported everything: `torch.multiprocessing.spawn`, sooner."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    torch.multiprocessing.start_processes(work, arguments, nprocs=nprocs, start_method="forkserver")


def run(folder, *modules):
    """Run what modules have in CHECKS, with how many processes, and in ON_A_GRID, with a mesh of two times two."""
    start(_run, (str(folder / "store"), [module.__name__ for module in modules]), 4)


def _run(rank, file, names):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4, timeout=timeout)
    grid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "member"))
    pair, everyone = Processes(grid["member"]), Processes(dist.init_device_mesh("cpu", (4,)))
    modules = [importlib.import_module(name) for name in names]
    checks = {check: sizes for module in modules for check, sizes in module.CHECKS.items()}
    for check in [check for check, sizes in checks.items() if 2 in sizes][rank // 2 :: 2]:
        _timed(check, pair)
    for check in [check for check, sizes in checks.items() if 4 in sizes]:
        _timed(check, everyone)
    for check in [check for module in modules for check in getattr(module, "ON_A_GRID", ())]:
        _timed(check, grid)
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out


def _timed(check, where):
    start = time.perf_counter(), time.process_time()
    check(where)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    is_grid = isinstance(where, dist.DeviceMesh)
    if (dist.get_rank() if is_grid else where.rank) == 0:
        size = "a grid" if is_grid else where.size
        print(f"{check.__name__} with {size}: {wall:.1f} s, {cpu:.1f} s of CPU time each", flush=True)
