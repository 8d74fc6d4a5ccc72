"""Lists of closures over several processes, under fully_shard: the step of one process with all samples in a batch."""

import os

import pytest
import spread_union_checks
import torch


def _run(rank, file):
    spread_union_checks.run(rank, file)
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out


@pytest.mark.slow
@pytest.mark.same_without_extension
def test_lists_of_closures_of_sharded_models_with_two_and_four_processes(tmp_path):
    torch.multiprocessing.spawn(_run, (str(tmp_path / "store"),), nprocs=4)
