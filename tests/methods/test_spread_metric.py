"""metric="optimizer" over several processes: the same steps as one process takes on all samples."""

import os

import pytest
import spread_metric_checks
import torch


def _run(rank, file):
    spread_metric_checks.run(rank, file)
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out


@pytest.mark.slow
@pytest.mark.same_without_extension
def test_every_check_of_the_metric_with_two_and_four_processes(tmp_path):
    torch.multiprocessing.spawn(_run, (str(tmp_path / "store"),), nprocs=4)
