"""The kernels of feasible against the reference: C++ through the op, Triton on a GPU or in the interpreter."""

import pytest
import torch
from cases import TRITON

from projgrad.ops import reference
from projgrad.ops.t_test import feasibility_thresholds

pytestmark = pytest.mark.same_without_extension

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (BF16, F32), (F16, F32), (BF16, BF16), (F32, F64)]
N = 6


def make(p, dtypes=(F32, F32), device="cpu"):
    """d, u, Σg and Σg²; some coordinates without a change, and some without a retain gradient."""
    d, u = torch.randn(p), torch.randn(p)
    g = torch.randn(N, p) - 0.7 * d.sign() + torch.randn(p) * (torch.arange(p) % 4 == 1)
    d[::7], g[:, 3::11] = 0, 0
    change, moments = dtypes
    return [x.to(device, change) for x in (d, u)] + [x.to(device, moments) for x in (g.sum(0), g.square().sum(0))]


def triton(*args):
    from projgrad.kernels.feasible import feasible

    return feasible(*args)


def compiled(*args):
    return torch.ops.projgrad.feasible_pass(*args)


kernels = pytest.mark.parametrize(
    "kernel", [compiled, pytest.param(triton, marks=pytest.mark.skipif(not TRITON, reason="no triton for this system"))]
)


def check(kernel, tensors, level=0.3):
    """The same coordinates, to the last bit; the sums are of float64, in another order."""
    args = (*tensors, N, *feasibility_thresholds(N, level, tensors[2].dtype))
    (out, sums), (expected, exact) = kernel(*args), reference.feasible(*args)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert torch.equal(out, expected)
    assert torch.equal(sums[:2], exact[:2])
    d, u, total, _ = (x.double() for x in tensors)
    terms = torch.stack([d @ d, d @ d, (d * u).abs().sum(), (d * total).abs().sum()])
    assert ((sums[2:] - exact[2:]).abs() <= 2 * len(d) * torch.finfo(F64).eps * terms).all()
    return out, sums


@kernels
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_masked_pass_has_the_values_of_the_reference(kernel, dtypes, device):
    for level in (0.05, 0.5, 0.7, 1.0):
        _, sums = check(kernel, make(1500, dtypes, device), level)
        assert 0 < sums[1] < sums[0] < 1500  # the mask takes away some and leaves some


@kernels
@pytest.mark.parametrize("p", [0, 1, 15, 16, 17, 4096, 9001])
def test_a_masked_pass_may_end_anywhere(kernel, p, device):
    """Vectors, chunks, programs and segments that end anywhere."""
    out, _ = check(kernel, make(p, device=device))
    assert not p or out.isfinite().all()


@kernels
def test_a_masked_pass_takes_any_strides(kernel, device):
    check(kernel, [x[::2] for x in make(3000, (BF16, F32), device)])
    check(kernel, [torch.stack([x, x], 1)[:, 1] for x in make(300, device=device)])


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_stay_with_their_coordinate(kernel, bad, device):
    tensors, args = make(600, device=device), (N, *feasibility_thresholds(N, 0.3, F32))
    expected, _ = kernel(*tensors, *args)
    for where, x in enumerate(tensors, 5):
        x[where], expected[where] = bad, float("nan")
    out, sums = kernel(*tensors, *args)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert sums[3].isnan()


@kernels
def test_a_masked_pass_repeats_its_bits(kernel, device):
    args = (*make(9001, device=device), N, *feasibility_thresholds(N, 0.3, F32))
    for first, second in zip(kernel(*args), kernel(*args), strict=True):
        assert torch.equal(first, second)
