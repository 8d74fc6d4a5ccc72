"""project_out of 16-bit input as a GPU computes it: in float32 first, as long as the residual says that is enough."""

import pytest
import torch
from cases import TRITON
from numerics import check_projection

from projgrad.kernels import project_out as composed
from projgrad.ops import reference, refinement

HALVES = [torch.bfloat16, torch.float16]
needs_triton = pytest.mark.skipif(not TRITON, reason="triton has no build for this system")


@needs_triton
@pytest.mark.same_without_extension
def test_rows_of_a_half_type_far_from_one(device):
    G = torch.randn(4, 300, device=device) * torch.tensor([[1e-25], [1.0], [1e20], [1e-12]], device=device)
    G, u = G.bfloat16(), torch.randn(300, device=device).bfloat16()
    out = composed.on_device(u[None], G, 0.0, None)[0][0]
    check_projection("random", u, G, out, torch.bfloat16)


def _hard_halves(name):
    """u and G of a half type that float32 arithmetic alone would get wrong."""
    G, u = torch.randn(9, 400), torch.randn(3, 400)
    if name == "in the span":  # exact products and sums: nothing is left of u
        G, u = torch.randint(-3, 4, (9, 400)).float(), torch.zeros(3, 400)
        u[0], u[1], u[2] = G[0] - G[1] + 2 * G[2], 4 * G[3], G[4] + G[5]
    if name == "a little is left":  # one column off the span
        G = torch.randint(-3, 4, (9, 400)).float()
        u = torch.stack([G[0] - G[1], G[2] + G[3], G[4]]) * 64
        u[:, 7] += 0.5
    if name == "tiny and huge":
        G *= torch.tensor([1e-33, 1e33, 1.0, 1e-20, 1e15, 1e-30, 1e30, 0.0, 1.0])[:, None]
    if name in ("terms that cancel", "products too small"):  # c of nearly parallel rows is large
        G[1] = G[0] + torch.randn(400) * 2**-6
        u[0] = 8 * (G[0] - G[1])
    if name == "products too small":  # r would be 0 in float32
        G, u = G * 1e-30, u * 1e-15
    if name == "coefficients too large":
        G, u = G * 1e-32, u * 1e10
    return u.bfloat16(), G.bfloat16()


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(
    "name",
    [
        "random",
        "in the span",
        "a little is left",
        "tiny and huge",
        "terms that cancel",
        "products too small",
        "coefficients too large",
    ],
)
def test_float32_arithmetic_on_halves_is_seen_through(name, damping, device):
    """The residual is at most 4 eps (float32) by the float64 truth too, before the last rounding to 16 bits."""
    u, G = _hard_halves(name)
    u, G = u.to(device), G.to(device)
    out, c, rank, worst, squares = composed.on_device(u, G, damping, None)
    _, _, expected_rank, _, expected_squares = reference.project_out(u, G, damping, None)
    assert rank == expected_rank
    exact = u.double() - c.mT @ G.double()  # of the c found
    rounding = torch.finfo(torch.bfloat16).eps * squares[1].sqrt() + 1e-13 * squares[0].sqrt()
    assert ((out.double() - exact).norm(dim=1) <= rounding).all()
    torch.testing.assert_close(squares[0], expected_squares[0], rtol=1e-12, atol=0)
    if not damping:
        found = refinement.cosines(reference.gram(G, u)[0], G.double() @ exact.mT, squares, c).max()
        assert found <= 1e-6 and worst <= 4 * torch.finfo(torch.float32).eps and abs(worst - found) <= 2.5e-7


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize("n, m, p", [(1, 1, 1), (3, 2, 31), (64, 1, 33), (65, 3, 130), (520, 2, 70)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_subtract_in_float32(n, m, p, dtype, device):
    """out within (depth of the sum over n) eps of its terms, r within 4 x 2⁻²⁴ of the lengths of what is multiplied."""
    from projgrad.kernels.subtract import subtract_, views

    u, G = torch.randn(m, p, device=device).to(dtype), torch.randn(n, p, device=device).to(dtype)
    c = torch.randn(n, m, dtype=torch.float64, device=device)
    out, total = torch.empty_like(u), c.new_zeros((n + 2) * m)
    subtract_(out, total, u, G, c, narrow=True)
    r, squares = views(total, n, m)
    exact = u.double() - c.T @ G.double()
    terms = u.double().abs() + c.T.abs() @ G.double().abs()
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * terms).all()
    lengths = G.double().norm(dim=1)[:, None]
    error = 2**-22 * lengths * exact.norm(dim=1) + 1e-6 * lengths * terms.norm(dim=1)
    assert ((r - G.double() @ exact.T).abs() <= error).all()
    torch.testing.assert_close(squares[1], exact.square().sum(1), rtol=1e-5, atol=0)
