"""CUDA device code on the CPU: headers of csrc/ compiled by g++ against cuda.h, which makes every thread a fiber."""

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
AVAILABLE = sys.platform == "linux" and shutil.which("g++") is not None


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """tests/emulator/`source`, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "emulated.so")
        flags = ["-std=c++20", "-O1", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", f"-I{CSRC}", f"-I{HERE}"]
        done = subprocess.run(["g++", *flags, str(HERE / source), "-o", str(result)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(result))


def gram_solve(K, b, damping, rtol, threads=0):
    """The kernels of csrc/gram_solve_cuda.cu; with `threads` the one for large n, in blocks of that many."""
    l, n, m = b.shape
    if rtol is None:
        rtol = 8 * max(n, 1) * torch.finfo(K.dtype).eps
    solve = getattr(library("gram_solve.cpp"), {4: "solve_float", 8: "solve_double"}[K.itemsize])
    solve.restype = ctypes.c_char_p
    device, K, b = K.device, K.cpu().contiguous(), b.cpu().contiguous()
    x, rank, pivot = torch.empty_like(b), torch.empty(l, dtype=torch.int64), torch.empty(l, dtype=torch.float64)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (K, b, x, rank, pivot)]
    sizes = [ctypes.c_int64(size) for size in (l, n, m)]
    error = solve(*addresses, *sizes, ctypes.c_double(damping), ctypes.c_double(rtol), ctypes.c_int(threads))
    assert not error, error.decode()
    return x.to(device), rank.to(device), pivot.to(device)


def gram_few(g, u):
    """The kernels of csrc/gram_few_cuda.cu, on rows as its launcher passes them on."""
    (l, n, p), m = g.shape, u.shape[1]
    call = library("gram_few.cpp").gram_few
    call.restype = ctypes.c_char_p
    device, g, u = g.device, g.cpu().contiguous(), u.cpu().contiguous()
    assert p % 8 == 0 and g.data_ptr() % 16 == u.data_ptr() % 16 == 0
    K, v = torch.empty(l, n, n, dtype=torch.float64), torch.empty(l, n, m, dtype=torch.float64)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (g, u, K, v)]
    sizes = [ctypes.c_int64(size) for size in (l, n, p, m)]
    error = call(*addresses, *sizes, ctypes.c_int(g.dtype == torch.float16))
    assert not error, error.decode()
    return K.to(device), v.to(device)
