"""gram: K and v against float64, for the op, the reference and the Triton kernel."""

import pytest
import torch
from cases import CASES, FLOAT_ONLY, TRITON, make

import projgrad
from projgrad import reference

FLOATS = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
INPUTS = [(name, dtype) for name in CASES for dtype in FLOATS + HALVES if dtype in FLOATS or name not in FLOAT_ONLY]


def _triton(wide):
    def call(G, u):
        from projgrad.kernels.gram import gram

        return gram(G, u, wide)

    return call


IMPLEMENTATIONS = {
    "op": lambda G, u: torch.ops.projgrad.gram(G, u, False),
    "op_wide": lambda G, u: torch.ops.projgrad.gram(G, u, True),
    "reference": reference.gram,
    **({"triton": _triton(False), "triton_wide": _triton(True)} if TRITON else {}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name, dtype", INPUTS, ids=str)
def test_value(name, dtype, implementation, device):
    """Entry by entry, relative to the norms of its two rows: float32 products are rounded, float64 ones hardly."""
    u, G = make(name, dtype, device)
    u = u if u.ndim == 2 else u[None]
    K, v = IMPLEMENTATIONS[implementation](G, u)
    assert K.dtype == v.dtype == torch.float64 and torch.equal(K, K.mT)
    rows, directions = G.double(), u.double()
    lengths, others = rows.norm(dim=1), directions.norm(dim=1)
    exact = dtype == torch.float64 or "wide" in implementation or implementation == "reference"
    bound = 1e-13 if exact else 4 * torch.finfo(torch.float32).eps
    assert ((K - rows @ rows.mT).abs() <= bound * lengths[:, None] * lengths).all()
    assert ((v - rows @ directions.mT).abs() <= bound * lengths[:, None] * others).all()


@pytest.mark.parametrize("m", [9, 17])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_directions_and_rows(m, implementation, device):
    G, u = torch.randn(130, 257, device=device), torch.randn(m, 257, device=device)
    K, v = IMPLEMENTATIONS[implementation](G, u)
    torch.testing.assert_close(K, G.double() @ G.double().mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(v, G.double() @ u.double().mT, rtol=1e-5, atol=1e-4)


def test_duplicates_have_equal_products(device):
    """Rank detection rests on it: equal rows give entries equal far below float32 rounding, wherever they stand."""
    G = torch.randn(21, 4099, device=device)
    G[[3, 8, 20]] = G[0].clone()
    K = projgrad.gram(G)
    for j in (3, 8, 20):
        torch.testing.assert_close(K[:, j], K[:, 0], rtol=1e-13, atol=1e-9)


def test_public_shapes(device):
    G, u = torch.randn(4, 30, device=device), torch.randn(3, 30, device=device)
    assert projgrad.gram(G).shape == (4, 4)
    assert [t.shape for t in projgrad.gram(G, u)] == [(4, 4), (4, 3)]
    assert [t.shape for t in projgrad.gram(G, u[0])] == [(4, 4), (4,)]
