"""Every Triton and CUDA kernel compiles for Hopper without a GPU, spills no register and multiplies with wgmma."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import TRITON

pytestmark = pytest.mark.same_without_extension

needs_triton = pytest.mark.skipif(not TRITON, reason="triton has no build for this system")


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_ahead_of_time():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "bench.aot", "--arch", "90", "--quick"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sm_90") >= 30
    assert "nvcc was not found" in done.stderr or "(CUDA)" in done.stdout


@needs_triton
@pytest.mark.parametrize(
    "ptx, size",
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_first.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];", 16),
        ("ld.global.nc.f64 %fd1, [%rd1];", 8),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", 4),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", None),
    ],
)
def test_the_width_of_loads_is_read_from_ptx(ptx, size):
    from bench.aot import LOAD, width

    found = LOAD.search(ptx)
    assert (width(found) if found else None) == size


@needs_triton
def test_the_table_of_kernels_is_printed_without_rich(monkeypatch, capsys):
    from bench.aot import Code, show

    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show([Code("gram bf16", 90, 128, 4096, instructions=1000, load=16)])
    header, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["gram", "bf16", "sm_90", "128", "4096", "0", "-", "16", "1000"]
    assert header.index("arch") == row.index("sm_90")
