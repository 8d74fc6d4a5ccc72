"""The table of kernels, and every kernel through its op."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import TRITON

from projgrad.ops.registration import FALLBACKS, FUNCTIONS

if not TRITON:
    pytest.skip("triton has no build for this system", allow_module_level=True)

from projgrad.kernels.register import KERNELS

pytestmark = pytest.mark.same_without_extension


def test_every_device_op_is_in_the_table_of_kernels():
    on_cuda = {op.name() for op, device, *_ in KERNELS if device == "cuda" and op not in FUNCTIONS}
    assert on_cuda == {f"projgrad::{name}" for name in FALLBACKS}


def test_files_in_the_table_of_kernels_exist():
    root = Path(__file__).parents[2]
    assert all(callable(kernel) or (root / kernel).exists() for _, _, kernel, _ in KERNELS)


@pytest.mark.slow
def test_every_kernel_through_its_op():
    """Outputs that share memory, types of weights, settings of torch: what calls of a launcher do not meet."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "dispatch.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
