"""gram_solve on regular, singular and badly scaled systems: the op, the reference, the CUDA code in an emulator."""

import functools

import emulator
import pytest
import torch
from cases import implementations
from pretend import Gpu, Pretend, values

import projgrad
from projgrad.ops import reference

IMPLEMENTATIONS = {"op": torch.ops.projgrad.gram_solve, "reference": reference.gram_solve}
if emulator.AVAILABLE:  # g++ on Linux
    IMPLEMENTATIONS["cuda, emulated"] = emulator.gram_solve
    IMPLEMENTATIONS["cuda for large n, emulated"] = functools.partial(emulator.gram_solve, threads=64)
SIZES = [(3, 8, 2), (1, 1, 1), (5, 2, 3), (2, 31, 1), (2, 32, 3), (2, 33, 1), (1, 64, 1), (1, 70, 3), (1, 96, 11)]
SIZES += [(2, 128, 1), (1, 130, 2), (0, 4, 1), (2, 0, 1), (2, 3, 0), (1, 40, 0)]
BOUND = {torch.float32: 1e-4, torch.float64: 1e-11}


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("l, n, m", SIZES)
def test_regular_systems_are_solved(l, n, m, dtype, implementation, device):
    A = torch.randn(l, n, 2 * n + 4, dtype=torch.float64, device=device)
    K, x = (A @ A.mT).to(dtype), torch.randn(l, n, m, dtype=dtype, device=device)
    found, rank, pivot = IMPLEMENTATIONS[implementation](K, K @ x, 0.0, None)
    assert found.shape == x.shape and found.dtype == dtype and rank.tolist() == [n] * l
    assert pivot.shape == (l,) and pivot.dtype == torch.float64
    torch.testing.assert_close(pivot, reference.gram_solve(K, x, 0.0, None)[2], rtol=1e-10, atol=0)
    torch.testing.assert_close(found, x, rtol=BOUND[dtype], atol=BOUND[dtype])


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize(
    "n, rank", [(12, 0), (12, 1), (12, 5), (12, 11), (32, 20), (50, 40), (100, 33), (131, 40), (150, 64), (150, 77)]
)
def test_singular_systems_are_solved_with_as_many_rows_as_their_rank(n, rank, implementation, device):
    """K x = b for every b in the range of K, with as many nonzero x as the rank."""
    A = torch.randn(4, n, rank, dtype=torch.float64, device=device)
    K = A @ A.mT
    b = K @ torch.randn(4, n, 1, dtype=torch.float64, device=device)
    x, ranks, _ = IMPLEMENTATIONS[implementation](K, b, 0.0, 1e-10)
    assert ranks.tolist() == [rank] * 4
    assert ((x != 0).sum(1) == rank).all()
    torch.testing.assert_close(K @ x, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("n", [5, 20, 40])
def test_the_first_of_equal_rows_is_the_one_that_counts(n, implementation, device):
    """Rows g, 0, g, 0, ... of one length: all pivots are equal, and zero rows are none."""
    g = (torch.arange(n, device=device) % 2 == 0).double()
    K, b = torch.outer(g, g)[None], torch.stack([g, -3 * g], 1)[None]
    x, rank, pivot = IMPLEMENTATIONS[implementation](K, b, 0.0, None)
    assert x[0, 0].tolist() == [1, -3] and not x[0, 1:].any()
    assert rank.tolist() == [1] and pivot.tolist() == [1]


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
def test_the_smallest_pivot_is_the_squared_sine_between_rows(implementation, device):
    """The squared sine between two rows, plus the damping; 1 + damping where there is no row to use."""
    sine = torch.tensor([1.0, 0.5, 1e-3, 0.0], dtype=torch.float64, device=device)
    cosine = (1 - sine**2).sqrt()
    K = torch.eye(2, dtype=torch.float64, device=device).repeat(5, 1, 1)
    K[:4, 0, 1] = K[:4, 1, 0] = cosine
    K[4] = 0
    K[:, 1] *= 7
    K[:, :, 1] *= 7
    b = torch.ones(5, 2, 1, dtype=torch.float64, device=device)
    for damping, last in ((0.0, [1, 1]), (0.5, [1.5 - 1 / 1.5, 1.5])):
        _, rank, pivot = IMPLEMENTATIONS[implementation](K, b, damping, 1e-9)
        expected = 1 + damping - cosine**2 / (1 + damping)
        expected = torch.cat([expected[:3], expected.new_tensor(last)])
        torch.testing.assert_close(pivot, expected, rtol=1e-9, atol=1e-15)
        assert rank.tolist() == [2, 2, 2, 2 if damping else 1, 0]


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
def test_row_scaling_changes_nothing(implementation, device):
    A = torch.randn(2, 9, 30, dtype=torch.float64, device=device)
    D = 10.0 ** torch.linspace(-100, 100, 9, dtype=torch.float64, device=device)
    K, b = A @ A.mT, torch.randn(2, 9, 1, dtype=torch.float64, device=device)
    x, *_ = IMPLEMENTATIONS[implementation](K, b, 0.01, None)
    scaled, rank, _ = IMPLEMENTATIONS[implementation](K * D * D[:, None], b * D[:, None], 0.01, None)
    assert rank.tolist() == [9, 9]
    torch.testing.assert_close(scaled * D[:, None], x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("n", [5, 33, 129])
def test_one_bad_system_does_not_harm_the_others(n, implementation, device):
    A = torch.randn(3, n, 2 * n, dtype=torch.float64, device=device)
    K, b = A @ A.mT, torch.randn(3, n, 2, dtype=torch.float64, device=device)
    bad = K.clone()
    bad[1, 2, 3] = float("nan")
    x, ranks, pivot = IMPLEMENTATIONS[implementation](bad, b, 0.0, None)
    clean, *_ = IMPLEMENTATIONS[implementation](K, b, 0.0, None)
    assert x[1].isnan().all() and ranks.tolist() == [n, 0, n] and pivot[1] == 1
    assert torch.equal(x[[0, 2]], clean[[0, 2]])
    b[0, 1, 1] = float("inf")
    x, *_ = IMPLEMENTATIONS[implementation](K, b, 0.0, None)
    assert torch.equal(x[0, :, 0], clean[0, :, 0]) and x[0, :, 1].isnan().all()


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
def test_damping_is_added_to_the_unit_diagonal(implementation, device):
    A = torch.randn(2, 6, 4, dtype=torch.float64, device=device)  # singular without it
    K, b = A @ A.mT, torch.randn(2, 6, 1, dtype=torch.float64, device=device)
    x, rank, _ = IMPLEMENTATIONS[implementation](K, b, 0.3, None)
    expected = torch.linalg.solve(K + 0.3 * torch.diag_embed(K.diagonal(dim1=1, dim2=2)), b)
    assert rank.tolist() == [6, 6]
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-12)


def test_gram_solve_takes_leading_dimensions(device):
    A = torch.randn(2, 3, 4, 9, device=device)
    K, b = A @ A.mT, torch.randn(2, 3, 4, device=device)
    torch.testing.assert_close(projgrad.gram_solve(K, b), torch.linalg.solve(K, b), rtol=1e-3, atol=1e-4)
    columns = torch.randn(2, 3, 4, 5, device=device).mT.contiguous().mT
    torch.testing.assert_close(projgrad.gram_solve(K.mT, columns), torch.linalg.solve(K, columns), rtol=1e-3, atol=1e-4)
    assert projgrad.gram_solve(K[0, 0], b[0, 0]).shape == (4,)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_without_nvcc_the_host_does_not_wait(dtype):
    """What CUDA runs then is the reference, of any size and rank."""
    A = torch.randn(3, 70, 90).to(dtype)
    A[0, 30] = A[0, 3]
    K, b = A @ A.mT, torch.randn(3, 70, 2, dtype=dtype)
    expected = reference.gram_solve(K, b, 0.1, None)
    with Gpu() as gpu:
        found = reference.gram_solve(Pretend(K), Pretend(b), 0.1, None)
    assert not gpu.waited and gpu.launched
    assert all(map(torch.equal, values(found), expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("l, n", [(3, 20), (1500, 5), (3, 64), (3, 100), (2, 300)])
def test_in_a_cuda_graph(l, n):
    """On whatever stream is current, and without waiting for the device."""
    A = torch.randn(2, l, n, 2 * n, device="cuda", dtype=torch.float64)
    K, b = (A @ A.mT).contiguous(), torch.randn(2, l, n, 2, device="cuda", dtype=torch.float64)
    inputs = K[0].clone(), b[0].clone()
    projgrad.gram_solve(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = projgrad.gram_solve(*inputs)
    inputs[0].copy_(K[1])
    inputs[1].copy_(b[1])
    graph.replay()
    torch.testing.assert_close(x, torch.linalg.solve(K[1], b[1]), rtol=1e-8, atol=1e-10)
