"""feasible: the test of a coordinate against the formula written out, its level by simulation, and what it refuses."""

import itertools
import math
from importlib.util import find_spec

import pytest
import torch
from torch.library import opcheck

import projgrad
from projgrad.methods.masks import Aggregate, Coordinate
from projgrad.ops.t_test import quantile

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DRAWS, DELTA = 2000, 0.05
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
# P(T > t) = 0.05 for t as any table has it, by degrees of freedom
TABLE = {1: 6.3138, 2: 2.9200, 3: 2.3534, 7: 1.8946, 10: 1.8125, 63: 1.6694, 120: 1.6577, 10**6: 1.6449}


def written_out(d, u, g, delta=DELTA):
    """What the docstring says, in float64; g [n, *shape]."""
    d, u, g = d.double(), u.double(), g.double()
    n = len(g)
    upper = d * g.mean(0) + quantile(delta, n - 1) * d.abs() * g.std(0) / math.sqrt(n)
    return torch.where((d * u <= 0) & (upper <= 0), d, 0)


def sums(g, dtype=None):
    return [x.to(dtype or g.dtype) for x in (g.sum(0), g.square().sum(0))]


def example(n=8, shape=(40, 25), dtype=F64, device="cpu"):
    d, u, g = torch.randn(shape), torch.randn(shape), torch.randn(n, *shape)
    return [x.to(device, dtype) for x in (d, u, g - 0.3 * d.sign())]


@pytest.mark.parametrize("nu", TABLE)
def test_quantile_of_the_table(nu):
    assert quantile(0.05, nu) == pytest.approx(TABLE[nu], abs=5.1e-5)
    assert quantile(0.95, nu) == pytest.approx(-TABLE[nu], abs=5.1e-5) and abs(quantile(0.5, nu)) < 1e-300


@pytest.mark.skipif(find_spec("scipy") is None, reason="scipy is not installed")
@pytest.mark.parametrize("nu", [1, 2, 3, 4, 7, 8, 31, 100, 999, 1000, 10**5])
def test_the_quantile_of_t_equals_that_of_scipy(nu):
    from scipy.stats import t

    for level in (0.5, 0.3, 0.05, 0.01, 1e-4, 1e-6):
        # the finite sum is near 1: an error of eps there is eps / level of the tail, and no more of t with nu = 1
        assert quantile(level, nu) == pytest.approx(t.isf(level, nu), rel=8 * 2.3e-16 / level + 1e-12, abs=1e-15)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [2, 3, 8, 64])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.5])
def test_feasible_equals_the_test_written_out(delta, n, dtype, device):
    d, u, g = example(n, dtype=dtype, device=device)
    found, expected = projgrad.feasible(d, u, *sums(g), n, delta=delta), written_out(d, u, g, delta)
    assert found.dtype == dtype and found.shape == d.shape
    assert ((found == 0) | (found == d)).all() and ((found == 0) | (found == expected)).all()
    differ = (found != expected).double().mean()  # the margin is 1e-6 of s: one coordinate in a million sits there
    assert differ <= 1e-3 and (n < 8 or (0 < (found != 0).sum() <= (d * u < 0).sum()))


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F32), (BF16, BF16)], ids=str)
def test_feasible_in_half_types_errs_near_the_border_only(dtypes, device):
    """Sums in float32 lose nothing, sums rounded to half types only coordinates near the border."""
    d, u, g = example(device=device)
    d, u, expected = d.to(dtypes[0]), u.to(dtypes[0]), written_out(d, u, g)
    found = projgrad.feasible(d, u, *sums(g, dtypes[1]), 8)
    assert found.dtype == dtypes[0] and ((found == 0) | (expected != 0)).all()
    assert (found != 0).sum() >= (0.999 if dtypes[1] == F32 else 0.5) * (expected != 0).sum()


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("n", [2, 8, 300])
@pytest.mark.parametrize("spread", [1e-9, 1e-6, 1e-4, 1e-2, 1.0])
def test_rounding_never_makes_it_careless(spread, n, dtype):
    """A mean large beside the spread, squares that leave the range, sums one by one: what is kept was to be kept."""
    float64 = F64 if dtype == F64 else F32
    scale = 10.0 ** torch.randint(-30, 20, (4000,))
    center = quantile(DELTA, n - 1) * spread / math.sqrt(n) * (1 + 0.02 * torch.randn(4000))
    g = (center + spread * torch.randn(n, 4000) + (spread < 1) * torch.randn(4000).sign()).to(F64) * scale
    g = g.to(float64)
    total, squares = torch.zeros(2, 4000, dtype=float64)
    for row in g:
        total, squares = total + row, squares + row * row
    d = torch.randn(4000).to(dtype)
    found = projgrad.feasible(d, -d, total.to(dtype), squares.to(dtype), n)
    finite = squares.to(dtype).isfinite()
    expected = written_out(d, -d, g.double() / scale)
    assert finite.any() and found[~finite].isnan().all()
    assert ((found == 0) | (expected != 0))[finite].all()


def test_cancellation_in_plain_float32_is_careless():
    """Why there is a floor: float32 says s = 0 where it is a thousandth of the mean."""
    g = 1 + 1e-4 * torch.randn(64, 4000)
    assert ((g.square().sum(0) - g.sum(0).square() / 64) <= 0).any()
    d = -torch.ones(4000)
    assert (projgrad.feasible(d, -d, *sums(g), 64) == d).all()  # and it costs nothing where the mean is clear


def test_coordinates_without_a_gradient():
    """Rows of an embedding that no retain sample uses, and coordinates that do not move."""
    d, u = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([-1.0, 1.0, -1.0, 0.0])
    zero = torch.zeros(4)
    assert projgrad.feasible(d, u, zero, zero, 5).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert projgrad.feasible(d, u, zero, zero + 1e-30, 5).tolist() == [0.0] * 4


def test_feasible_follows_sign_scale_and_order():
    d, u, g = example()
    out = projgrad.feasible(d, u, *sums(g), 8)
    torch.testing.assert_close(projgrad.feasible(-d, -u, *sums(-g), 8), -out, rtol=0, atol=0)
    torch.testing.assert_close(projgrad.feasible(3 * d, u / 8, *sums(g), 8), 3 * out, rtol=0, atol=0)
    order = torch.randperm(40)
    torch.testing.assert_close(projgrad.feasible(d[order], u[order], *sums(g[:, order]), 8), out[order], rtol=0, atol=0)
    turned = projgrad.feasible(d.mT, u.mT, *(x.mT for x in sums(g)), 8)
    torch.testing.assert_close(turned, out.mT, rtol=0, atol=0)
    kept = [projgrad.feasible(d, u, *sums(g), 8, delta=delta) != 0 for delta in (0.01, 0.05, 0.2, 0.5)]
    assert all((a <= b).all() and a.sum() < b.sum() for a, b in itertools.pairwise(kept))


@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (BF16, F32)], ids=str)
def test_feasible_passes_opcheck(dtypes, device):
    d, u, g = example(4, (30,), device=device)
    tensors = [x.to(t) for x, t in zip((d, u, *sums(g)), (*[dtypes[0]] * 2, *[dtypes[1]] * 2), strict=True)]
    opcheck(torch.ops.projgrad.feasible.default, (tensors[0].requires_grad_(), *tensors[1:], 4, 0.3))


def test_gradient_is_that_of_the_kept_part():
    d, u, g = example()
    out = projgrad.feasible(d.requires_grad_(), u.requires_grad_(), *sums(g), 8)
    out.square().sum().backward()
    assert torch.equal(d.grad, 2 * out.detach()) and u.grad is None


def test_vmap_of_feasible_equals_the_stack_of_its_calls():
    d, u, g = example(6, (3, 20))
    call = lambda *tensors: projgrad.feasible(*tensors, 6)  # noqa: E731
    expected = projgrad.feasible(d, u, *sums(g), 6)
    torch.testing.assert_close(torch.vmap(call)(d, u, *sums(g)), expected)
    shared = torch.vmap(call, in_dims=(0, None, None, None))(d, u[0], *(x[0] for x in sums(g)))
    torch.testing.assert_close(shared[0], expected[0])


def test_feasible_takes_tensors_without_elements(device):
    empty = torch.zeros(0, 3, device=device)
    assert projgrad.feasible(empty, empty, empty, empty, 2).shape == (0, 3)


D = torch.ones(3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: projgrad.feasible(D, D[:2], D, D, 4), ValueError, r"u must .* got \(2,\) and d \(3,\)"),
        (lambda: projgrad.feasible(D, D, D, D[None], 4), ValueError, r"squares must .* got \(1, 3\)"),
        (lambda: projgrad.feasible(D.int(), D, D, D, 4), TypeError, r"d must be float32.* got torch.int32"),
        (lambda: projgrad.feasible(D, D.double(), D, D, 4), TypeError, r"u must have the dtype of d.* u torch.float64"),
        (lambda: projgrad.feasible(D, D, D, D.bfloat16(), 4), TypeError, r"that of total; .* squares torch.bfloat16"),
        (lambda: projgrad.feasible(D, D, D, D.half(), 4), TypeError, "squares must not be float16"),
        (lambda: projgrad.feasible(D, D, D.to("meta"), D, 4), ValueError, "total must be on the device of d; got meta"),
        (lambda: projgrad.feasible(D, D, D, D, 1), ValueError, "n ≥ 2 retain samples; got 1"),
        (lambda: projgrad.feasible(D, D, D, D, 10**8), ValueError, "100000000 samples are too many"),
        (lambda: projgrad.feasible(D, D, D, D, 4, delta=0.0), ValueError, r"delta .* in \(0, 0.5\]; got 0.0"),
        (lambda: projgrad.feasible(D, D, D, D, 4, delta=0.7), ValueError, r"delta .* got 0.7"),
        (lambda: projgrad.feasible(D, D, D, D, 4, delta=float("nan")), ValueError, "delta .* got nan"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_forward_mode_is_refused_not_zero():
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):
        torch.func.jvp(lambda d: projgrad.feasible(d, D, D, D, 4), (D,), (D,))


# Levels: 2,000 draws each. With d = 1 a coordinate is violated where the true mean is positive, and 0 is the border.


def kept(g):
    """The share of the coordinates of g [n, draws] that are kept for d = ±1."""
    d = torch.randn(g.shape[1]).sign().to(g.dtype)
    return (projgrad.feasible(d, -d, *sums(g * d), len(g)) != 0).double().mean()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [4, 8, 64])
def test_level_of_a_coordinate(n, dtype):
    noise = torch.randn(n, DRAWS).to(dtype)
    assert 2 * DELTA - ALLOWED <= kept(noise) <= ALLOWED  # at the border: as often as promised, and no less
    assert kept(noise + 0.1) <= ALLOWED and kept(noise + 1) <= 0.01
    assert kept(torch.distributions.StudentT(3.0).sample((n, DRAWS)).to(dtype)) <= ALLOWED


@pytest.mark.parametrize("n, share", [(8, 0.14), (64, 0.08)])
def test_harm_in_few_samples_breaks_the_level(n, share):
    """What the docstring says of exponential gradients."""
    found = kept(torch.empty(n, DRAWS).exponential_() - 1)
    assert found == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / DRAWS) + 0.005)


def test_power_of_a_coordinate_grows():
    shares = [kept(torch.randn(n, DRAWS) - 0.5) for n in (4, 8, 16, 64)]
    assert all(a + 0.05 < b for a, b in itertools.pairwise(shares)) and shares[-1] > 0.9


class Explicit:
    """A tape with all of G [n, p]."""

    def __init__(self, G):
        self.G = G

    def moments(self, losses, weights):
        G = self.G * weights[:, None]
        return {"p": G.sum(0)}, {"p": G.square().sum(0)}

    def dot(self, losses, direction):
        return (self.G @ direction["p"]).double()


def accepted(kind, n, mean, draws, p=40):
    """The share of draws in which something moves, and the mean share of coordinates; d = 1 everywhere."""
    d, moved = torch.ones(p), []
    for _ in range(draws):
        G = torch.randn(n, p) + mean
        _, sums = kind(Explicit(G), G[:, 0], {"p": -d}, DELTA).choose({"p": d})
        moved.append(sums[1] / p)
    moved = torch.tensor(moved)
    return float((moved > 0).double().mean()), float(moved.mean())


@pytest.mark.parametrize("n", [4, 8, 64])
def test_level_of_the_aggregate(n):
    """No coordinate helps: every step that moves anything is a violation."""
    assert accepted(Aggregate, n, 0.0, DRAWS)[0] <= ALLOWED
    if n == 8:
        assert accepted(Aggregate, n, 0.05, DRAWS)[0] <= ALLOWED
        assert accepted(Coordinate, n, 0.05, 100)[0] > 0.5  # the promise of the other test is about coordinates


def test_power_of_the_aggregate_grows():
    shares = [accepted(Aggregate, n, -0.15, 200)[1] for n in (8, 16, 64)]
    assert shares[0] + 0.1 < shares[1] and shares[1] + 0.1 < shares[2] and shares[2] > 0.9
    assert shares[2] > accepted(Coordinate, 64, -0.15, 200)[1] + 0.4  # many small effects, one large sum
