"""Processes that run checks together: forks of one that has imported everything, which takes seconds in each."""

import multiprocessing
import os

import torch

IMPORTED = "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "projgrad", "peft", "transformers"


def run(check, folder, count):
    """Call check(rank, file) in every process; file is where they meet."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    arguments = check, str(folder / "store")
    torch.multiprocessing.start_processes(_run, arguments, nprocs=count, start_method="forkserver")


def _run(rank, check, file):
    check(rank, file)
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out
