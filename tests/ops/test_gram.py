"""gram: K and v against float64, for the op, the reference and the Triton kernel."""

import pytest
import torch
from cases import CASES, FLOAT_ONLY, TRITON, implementations, make

import projgrad
from projgrad.ops import reference

needs_triton = pytest.mark.skipif(not TRITON, reason="triton has no build for this system")

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


@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("name, dtype", INPUTS, ids=str)
def test_gram_equals_the_products_of_rows_in_float64(name, dtype, implementation, device):
    """Entry by entry, relative to the norms of its two rows: float32 products are rounded, float64 ones hardly."""
    u, G = make(name, dtype, device)
    u = u if u.ndim == 2 else u[None]
    if device == "cpu" and "triton" in implementation and dtype != torch.float32:
        u, G = u[:, :1100], G[:, :1100]  # many chunks in one dtype: up to half a minute each in the interpreter
    K, v = IMPLEMENTATIONS[implementation](G, u)
    assert K.dtype == v.dtype == torch.float64 and torch.equal(K, K.mT)
    rows, directions = G.double(), u.double()
    lengths, others = rows.norm(dim=1), directions.norm(dim=1)
    exact = dtype == torch.float64 or "wide" in implementation or implementation == "reference"
    bound = 1e-13 if exact else 4 * torch.finfo(torch.float32).eps
    assert ((K - rows @ rows.mT).abs() <= bound * lengths[:, None] * lengths).all()
    assert ((v - rows @ directions.mT).abs() <= bound * lengths[:, None] * others).all()


@pytest.mark.slow
@pytest.mark.parametrize("m", [9, 17])
@pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
def test_many_directions_and_rows(m, implementation, device):
    n, p = (66, 129) if device == "cpu" and "triton" in implementation else (130, 257)  # 4 s each in the interpreter
    G, u = torch.randn(n, p, device=device), torch.randn(m, p, device=device)
    K, v = IMPLEMENTATIONS[implementation](G, u)
    torch.testing.assert_close(K, G.double() @ G.double().mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(v, G.double() @ u.double().mT, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize("m, transposed", [(1, False), (70, True)])
def test_rows_of_several_panels_and_columns_of_several_chunks(m, transposed, dtype, device):
    """On a CPU 64 rows in float32 are a panel, and 2048 columns a chunk. Tiny and huge rows lie beyond the first."""
    torch.manual_seed(0)
    G, u = (torch.randn(count, 5001, device=device).to(dtype) for count in (203, m))
    tiny, huge = {torch.float16: (1e-5, 1e3)}.get(dtype, (1e-20, 1e15))
    G[70:80] *= tiny
    G[140:144] *= huge
    G[150], G[160] = 0, G[20]
    G = G.mT.contiguous().mT if transposed else G
    K, v = torch.ops.projgrad.gram(G, u, False)
    rows, directions = G.double(), u.double()
    lengths, others = rows.norm(dim=1), directions.norm(dim=1)
    bound = 1e-13 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    assert torch.equal(K, K.mT) and torch.equal(K[160], K[20])
    assert ((K - rows @ rows.mT).abs() <= bound * lengths[:, None] * lengths).all()
    assert ((v - rows @ directions.mT).abs() <= bound * lengths[:, None] * others).all()


def test_duplicates_have_equal_products(device):
    """Rank detection rests on it: equal rows give entries equal far below float32 rounding, wherever they stand."""
    G = torch.randn(21, 4099, device=device)
    G[[3, 8, 20]] = G[0].clone()
    K = projgrad.gram(G)
    for j in (3, 8, 20):
        torch.testing.assert_close(K[:, j], K[:, 0], rtol=1e-13, atol=1e-9)


def test_gram_has_the_shapes_it_promises(device):
    G, u = torch.randn(4, 30, device=device), torch.randn(3, 30, device=device)
    assert projgrad.gram(G).shape == (4, 4)
    assert [t.shape for t in projgrad.gram(G, u)] == [(4, 4), (4, 3)]
    assert [t.shape for t in projgrad.gram(G, u[0])] == [(4, 4), (4,)]


# Around the tiles of 16, 32 and 64 rows, and around blocks of 64 and 128 columns.
SHAPES = [(1, 1), (2, 31), (5, 63), (15, 129), (16, 64), (17, 33), (33, 127), (63, 65), (64, 128)]
SHAPES += [(65, 33), (127, 65), (128, 31), (129, 1), (200, 70), (320, 40)]


def _close(G, u, K, v, rounding):
    rows, directions = G.double(), u.double()
    lengths, others = rows.norm(dim=1), directions.norm(dim=1)
    assert torch.equal(K, K.mT)
    assert ((K - rows @ rows.mT).abs() <= rounding * lengths[:, None] * lengths).all()
    assert ((v - rows @ directions.mT).abs() <= rounding * lengths[:, None] * others).all()


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize(
    "n, p, dtype",
    [
        (*shape, dtype)
        for dtype in (torch.float32, *HALVES)
        for shape in (SHAPES if dtype == torch.float32 else SHAPES[:-1])
    ],
    ids=str,
)  # the largest takes 5 s in the interpreter
def test_shapes_of_the_triton_kernel(n, p, dtype, device):
    """The float32 sum over a block grows an error like the square root of its length: 64 columns, of half types 128."""
    G, u = torch.randn(n, p, device=device).to(dtype), torch.randn(1 + n % 6, p, device=device).to(dtype)
    G[n // 2] *= -1
    G[n // 3] = 0
    K, v = _triton(False)(G, u)
    _close(G, u, K, v, torch.finfo(torch.float32).eps * (4 if dtype == torch.float32 else 4 * 2**0.5))


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize("n", [2, 65])
@pytest.mark.parametrize("precision, expected", [("highest", 1 + 2**-10 + 2**-22), ("high", 1 + 2**-10), ("medium", 1)])
def test_the_precision_that_torch_was_told(precision, expected, n, device):
    """(1 + 2⁻¹¹)² without the square of what 11 bits leave, and without all that they leave."""
    G = torch.full((n, 64), 1 + 2**-11, device=device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        K, _ = _triton(False)(G, G[:0])
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(K, torch.full_like(K, 64 * expected))


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_directions_far_from_one(dtype, device):
    scales = torch.tensor([1e-30, 1e25, 1.0, 1e-20, 1e15, 1e30, 0.0], device=device)
    G = (torch.randn(7, 500, device=device) * scales[:, None]).to(dtype)
    G[0, 300:] = 0  # a block of zeros
    for scale in (1e-30, 1.0, 1e30):
        u = (scale * torch.randn(2, 500, device=device)).to(dtype)
        _close(G, u, *_triton(False)(G, u), 4 * torch.finfo(torch.float32).eps)


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row(bad, dtype, device):
    G, u = torch.randn(5, 200, device=device).to(dtype), torch.randn(1, 200, device=device).to(dtype)
    G[2, 150] = bad
    K, v = _triton(False)(G, u)
    finite = torch.ones(5, dtype=torch.bool, device=device)
    finite[2] = False
    assert torch.equal(K.isfinite(), finite[:, None] & finite) and torch.equal(v[:, 0].isfinite(), finite)


@needs_triton
@pytest.mark.same_without_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="emulates what a GPU does by itself")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sums_do_not_shrink_on_tensor_cores(dtype, monkeypatch):
    """Tensor cores cut each addition to float32, of 16 columns at once, towards zero: 2⁻²⁵ a step, lost for good.

    Over 2,000 steps that would be 6e-5. A sum ends with its block of at most 128 columns, eight steps.
    """
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *_):
        total, steps = d.data.astype(numpy.float64), range(0, a.data.shape[-1], 16)
        for k in steps:
            x, y = (t.data.astype(numpy.float64) for t in (a, b))
            total = total + x[:, k : k + 16] @ y[k : k + 16]
            rounded = total.astype(numpy.float32)
            over = numpy.abs(rounded) > numpy.abs(total)
            total = numpy.where(over, numpy.nextafter(rounded, numpy.float32(0)), rounded).astype(numpy.float64)
        return TensorHandle(total.astype(numpy.float32), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    G = (1 + torch.rand(40, 32_000)).to(dtype)
    K, _ = _triton(False)(G, G[:0])
    exact = G.double() @ G.double().mT
    assert ((K / exact - 1).abs() <= 2 * torch.finfo(torch.float32).eps).all()
