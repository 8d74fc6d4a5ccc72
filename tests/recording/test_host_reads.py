"""Norms and inner products that the host reads are right for tensors of any length."""

import pytest
import torch

from projgrad.recording.host_reads import inner, length


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_long_tensors_lose_no_digits(scale):
    """In one float32 sum of 2²⁴ elements torch loses 7e-4 on a CPU."""
    g = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    h, exact = g * scale, g.double()
    assert float(length(h)) == pytest.approx(float(exact.norm()) * scale, rel=2e-6)
    assert float(inner(h, g)) == pytest.approx(float(exact @ exact) * scale, rel=2e-6)


def test_infinities_and_empty_tensors():
    g = torch.ones(1 << 21)
    assert float(length(g[:0])) == 0.0
    g[7] = float("inf")
    assert float(length(g)) == float("inf")
    g[8] = float("nan")
    assert float(length(g)) != float(length(g))
