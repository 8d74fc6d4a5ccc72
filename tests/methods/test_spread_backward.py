"""`OrthoGrad.backward` over several processes."""

import os

import pytest
import spread_backward_checks
import torch


def _run(rank, file):
    spread_backward_checks.run(rank, file)
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out


@pytest.mark.slow
@pytest.mark.same_without_extension
def test_backward_and_drifts_with_two_processes(tmp_path):
    torch.multiprocessing.spawn(_run, (str(tmp_path / "store"),), nprocs=2)
