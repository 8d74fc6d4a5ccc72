"""`projgrad doctor` where there is a GPU: of which there is none here."""

import pytest
import torch

from projgrad.experiments import cli
from projgrad.experiments.cli import doctor, self_test

pytestmark = pytest.mark.same_without_extension


@pytest.fixture
def begun(monkeypatch):
    """When the tests of each device had to end, on a clock that stands still."""
    ends = {}

    def tests(device, end):
        ends[device] = end
        yield self_test.Found("gram", device, None, None, None, None)

    about = {"extension": None, "cuda": "a GPU", "triton": "3.6"}
    monkeypatch.setattr(doctor, "environment", lambda: about)
    monkeypatch.setattr(doctor, "self_test", tests)
    monkeypatch.setattr(doctor, "OPS", {})
    monkeypatch.setattr(doctor.time, "monotonic", lambda: 0.0)
    return ends


def test_a_gpu_has_time_of_its_own_and_what_was_not_tested_is_said(begun, capsys):
    assert cli.main(["doctor"]) == 0
    assert begun == self_test.BUDGET and begun["cuda"] > begun["cpu"]
    printed = capsys.readouterr().out
    assert "gram on cuda" in printed and "not run: 60 s were over" in printed
    assert "Not everything was tested" in printed


def test_a_gpu_without_its_driver_is_seen(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "a driver for CUDA 13.0" in doctor.advice({"extension": {"cuda": True}, "cuda": None, "triton": "3.6"})
