"""project_out against the float64 truth: the op, the reference and the Triton composition on the same cases."""

import pytest
import torch
from cases import CASES, FLOAT_ONLY, TRITON, implementations, make
from numerics import check_projection, cosines, truth

import projgrad
from projgrad.kernels import project_out as composed
from projgrad.ops import reference

FLOATS = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]


def _with(implementation):
    """Call an implementation like the public function."""

    def call(u, G, damping=0.0, rtol=None):
        return implementation(u if u.ndim == 2 else u[None], G, damping, rtol)[0].reshape(u.shape)

    return call


IMPLEMENTATIONS = {
    "op": projgrad.project_out,
    "reference": _with(reference.project_out),
    **({"triton": _with(composed.on_device)} if TRITON else {}),
}


PRECISIONS = ("highest", "high", "medium")
INPUTS = [(name, dtype) for name in CASES for dtype in FLOATS + HALVES if dtype in FLOATS or name not in FLOAT_ONLY]


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("name, dtype", INPUTS, ids=str)
def test_project_out_equals_the_svd_in_float64(name, dtype, implementation, device):
    u, G = make(name, dtype, device)
    if device == "cpu" and implementation == "triton":  # up to ten seconds each in the interpreter
        columns = 5000 if dtype == torch.float32 else 2000
        u, G = u[..., :columns], G[:, :columns]
    out = IMPLEMENTATIONS[implementation](u, G)
    assert out.shape == u.shape and out.dtype == dtype
    check_projection(name, u, G, out, dtype)


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
def test_nearly_parallel_rows_are_told_apart(angle, implementation, device):
    u, G = make("random", torch.float64, device)
    G[1] = G[0] + angle * G[1]
    u, G = u.float(), G.float()
    found, _ = cosines(IMPLEMENTATIONS[implementation](u, G), G)
    assert found.max() <= 1e-6


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("n", [6, 64])
@pytest.mark.parametrize("left", [1e-2, 1e-4, 1e-6])
def test_little_of_u_is_left(left, n, implementation, device):
    """What survives is orthogonal on its own scale, not on that of u."""
    G = torch.randn(n, 300, dtype=torch.float64, device=device)
    u = (torch.randn(n, dtype=torch.float64, device=device) @ G + left * torch.randn_like(G[0])).float()
    G = G.float()
    out = IMPLEMENTATIONS[implementation](u, G)
    assert cosines(out, G)[0].max() <= 1e-6
    torch.testing.assert_close(out.double(), truth(u, G), rtol=0, atol=1e-5 * float(out.norm()))


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("e", [1e-2, 1e-4, 1e-6])
def test_u_in_an_ill_conditioned_span(e, implementation, device):
    """More rows than parameters, all nearly parallel: nothing is left of u but rounding, amplified by 1 / e."""
    G = torch.randn(10, dtype=torch.float64, device=device) + e * torch.randn(
        30, 10, dtype=torch.float64, device=device
    )
    u = torch.randn(10, dtype=torch.float64, device=device)
    assert IMPLEMENTATIONS[implementation](u, G).norm() <= 1e-15 / e * 1e3 * u.norm()


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("n, p, e", [(20, 2000, 1e-6), (4, 3000, 1e-4)])
def test_rank_is_decided_in_float64(n, p, e, implementation, device):
    """Rows that float32 products cannot tell apart count in full; a float64 Gram matrix leaves an error of eps / e²."""
    G = (torch.randn(1, p, device=device) + e * torch.randn(n, p, device=device)).float()
    u = torch.randn(p, device=device)
    expected = truth(u, G)
    bound = max(1e-5, 4 * torch.finfo(torch.float64).eps / e**2)
    assert (IMPLEMENTATIONS[implementation](u, G) - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("m", [0, 2])
def test_the_rank_of_no_direction_is_decided_in_float64_too(m, device):
    G = torch.randn(4, 50, device=device)
    G[3] = G[0] + 3e-5 * torch.randn(50, device=device)
    u = torch.randn(m, 50, device=device)
    for rtol, rank in (None, 4), (1e-3, 3):
        assert projgrad.project_out(u, G, rtol=rtol, return_info=True)[1].rank == rank
        assert not TRITON or composed.on_device(u, G, 0.0, rtol)[2] == rank


def test_a_bad_direction_does_not_stop_the_others(device):
    G = torch.randn(6, 300, device=device)
    G[1] = G[0] + 1e-4 * G[1]
    u = torch.randn(2, 300, device=device)
    u[1, 3] = float("nan")
    out = projgrad.project_out(u, G)
    assert out[1].isnan().all() and cosines(out[0], G)[0].max() <= 1e-6


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["u", "G"])
def test_nan_and_inf_reach_the_result(where, bad, implementation, device):
    u, G = make("random", torch.float32, device)
    (u if where == "u" else G[2])[7] = bad
    assert IMPLEMENTATIONS[implementation](u, G).isnan().all()


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("scale", [1e-180, 1e180])
def test_rows_whose_squares_leave_float64_are_not_dropped_silently(scale, implementation, device):
    u, G = make("random", torch.float64, device)
    G[2] *= scale
    assert IMPLEMENTATIONS[implementation](u, G).isnan().all()


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
def test_damping_is_relative_to_the_unit_diagonal(implementation, device):
    u, G = make("tiny_and_huge", torch.float64, device)
    rows = G / G.norm(dim=1, keepdim=True)
    c = torch.linalg.solve(rows @ rows.mT + 0.1 * torch.eye(len(G), dtype=G.dtype, device=device), rows @ u)
    torch.testing.assert_close(IMPLEMENTATIONS[implementation](u, G, damping=0.1), u - c @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
def test_rtol_keeps_what_it_is_told_to_keep(implementation, device):
    u, G = make("random", torch.float64, device)
    G[1] = G[0] + 1e-3 * G[1]  # squared sine about 1e-6
    u, G = u.float(), G.float()
    loose = IMPLEMENTATIONS[implementation](u, G, rtol=1e-4)
    kept = G[[j for j in range(len(G)) if j != (0 if G[0].norm() < G[1].norm() else 1)]]
    others = [truth(u, kept), truth(u, G[[0, 2, 3, 4, 5]]), truth(u, G[1:])]
    assert min((loose - other).norm() / other.norm() for other in others) < 1e-5
    assert (loose - truth(u, G)).norm() > 1e-2 * 1e-3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_project_out_is_an_orthogonal_projection(dtype, device):
    u, G = make("random", dtype, device)
    v = torch.randn_like(u)
    out = projgrad.project_out(u, G)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    close = lambda a, b: torch.testing.assert_close(a, b, **tolerance)  # noqa: E731
    close(projgrad.project_out(out, G), out)  # idempotent
    close(projgrad.project_out(u, G.flip(0)), out)  # the order of samples does not matter
    scale = torch.tensor([1e-6, 1e3, -1.0, 7.0, 1e-3, 1e5], dtype=dtype, device=device)
    close(projgrad.project_out(u, scale[:, None] * G), out)  # nor their length
    close(projgrad.project_out(2 * u + v, G), 2 * out + projgrad.project_out(v, G))  # linear
    close((out * v).sum(), (u * projgrad.project_out(v, G)).sum())  # symmetric
    close(projgrad.project_out(torch.stack([u, v]), G)[0], out)


def test_same_input_same_bits(device):
    u, G = make("many_chunks", torch.float32, device)
    first = projgrad.project_out(u, G)
    assert all(torch.equal(projgrad.project_out(u, G), first) for _ in range(3))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(projgrad.project_out(u, G), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [1e-170, 1e-300, 1e170])
def test_no_numbers_are_given_of_a_direction_whose_square_leaves_float64(scale, device):
    """It is projected as any other; 1 would say that nothing was taken out of it."""
    u, G = make("random", torch.float64, device)
    directions = torch.stack([u, scale * u, 0 * u])
    out, info = projgrad.project_out(directions, G, return_info=True)
    torch.testing.assert_close(out[1] / scale, out[0], rtol=1e-12, atol=1e-12)
    assert info.preserved_norm.isnan().tolist() == [False, True, False] and info.residual.isnan()


def test_inputs_are_not_changed(device):
    u, G = make("tiny_and_huge", torch.float32, device)
    before = u.clone(), G.clone()
    projgrad.project_out(u, G)
    assert torch.equal(u, before[0]) and torch.equal(G, before[1])


def test_info_holds_rank_coefficients_and_what_is_left(device):
    u, G = make("duplicated", torch.float32, device)
    out, info = projgrad.project_out(u, G, return_info=True)
    assert info.rank == 4 and info.coefficients.shape == (6,)
    torch.testing.assert_close(u - (info.coefficients @ G.double()).float(), out)
    torch.testing.assert_close(info.preserved_norm, (out.norm() / u.norm()).double(), rtol=1e-6, atol=0)
    assert info.residual <= 1e-6
    _, info = projgrad.project_out(torch.stack([u, u]), G, return_info=True)
    assert info.coefficients.shape == (6, 2) and info.preserved_norm.shape == (2,)


needs_triton = pytest.mark.skipif(not TRITON, reason="triton has no build for this system")


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(
    "n, m, p", [(0, 1, 70), (1, 1, 1), (3, 2, 31), (64, 1, 33), (65, 3, 130), (200, 1, 65), (520, 2, 70)]
)
def test_subtract_of_any_shape(n, m, p, dtype, device):
    """The Triton kernel against the reference: both work in float64."""
    from projgrad.kernels.subtract import subtract

    u, G = torch.randn(m, p, device=device).to(dtype), torch.randn(n, 2 * p, device=device).to(dtype)[:, ::2]
    c = torch.randn(n, m, dtype=torch.float64, device=device)
    out, r, squares = subtract(u, G, c)
    expected, expected_r, expected_squares = reference.subtract(u, G, c)
    size = (1 + n) * torch.finfo(torch.float64).eps
    if dtype == torch.float64:  # a sum of n + 1 terms, each of which may be larger than what is left of them
        assert ((out - expected).abs() <= 2 * size * (u.abs() + c.mT.abs() @ G.abs())).all()
    else:
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(out, expected, rtol=rounding, atol=rounding * 1e-3)
    scale = G.double().norm(dim=1)[:, None] * expected_squares[1].sqrt() + (1 + n) * p
    assert ((r - expected_r).abs() <= 64 * size * scale).all()
    torch.testing.assert_close(squares, expected_squares, rtol=64 * size, atol=0)


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize(
    "precision, n, p",
    [("high", 129, 200), *((precision, *size) for precision in PRECISIONS for size in ((12, 200), (65, 150)))],
)
def test_every_precision_ends_at_rounding_level(precision, n, p, device):
    G, u = torch.randn(n, p, device=device), torch.randn(2, p, device=device)
    G[n // 2] = -2 * G[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        out, _, rank, worst, _ = composed.on_device(u, G, 0.0, None)
    finally:
        torch.set_float32_matmul_precision(before)
    assert rank == n - 1 and worst <= 1e-6 and cosines(out, G)[0].max() <= 1e-6
