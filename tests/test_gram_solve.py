"""gram_solve on regular, singular and badly scaled systems, for the op, the reference and the Triton kernel."""

import pytest
import torch
from cases import TRITON

import projgrad
from projgrad import reference


def _triton(K, b, damping, rtol):
    from projgrad.kernels.gram_solve import gram_solve

    return gram_solve(K, b, damping, rtol)


IMPLEMENTATIONS = {"op": torch.ops.projgrad.gram_solve, "reference": reference.gram_solve}
if TRITON:
    IMPLEMENTATIONS["triton"] = _triton
BOUND = {torch.float32: 1e-4, torch.float64: 1e-11}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("l, n, m", [(3, 8, 2), (1, 1, 1), (2, 33, 1), (1, 70, 3), (0, 4, 1), (2, 0, 1), (2, 3, 0)])
def test_regular(l, n, m, dtype, implementation, device):
    A = torch.randn(l, n, 2 * n + 4, dtype=torch.float64, device=device)
    K, x = (A @ A.mT).to(dtype), torch.randn(l, n, m, dtype=dtype, device=device)
    found, rank = IMPLEMENTATIONS[implementation](K, K @ x, 0.0, None)
    assert found.shape == x.shape and found.dtype == dtype and rank.tolist() == [n] * l
    torch.testing.assert_close(found, x, rtol=BOUND[dtype], atol=BOUND[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [0, 1, 5, 11])
def test_singular(rank, implementation, device):
    """K x = b for every b in the range of K, with as many nonzero x as the rank."""
    A = torch.randn(4, 12, rank, dtype=torch.float64, device=device)
    K = A @ A.mT
    b = K @ torch.randn(4, 12, 1, dtype=torch.float64, device=device)
    x, ranks = IMPLEMENTATIONS[implementation](K, b, 0.0, 1e-10)
    assert ranks.tolist() == [rank] * 4
    assert ((x != 0).sum(1) == rank).all()
    torch.testing.assert_close(K @ x, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_row_scaling_changes_nothing(implementation, device):
    A = torch.randn(2, 9, 30, dtype=torch.float64, device=device)
    D = 10.0 ** torch.linspace(-100, 100, 9, dtype=torch.float64, device=device)
    K, b = A @ A.mT, torch.randn(2, 9, 1, dtype=torch.float64, device=device)
    x, _ = IMPLEMENTATIONS[implementation](K, b, 0.01, None)
    scaled, rank = IMPLEMENTATIONS[implementation](K * D * D[:, None], b * D[:, None], 0.01, None)
    assert rank.tolist() == [9, 9]
    torch.testing.assert_close(scaled * D[:, None], x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_bad_system_does_not_harm_the_others(implementation, device):
    A = torch.randn(3, 5, 9, dtype=torch.float64, device=device)
    K, b = A @ A.mT, torch.randn(3, 5, 2, dtype=torch.float64, device=device)
    bad = K.clone()
    bad[1, 2, 3] = float("nan")
    x, ranks = IMPLEMENTATIONS[implementation](bad, b, 0.0, None)
    clean, _ = IMPLEMENTATIONS[implementation](K, b, 0.0, None)
    assert x[1].isnan().all() and ranks.tolist() == [5, 0, 5]
    assert torch.equal(x[[0, 2]], clean[[0, 2]])
    b[0, 1, 1] = float("inf")
    x, _ = IMPLEMENTATIONS[implementation](K, b, 0.0, None)
    assert torch.equal(x[0, :, 0], clean[0, :, 0]) and x[0, :, 1].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_damping_is_added_to_the_unit_diagonal(implementation, device):
    A = torch.randn(2, 6, 4, dtype=torch.float64, device=device)  # singular without it
    K, b = A @ A.mT, torch.randn(2, 6, 1, dtype=torch.float64, device=device)
    x, rank = IMPLEMENTATIONS[implementation](K, b, 0.3, None)
    expected = torch.linalg.solve(K + 0.3 * torch.diag_embed(K.diagonal(dim1=1, dim2=2)), b)
    assert rank.tolist() == [6, 6]
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-12)


def test_public_batches(device):
    A = torch.randn(2, 3, 4, 9, device=device)
    K, b = A @ A.mT, torch.randn(2, 3, 4, device=device)
    torch.testing.assert_close(projgrad.gram_solve(K, b), torch.linalg.solve(K, b), rtol=1e-3, atol=1e-4)
    columns = torch.randn(2, 3, 4, 5, device=device).mT.contiguous().mT
    torch.testing.assert_close(projgrad.gram_solve(K.mT, columns), torch.linalg.solve(K, columns), rtol=1e-3, atol=1e-4)
    assert projgrad.gram_solve(K[0, 0], b[0, 0]).shape == (4,)
