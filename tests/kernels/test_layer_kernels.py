"""The Triton kernels behind linear_gram and linear_dot, interpreted where there is no GPU, and who calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FACTORS, FLOAT_ONLY, TRITON
from factors import check, check_gram, layer, truth
from torch.utils._python_dispatch import TorchDispatchMode

from projgrad.ops import reference
from projgrad.ops.registration import FALLBACKS, FUNCTIONS

if not TRITON:
    pytest.skip("triton has no build for this system", allow_module_level=True)

from projgrad.kernels import linear_choices
from projgrad.kernels.linear_dot import linear_dot
from projgrad.kernels.linear_gram import linear_gram, tile
from projgrad.kernels.register import KERNELS

pytestmark = pytest.mark.same_without_extension

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)]
INPUTS = [(name, pair) for name in FACTORS for pair in DTYPES if pair == (F32, F32) or name not in FLOAT_ONLY]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check_dot(v, a, b, u):
    g, w = truth(a, b).flatten(1), u.double().flatten(1)
    lengths = (a.double().norm(dim=2) * b.double().norm(dim=2)).sum(1).clamp_min(1e-300)
    sizes = w.norm(dim=1).clamp_min(1e-300)
    unit = (b.double() / lengths[:, None, None]).float().mT @ a.float()  # float32 cannot hold products of 1e-20
    plain = unit.flatten(1) @ (w / sizes[:, None]).float().mT
    scale = lengths[:, None] * sizes
    check(v, g @ w.mT, scale, plain.double() * scale, F32)


@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_the_gram_kernel_equals_the_loop_over_positions(name, dtypes):
    a, b = layer(name, dtypes, DEVICE)
    K = linear_gram(a, b)
    assert K.dtype == F64 and torch.equal(K, K.mT)
    check_gram(K, a, b, F32)


@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_the_dot_kernel_equals_the_loop_over_positions(name, dtypes):
    a, b = layer(name, dtypes, DEVICE)
    u = torch.randn(2, b.shape[2], a.shape[2], device=DEVICE).to(b.dtype)
    check_dot(linear_dot(a, b, u), a, b, u)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_dot_with_a_tiny_and_a_huge_direction(size):
    a, b = layer("tiny", device=DEVICE)
    u = size * torch.randn(1, 30, 20, device=DEVICE)
    check_dot(linear_dot(a, b, u), a, b, u)


@pytest.mark.parametrize("t", [2, 3, 63, 64, 65, 100])
def test_samples_and_tiles_do_not_coincide(t):
    """Segments begin at multiples of t and of the tile: programs with several samples, samples with several tiles."""
    n = max(2, 200 // t)
    a, b = torch.randn(n, t, 7, device=DEVICE), torch.randn(n, t, 5, device=DEVICE)
    check_gram(linear_gram(a, b), a, b, F32)
    a2, b2 = torch.randn(3, 71, 7, device=DEVICE), torch.randn(3, 71, 5, device=DEVICE)
    K = linear_gram(a, b, a2, b2)
    lengths, lengths2 = ((x.norm(dim=2) * y.norm(dim=2)).sum(1).double() for x, y in ((a, b), (a2, b2)))
    bound = 4 * torch.finfo(F32).eps * lengths[:, None] * lengths2
    expected = reference.linear_gram(a, b, a2, b2)
    assert ((K - expected).abs() <= bound).all()
    assert ((linear_gram(a2, b2, a, b).mT - expected).abs() <= bound).all()


@pytest.mark.slow
def test_the_gram_kernel_is_exact_in_large_tiles():
    n, t = 17, 125
    assert tile(n, t, 2)[0] > tile(1, 1, 2)[0]
    a, b = torch.randn(n, t, 9, device=DEVICE).to(BF16), torch.randn(n, t, 70, device=DEVICE).to(BF16)
    K = linear_gram(a, b)
    assert torch.equal(K, K.mT)
    g = (b.double().mT @ a.double()).flatten(1)
    lengths = (a.double().norm(dim=2) * b.double().norm(dim=2)).sum(1)
    assert ((K - g @ g.mT).abs() <= 4 * torch.finfo(F32).eps * lengths[:, None] * lengths).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_with_their_sample(bad):
    a, b = layer("many_samples", device=DEVICE)
    clean, v = linear_gram(a, b), linear_dot(a, b, torch.ones(1, 23, 19, device=DEVICE))
    b[3, 1, 4] = bad
    K, w = linear_gram(a, b), linear_dot(a, b, torch.ones(1, 23, 19, device=DEVICE))
    others = torch.arange(len(K), device=DEVICE) != 3
    assert not K[3].isfinite().any() and not K[:, 3].isfinite().any() and not w[3].isfinite().any()
    torch.testing.assert_close(K[others][:, others], clean[others][:, others], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(w[others], v[others], rtol=1e-6, atol=1e-6)


def test_scaled_and_plain_products_agree_to_the_last_bit():
    """Whether a sample elsewhere needs scaling changes nothing for the others: scales are powers of two."""
    a, b = layer("random", device=DEVICE)
    far = b.clone()
    far[0] *= 1e-25
    torch.testing.assert_close(linear_gram(a, far)[1:, 1:], linear_gram(a, b)[1:, 1:], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtypes", [*DTYPES, (F64, F64)], ids=str)
@pytest.mark.parametrize("name", ["random", "one_position", "wide_output"])
def test_choices_on_cuda_agree_with_library_products(name, dtypes):
    a, b = layer(name, dtypes, DEVICE)
    n, (o, i) = len(a), (b.shape[2], a.shape[2])
    c = torch.randn(n, dtype=F64, device=DEVICE)
    u = torch.randn(1, o, i, device=DEVICE).to(b.dtype)
    before = torch.randn(o, i, device=DEVICE)

    def combined(function):
        out = before.clone()
        function(out, a, b, c)
        return out

    for name, call in {
        "token_gram": lambda f: f(a, b, False, n),
        "token_gram_across": lambda f: f(a, b, a[:2], b[:2], n),
        "linear_dot_pass": lambda f: f(a, b, u, False),
        "linear_combine_pass_": combined,
        "linear_moments_pass": lambda f: f(a, b),
    }.items():
        found, expected = call(getattr(linear_choices, name)), call(FALLBACKS[name])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_chunks_of_half_factors_are_multiplied_as_they_are():
    """A product that only CUDA has: 16-bit factors go in as they are, float32 comes out."""
    called = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is not torch.ops.aten.bmm.dtype_out:
                return func(*args, **(kwargs or {}))
            called.append([args[0].dtype, args[1].dtype, args[2], kwargs["out"].dtype])
            return kwargs["out"]

    g, b, a = torch.empty(4, 6, 5), torch.empty(4, 3, 6, dtype=BF16), torch.empty(4, 3, 5, dtype=BF16)
    with Recorded():
        linear_choices.sample_products_(g, b, a)
    assert called == [[BF16, BF16, F32, F32]]


def test_every_device_op_is_in_the_table_of_kernels():
    on_cuda = {op.name() for op, device, *_ in KERNELS if device == "cuda" and op not in FUNCTIONS}
    assert on_cuda == {f"projgrad::{name}" for name in FALLBACKS}


def test_files_in_the_table_of_kernels_exist():
    root = Path(__file__).parents[2]
    assert all(callable(kernel) or (root / kernel).exists() for _, _, kernel, _ in KERNELS)


@pytest.mark.slow
def test_every_kernel_through_its_op():
    """Outputs that share memory, types of weights, settings of torch: what calls of a launcher do not meet."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "dispatch.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
