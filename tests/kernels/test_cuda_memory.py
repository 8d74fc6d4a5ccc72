"""More than 2^31 elements, where the GPU has room for them (few on the CPU), and an op that runs out of memory."""

import gc

import pytest
import torch

import projgrad
from projgrad.ops import reference

F32, BF16 = torch.float32, torch.bfloat16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LARGE = (1 << 31) + 12_345


def elements(device, small):
    if device == "cpu":
        return small
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 20 << 30:
        pytest.skip(f"needs 20 GB of free GPU memory for more than 2^31 elements; {free / 2**30:.0f} GB are free")
    return LARGE


@pytest.mark.parametrize("storage", ["rows", "columns"])
def test_offsets_of_a_gradient_matrix(storage, device):
    n = 33
    p = -(-elements(device, 40_000) // n)
    G = torch.empty((n, p) if storage == "rows" else (p, n), dtype=BF16, device=device).normal_()
    G = G if storage == "rows" else G.mT
    u = torch.empty(p, dtype=BF16, device=device).normal_()
    K, v = projgrad.gram(G, u)
    exact, dots = reference.gram(G, u[None])
    lengths = exact.diagonal().sqrt()
    assert ((K - exact).abs() <= 4 * torch.finfo(F32).eps * lengths * lengths[:, None]).all()
    assert ((v - dots[:, 0]).abs() <= 4 * torch.finfo(F32).eps * lengths * u.double().norm()).all()
    out = projgrad.project_out(u, G)
    left = reference.gram(G, out[None])[1][:, 0].abs() / lengths / out.double().norm()
    assert left.max() <= torch.finfo(BF16).eps


@pytest.mark.parametrize("large", ["a", "b"])
def test_offsets_of_a_layer(large, device):
    """Products are sums over positions: all of them at once, and in two halves."""
    n, wide, narrow = 2, 1024, 24
    t = -(-elements(device, 50_000) // (n * wide))
    i, o = (wide, narrow) if large == "a" else (narrow, wide)
    a = torch.empty(n, t, i, dtype=BF16, device=device).normal_()
    b = torch.empty(n, t, o, dtype=BF16, device=device).normal_()
    u, c = torch.randn(o, i, device=device).to(BF16), torch.tensor([1.5, -0.5], device=device)
    halves = [(a[:, : t // 2], b[:, : t // 2]), (a[:, t // 2 :], b[:, t // 2 :])]
    dots = projgrad.linear_dot(a, b, u)
    parts = sum(projgrad.linear_dot(x, y, u) for x, y in halves)
    torch.testing.assert_close(dots, parts, rtol=1e-4, atol=1e-4 * float(parts.abs().max()))
    whole = projgrad.linear_combine(a, b, c).double()
    parts = sum(projgrad.linear_combine(x, y, c).double() for x, y in halves)
    assert (whole - parts).norm() <= 2 * torch.finfo(BF16).eps * parts.norm()
    K = projgrad.linear_gram(a, b)
    g = torch.stack([sum(projgrad.linear_combine(x.float(), y.float(), e) for x, y in pieces(a, b)) for e in eye(K)])
    exact = g.double().flatten(1) @ g.double().flatten(1).mT
    lengths = exact.diagonal().sqrt()
    assert ((K - exact).abs() <= 1e-4 * lengths * lengths[:, None]).all()


def pieces(a, b, count=64):
    """Positions in pieces whose float32 copies are small."""
    return zip(a.split(-(-a.shape[1] // count), 1), b.split(-(-b.shape[1] // count), 1), strict=True)


def eye(K):
    return torch.eye(len(K), device=K.device, dtype=K.dtype)


@needs_cuda
def test_an_op_out_of_memory_leaves_nothing_behind():
    """G fits, and what the op needs beside it does not."""
    G, u = torch.randn(8, 1 << 20, device="cuda"), torch.randn(1 << 20, device="cuda")
    expected = projgrad.project_out(u, G)
    gc.collect()
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    kept = []
    try:
        with pytest.raises(torch.OutOfMemoryError):
            while True:  # what is left of the reserved blocks
                kept.append(projgrad.project_out(u, G))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    kept.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(projgrad.project_out(u, G), expected)
