"""What several files of this folder start from."""

import pytest

from projgrad.tape import union


@pytest.fixture(params=["in_full", "iterated", "recomputed"])
def path(request, monkeypatch):
    """Small tensors are projected in full; without that by iteration, with Gram matrices that are kept or not."""
    if request.param != "in_full":
        monkeypatch.setattr(union, "SMALL", 0)
    if request.param == "recomputed":
        monkeypatch.setattr(union, "HELD", 0)
