"""Which kernel computes which op on which device: the only table, and the only import of the compiled extension.

What has no row runs its default: the reference of the op, or library products. So does gram_solve on CUDA without nvcc:
its reference serves every n and never waits for the device. It costs a dozen small launches per row, which is why the
extension has a kernel; one in Triton as well would be a third pivoted Cholesky to keep right.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from ..ops.basis_project import basis_project_op
from ..ops.feasible import feasible_pass
from ..ops.gram import gram_few, gram_pass
from ..ops.gram_solve import gram_solve_op
from ..ops.linear_impl import linear_moments
from ..ops.project_out import project_out_op, subtract_op
from ..ops.registration import register_kernel
from . import project_out


def extension() -> dict[str, Any] | None:
    """Return how the compiled extension was built, None where it was not; the first call registers its kernels."""
    if find_spec("projgrad._C") is None:  # absent is fine; present and broken must fail here, loudly
        return None
    from .. import _C

    return dict(_C.build_info())


def triton(name: str, file: str = "") -> Callable:
    """Return the launcher `name` of a file, by default that of the same name, which is imported at its first call.

    Triton launches on the current device: the launcher makes it that of the first tensor.
    """

    def launch(first: torch.Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return getattr(import_module(f".{file or name}", __package__), name)(first, *rest)

    return launch


class Kernel(NamedTuple):
    """kernel: a function, or the C++ file that registers itself. when: whether it is there."""

    op: Any
    device: str
    kernel: Callable | str
    when: bool


BUILT = extension()
CPP, CUDA, TRITON = BUILT is not None, BUILT is not None and BUILT["cuda"], find_spec("triton") is not None

KERNELS = (
    Kernel(gram_pass, "cpu", "csrc/gram.cpp", CPP),
    Kernel(gram_pass, "cuda", triton("gram"), TRITON),
    Kernel(gram_few, "cuda", "csrc/gram_few_cuda.cu", CUDA),
    Kernel(gram_solve_op, "cpu", "csrc/gram_solve.cpp", CPP),
    Kernel(gram_solve_op, "cuda", "csrc/gram_solve_cuda.cu", CUDA),
    Kernel(subtract_op, "cpu", "csrc/subtract.cpp", CPP),
    Kernel(subtract_op, "cuda", triton("subtract"), TRITON),
    Kernel(project_out_op, "cpu", project_out.on_host, CPP),
    Kernel(project_out_op, "cuda", triton("on_device", "project_out"), TRITON),
    Kernel(basis_project_op, "cuda", triton("basis_project"), TRITON),
    Kernel(feasible_pass, "cpu", "csrc/feasible.cpp", CPP),
    Kernel(feasible_pass, "cuda", triton("feasible"), TRITON),
    Kernel(linear_moments, "cuda", triton("on_device", "linear_moments"), TRITON),
)

for op, device, kernel, when in KERNELS:
    if when and callable(kernel):
        register_kernel(op, device, kernel)
