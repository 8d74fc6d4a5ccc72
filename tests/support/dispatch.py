"""Every CUDA kernel in the place of the CPU's, called through the public ops: run by test_layer_kernels.py.

In a process of its own, as registrations are for good.
"""

import torch

import projgrad
from projgrad.kernels.register import KERNELS
from projgrad.ops import reference
from projgrad.ops.basis_project import basis_project_op
from projgrad.ops.feasible import feasible_op
from projgrad.ops.gram import gram_pass
from projgrad.ops.registration import register_kernel
from projgrad.ops.t_test import feasibility_thresholds

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def close(found, expected, dtype):
    tolerance = {F32: 2e-6, F64: 1e-12}.get(dtype, 2 * torch.finfo(dtype).eps)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance * float(y.abs().max()))


def check(dtype, other):
    n, t, i, o = 3, 4, 8, 6
    a, b, c, u = torch.randn(n, t, i), torch.randn(n, t, o), torch.randn(2, n), torch.randn(2, o, i)
    for t in (1, 4):
        x, y = a[:, :t].to(dtype), b[:, :t].to(other)
        float64 = max((dtype, other), key=lambda d: torch.finfo(d).bits)
        for weights in (c, c.double(), c.to(BF16)):
            close([projgrad.linear_combine(x, y, weights)], [reference.linear_combine(x, y, weights)], float64)
        close(projgrad.linear_moments(x, y), reference.linear_moments(x, y), float64)
        exact = F64 if F64 in (dtype, other) else F32
        close([projgrad.linear_gram(x, y)], [reference.linear_gram(x, y)], exact)
        close([projgrad.linear_gram(x, y, x[:2], y[:2])], [reference.linear_gram(x, y, x[:2], y[:2])], exact)
        w = u.to(other)
        close([projgrad.linear_dot(x, y, w).mT], [reference.linear_dot(x, y, w)], exact)
    if dtype == other:
        G, d, M = torch.randn(5, 40).to(dtype), torch.randn(2, 40).to(dtype), torch.randn(40, 3).to(dtype)
        exact = F64 if dtype == F64 else F32
        close(projgrad.gram(G, d), reference.gram(G, d), exact)
        close([projgrad.gram(G)], [reference.gram(G, d[:0])[0]], exact)
        close([projgrad.basis_project(G, M)], [reference.basis_project(G[None], M[None])[0]], dtype)
        expected = reference.project_out(d, G, 0.01, None)
        close([projgrad.project_out(d, G, damping=0.01)], expected[:1], F32 if dtype == F32 else dtype)
        found = torch.ops.projgrad.subtract(d, G, torch.ones(5, 2, dtype=F64))
        close(found, reference.subtract(d, G, torch.ones(5, 2, dtype=F64)), dtype)
        tensors = (*d, G.sum(0), G.square().sum(0))
        expected = reference.feasible(*tensors, 5, *feasibility_thresholds(5, 0.3, dtype))
        close(feasible_op(*tensors, 5, 0.3), expected, F64)


if __name__ == "__main__":
    torch.manual_seed(0)
    on_cuda = {op: kernel for op, device, kernel, when in KERNELS if device == "cuda" and when and callable(kernel)}
    assert {gram_pass, basis_project_op} <= on_cuda.keys()
    for op, kernel in on_cuda.items():
        register_kernel(op, "cpu", kernel)
    for pair in ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F64, F64)):
        check(*pair)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the newer setting: the older one cannot be read any more
    G = torch.randn(5, 40)
    close([projgrad.gram(G)], [reference.gram(G, G[:0])[0]], BF16)
    print("done")
