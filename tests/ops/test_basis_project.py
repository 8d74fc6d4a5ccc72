"""basis_project: values by products and by the kernel, properties, memory, messages."""

import pytest
import torch
from cases import TRITON
from torch.library import opcheck

import projgrad
from projgrad.ops import basis_project as basis
from projgrad.ops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F32, F64), (F64, F32)]
# name -> D [l, o, i] and M [l, i, k] in float64, M orthonormal
SIZES = {
    "small": (1, 5, 12, 3),
    "odd": (2, 67, 131, 65),
    "one_of_all": (1, 1, 1, 1),
    "wide": (1, 3, 300, 7),
    "tall": (1, 140, 20, 20),
    "no_outputs": (1, 0, 5, 2),
    "no_inputs": (2, 3, 0, 0),
    "no_basis": (1, 3, 5, 0),
    "no_systems": (0, 3, 5, 2),
}


def make(name, dtypes, device="cpu", transposed=False):
    l, o, i, k = SIZES[name]
    D, M = torch.randn(l, o, i, dtype=F64), torch.linalg.qr(torch.randn(l, i, k, dtype=F64)).Q
    D, M = (x.to(device, dtype) for x, dtype in zip((D, M), dtypes, strict=True))
    return (D.mT.contiguous().mT, M.mT.contiguous().mT) if transposed else (D, M)


def check(out, D, M):
    """At most twice the error of plain PyTorch, and 4 eps: relative to the absolute terms of an entry."""
    wide = torch.promote_types(torch.promote_types(D.dtype, M.dtype), F32)
    d, m = D.double(), M.double()
    expected, scale = d - (d @ m) @ m.mT, d.abs() + (d.abs() @ m.abs()) @ m.abs().mT
    x, y = D.to(wide), M.to(wide)
    plain = (x - (x @ y) @ y.mT).to(D.dtype)

    def worst(z):
        error = (z.double() - expected).abs() / scale.clamp_min(1e-300)
        return error.max() if error.numel() else 0.0

    assert out.shape == D.shape and out.dtype == D.dtype
    assert worst(out) <= 2 * worst(plain) + 4 * torch.finfo(D.dtype).eps


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_basis_project_equals_the_written_out_product(name, dtypes, transposed, device):
    D, M = make(name, dtypes, device, transposed)
    check(projgrad.basis_project(D, M), D, M)
    check(reference.basis_project(D, M), D, M)
    check(basis.project_in_pieces(D, M, 1 << 10), D, M)  # a few rows of D and columns of M at a time


@pytest.mark.skipif(not TRITON, reason="triton has no build for this system")
@pytest.mark.same_without_extension
@pytest.mark.parametrize(
    "name, dtypes, transposed",
    [("small", d, True) for d in DTYPES if F64 not in d]
    + [("odd", d, False) for d in DTYPES if F64 not in d]
    + [(name, (F32, F32), False) for name in SIZES],
    ids=str,
)
def test_the_kernel_of_basis_project_equals_the_written_out_product(name, dtypes, transposed, device):
    from projgrad.kernels.basis_project import basis_project

    D, M = make(name, dtypes, device, transposed)
    check(basis_project(D, M), D, M)


@pytest.mark.skipif(not TRITON, reason="triton has no build for this system")
@pytest.mark.same_without_extension
def test_the_kernel_of_basis_project_is_exact_in_pieces(device, monkeypatch):
    """The sum over i in splits, and rows in chunks."""
    from projgrad.kernels import basis_project as kernel
    from projgrad.kernels import weight_tiles

    D, M = torch.randn(1, 130, 600, device=device), torch.randn(1, 600, 5, device=device)
    check(kernel.basis_project(D, M), D, M)
    for module in (kernel, weight_tiles):
        monkeypatch.setattr(module, "PARTIAL_BYTES", 1 << 12)
    check(kernel.basis_project(D, M), D, M)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_is_an_orthogonal_projection(dtype, device):
    D, M = make("odd", (dtype, dtype), device)
    out = projgrad.basis_project(D, M)
    eps = torch.finfo(dtype).eps
    assert (out @ M).norm() <= 16 * eps * D.norm()
    assert (projgrad.basis_project(out, M) - out).norm() <= 16 * eps * D.norm()
    assert projgrad.basis_project(D @ M @ M.mT, M).norm() <= 16 * eps * D.norm()
    order = torch.randperm(D.shape[1])
    torch.testing.assert_close(projgrad.basis_project(D[:, order], M), out[:, order])


def test_basis_project_takes_leading_dimensions_and_shares_a_basis(device):
    D, M = torch.randn(2, 3, 4, 6, device=device), torch.randn(2, 3, 6, 2, device=device)
    out = projgrad.basis_project(D, M)
    torch.testing.assert_close(out[1, 2], projgrad.basis_project(D[1, 2], M[1, 2]))
    torch.testing.assert_close(projgrad.basis_project(D, M[0, 0])[1, 2], projgrad.basis_project(D[1, 2], M[0, 0]))


def test_vmap_of_basis_project_equals_the_stack_of_its_calls():
    D, M, call = torch.randn(3, 4, 6), torch.randn(3, 6, 2), projgrad.basis_project
    expected = torch.stack([call(d, m) for d, m in zip(D, M, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(D, M), expected)
    torch.testing.assert_close(torch.vmap(call, in_dims=(2, 1))(D.movedim(0, 2), M.movedim(0, 1)), expected)
    torch.testing.assert_close(torch.vmap(call, in_dims=(0, None))(D, M[1]), call(D, M[1]))
    shared = torch.stack([call(D[0], m) for m in M])
    torch.testing.assert_close(torch.vmap(call, in_dims=(None, 0))(D[0], M), shared)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
def test_basis_project_passes_opcheck(dtypes, device):
    D, M = make("small", dtypes, device, transposed=True)
    opcheck(torch.ops.projgrad.basis_project.default, (D.requires_grad_(), M.requires_grad_()))


def test_never_forms_a_square_matrix():
    """i x i numbers would be 40 GB."""
    D, M = torch.randn(2, 100_000), torch.randn(100_000, 3) / 300
    torch.testing.assert_close(projgrad.basis_project(D, M), D - (D @ M) @ M.mT)


D, M = torch.ones(3, 4), torch.ones(4, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: projgrad.basis_project(D, M.mT), ValueError, r"got D \(3, 4\) and M \(2, 4\)"),
        (lambda: projgrad.basis_project(D[0], M), ValueError, r"D must be \(..., o, i\).* got D \(4,\)"),
        (lambda: projgrad.basis_project(D, M[:, 0]), ValueError, r"got D \(3, 4\) and M \(4,\)"),
        (lambda: projgrad.basis_project(D, M[None]), ValueError, r"leading dimensions .* M \(1, 4, 2\)"),
        (lambda: projgrad.basis_project(D.int(), M), TypeError, r"D must be float32.* got torch.int32"),
        (lambda: projgrad.basis_project(D, M.bool()), TypeError, r"M must be float32.* got torch.bool"),
        (lambda: projgrad.basis_project(D, M.to("meta")), ValueError, r"D on cpu and M on meta"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_forward_mode_is_refused_not_zero():
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):
        torch.func.jvp(lambda d: projgrad.basis_project(d, M), (D,), (D,))


def test_autocast_changes_nothing_of_basis_project():
    D, M = torch.randn(6, 8), torch.linalg.qr(torch.randn(8, 3)).Q
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = projgrad.basis_project(D, M)
    assert torch.equal(found, projgrad.basis_project(D, M))
