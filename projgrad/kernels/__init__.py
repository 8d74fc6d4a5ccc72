"""Plugs the fast kernels into the ops: C++ on the CPU and CUDA C++ where the extension is built, Triton on CUDA.

Without them every op runs its reference, or library products. Triton kernels are imported at their first call.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ..ops import basis_project as basis
from ..ops import flat
from ..ops.linear_impl import library
from . import layer, project_out

built_for_cuda = False
if find_spec("projgrad._C"):  # absent is fine; present and broken must fail here, loudly
    from .. import _C as _C

    built_for_cuda = _C.build_info()["cuda"]
    flat._project_out.register_kernel("cpu")(project_out.on_host)


def on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest):
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return call


def gram(G, u, float64):
    from .gram import gram

    K, v = gram(G, u, float64)
    return K, v.clone()  # in one memory with K, which two outputs of an op must not be


def subtract(u, G, c):
    from .subtract import subtract

    out, r, squares = subtract(u, G, c)
    return out, r, squares.clone()


def gram_solve(K, b, damping, rtol):
    from .gram_solve import gram_solve

    return gram_solve(K, b, damping, rtol)


def basis_project(D, M):
    if torch.float64 in (D.dtype, M.dtype):
        return basis._products(D, M)
    from .basis_project import basis_project

    return basis_project(D, M)


def feasible_pass(*args):
    from .feasible import feasible

    return feasible(*args)


ON_CUDA = {
    flat._gram: gram,
    flat._subtract: subtract,
    flat._project_out: project_out.on_device,
    basis._basis_project: basis_project,
}
if not built_for_cuda:  # most installations have no nvcc
    ON_CUDA[flat._gram_solve] = gram_solve

if find_spec("triton"):
    for op, kernel in ON_CUDA.items():
        op.register_kernel("cuda")(on_its_device(kernel))
    for leaf in (*layer.LEAVES, feasible_pass):
        library.impl(leaf.__name__, on_its_device(leaf), "CUDA")
