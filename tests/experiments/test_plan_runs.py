"""A plan runs nothing twice."""

from collections import Counter

import pytest
from torch import nn

from projgrad.experiments.plan import plan, steps
from projgrad.experiments.plan.subjects import Subject

pytestmark = pytest.mark.same_without_extension


def test_the_search_for_the_largest_n_goes_on_from_what_was_run(monkeypatch):
    import torch

    def losses(model, n):
        x = torch.zeros(n, 30)
        return lambda: model(x).sum(1)

    taken, take = Counter(), steps.Job.take

    def counted(job, way, first):
        taken[way, job.n, first] += 1
        return take(job, way, first)

    net = Subject("a net", lambda: nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 5)), losses)
    monkeypatch.setattr(plan, "subject_of", lambda *_: net)
    monkeypatch.setattr(steps.Job, "take", counted)
    found = plan.make_plan("a net", 8, memory=1e-4)
    assert set(taken.values()) == {1} and not any(way == "per_tensor" for way, _, _ in taken)
    assert 0 < found["per_tensor"]["largest_n"] < found["plain"]["largest_n"]
    assert found["per_tensor"]["peak_bytes"] == found["global"]["peak_bytes"] + 3 * 8 * 8**2  # 4 matrices for 1
