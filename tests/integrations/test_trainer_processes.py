"""`UnlearningTrainer` over two processes: DistributedDataParallel, and FSDP2 as accelerate makes it."""

import os

import pytest
import together
import torch
import trainer_checks


def _run(rank, size, folder):
    trainer_checks.run(rank, size, folder)
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out


@pytest.mark.slow
@pytest.mark.same_without_extension
def test_two_processes_take_the_steps_of_one(tmp_path):
    for method, accumulation in {case[1:] for case in trainer_checks.CASES}:
        made = trainer_checks.trained(str(tmp_path), method, accumulation, 1)
        history = made.state.log_history
        names = ("loss", "forget_loss", "retain_loss", "grad_norm")
        logs = {name: [entry[name] for entry in history if name in entry] for name in names}
        torch.save(trainer_checks.weights(made) | {"logs": logs}, tmp_path / f"{method}{accumulation}.pt")
    together.start(_run, (2, str(tmp_path)), 2)
