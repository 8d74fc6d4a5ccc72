"""A plan runs nothing twice: a run of a deep model takes seconds."""

from collections import Counter
from types import SimpleNamespace

import pytest

from projgrad.experiments.plan import plan, steps

pytestmark = pytest.mark.same_without_extension


def test_the_search_for_the_largest_n_goes_on_from_what_was_run(monkeypatch):
    ran = Counter()

    def run(runs, subject, ways, n, *_):
        ran.update((way, n) for way in ways)
        runs |= {(way, n): steps.Run(1000 + 90 * n, 1000 + 100 * n, 0, 4) for way in ways}

    monkeypatch.setattr(plan, "subject_of", lambda *_: SimpleNamespace(title="a net"))
    monkeypatch.setattr(steps, "_run", run)
    found = plan.make_plan("a net", 8, memory=1e-4)  # 100,000 bytes
    assert set(ran.values()) == {1} and {way for way, _ in ran} == {*plan.WAYS} - {"per_tensor"}
    assert found["plain"]["largest_n"] == 990
    ours, tensors = found["global"], found["per_tensor"]
    assert tensors["peak_bytes"] == ours["peak_bytes"] + 3 * 8 * 8**2  # 4 matrices of 8 x 8 in the place of one
    assert 0 < tensors["largest_n"] < ours["largest_n"] < 990
