"""The kernel of linear_moments against the reference, on a GPU or in the interpreter."""

import pytest
import torch
from cases import FACTORS, TRITON, make_factors

from projgrad.ops import reference

if not TRITON:
    pytest.skip("triton has no build for this system", allow_module_level=True)

from projgrad.kernels import linear_moments, weight_tiles

pytestmark = pytest.mark.same_without_extension

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F16, BF16)]
INPUTS = [(name, pair) for name in ("random", "long") for pair in DTYPES]
INPUTS += [(name, (F32, F32)) for name in FACTORS if name not in ("random", "long")]
INPUTS += [
    (name, (BF16, BF16)) for name in ("one_position", "padded", "every_other", "positions_first", "no_positions")
]


def layer(name, dtypes, device):
    a, b = make_factors(name, dtypes, device)
    return (a, b) if a.ndim == 3 else (a[:, None], b[:, None])


def samples(n, t, i, o, dtype, device="cpu"):
    return torch.randn(n, t, i, device=device).to(dtype), torch.randn(n, t, o, device=device).to(dtype)


def per_sample(a, b):
    return b.mT @ a


def check(out, expected, scale, plain, dtype=F32):
    """At most twice the error of plain PyTorch in float32, and 4 eps: relative to the absolute terms of an entry."""
    assert out.shape == expected.shape

    def worst(x):
        error = (x.double() - expected).abs() / scale.clamp_min(1e-300)
        return error.max() if error.numel() else 0.0

    assert worst(out) <= 2 * worst(plain) + 4 * torch.finfo(dtype).eps


def check_moments(sums, a, b):
    scales = reference.linear_moments(a.abs().double(), b.abs().double())
    rows = per_sample(a.float(), b.float())
    expected, plain = reference.linear_moments(a.double(), b.double()), (rows.sum(0), rows.square().sum(0))
    for out, truth, scale, simple in zip(sums, expected, scales, plain, strict=True):
        assert out.dtype == F32
        check(out, truth, scale, simple)


@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_the_moments_kernel_equals_the_loop_over_positions(name, dtypes, device):
    a, b = layer(name, dtypes, device)
    check_moments(linear_moments.linear_moments(a, b), a, b)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("n, t", [(1, 1), (1, 140), (30, 2), (7, 20)])
def test_sums_split_anywhere_are_exact_and_repeat_their_bits(n, t, dtype, device, monkeypatch):
    """Two tiles, splits that end inside a sample and inside a run, and the same bits again."""
    monkeypatch.setattr(weight_tiles, "PROGRAMS", 6)
    monkeypatch.setattr(linear_moments, "RUN", 5)
    a, b = samples(n, t, 10, 70, dtype, device)
    sums = linear_moments.linear_moments(a, b)
    assert all(map(torch.equal, sums, linear_moments.linear_moments(a, b)))
    check_moments(sums, a, b)


def test_moments_are_exact_in_large_tiles(device):
    a, b = samples(3, 18, 70, 133, BF16, device)
    check_moments(linear_moments.linear_moments(a, b), a, b)


def test_factors_that_repeat_a_position(device):
    """Strides of zero."""
    a, b = samples(3, 1, 20, 9, F32, device)
    a, b = a.expand(3, 4, 20), b.expand(3, 4, 9)
    check_moments(linear_moments.linear_moments(a, b), a, b)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_follows_the_precision_of_torch(precision, device):
    """As little as TF32 keeps, 10 bits of each factor, where the user allows it."""
    a, b = samples(4, 3, 20, 30, F32, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        total, _ = linear_moments.linear_moments(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    scale, _ = reference.linear_moments(a.abs().double(), b.abs().double())
    error = (total - reference.linear_moments(a.double(), b.double())[0]).abs()
    assert (error <= 2**-9 * scale).all()
