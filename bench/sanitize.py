"""Run every CUDA kernel on small awkward sizes under NVIDIA's checkers: `bench/gpu.sh sanitize[:TOOL]`.

Each tool is a part of its own and gets 90 seconds at most; what it said until then is the verdict.

Errors in kernels of projgrad fail; those in other kernels are counted. Where compute-sanitizer is missing or does not
support the device, that is said and nothing fails. `--calls` makes the calls alone.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from .report import RESULTS

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 90.0  # of one tool
STATUS = 86  # of compute-sanitizer, where it found something
TRITON = r"gram|subtract|scales|pairs|add_partial_sums|check_residual|basis_project|feasible|linear_\w+"
OURS = re.compile(rf"projgrad|gram_solve|\b({TRITON})_kernel\b")
REFUSED = ("Device not supported", "device is not supported", "Unable to find a supported device")


def calls() -> Iterator[str]:
    """Make the calls, and yield the name of each after it.

    Few and small: every kernel, in every way that its shape changes, once. Inputs are made on the CPU, for a checker
    slows the kernels of torch and cuBLAS down too.
    """
    import projgrad

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype).to(device)

    for n in (
        5,
        17,
        33,
        70,
        97,
        130,
    ):  # every kernel of gram_solve; 130 takes all steps of large systems twice and more
        for dtype in (torch.float32, torch.float64) if n in (17, 130) else (torch.float32,):
            A = torch.randn(2, n, n + 3, dtype=dtype)
            A[0, n // 2] = A[0, 0]  # singular
            projgrad.gram_solve((A @ A.mT).to(device), normal(2, n, 2, dtype=dtype))
        yield f"gram_solve n={n}"
    for n, p, m in ((1, 8, 0), (4, 4200, 1), (8, 520, 1)):
        g = torch.randn(2, n, p)
        g[0, 0] *= 1e-20  # summed again in float64
        torch.ops.projgrad.gram_few(g.bfloat16().to(device), normal(2, m, p, dtype=torch.bfloat16))
    yield "gram_few"
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for n, p, m in ((17, 333, 1), (70, 261, 6)) if dtype != torch.float64 else ((3, 70, 2),):
            G, u = torch.randn(n, p), normal(m, p, dtype=dtype)
            G[1] = G[0]  # refined: the predicated kernels run
            projgrad.project_out(u, G.to(dtype).to(device))
        yield f"gram, subtract, project_out in {dtype}"
    projgrad.project_out(normal(33), normal(513, 33))  # rows that do not fit into a block of subtract
    yield "project_out of 513 rows"
    for dtype in (torch.float32, torch.bfloat16):
        total = torch.randn(1001)
        d, u = normal(1001, dtype=dtype), normal(1001, dtype=dtype)
        projgrad.feasible(d, u, total.to(device), (total.square() + 1).to(device), 8)
        for n, t, i, o in ((5, 1, 33, 17), (3, 7, 17, 65), (2, 129, 31, 30)):
            a, b = normal(n, t, i, dtype=dtype), normal(n, t, o, dtype=dtype)
            projgrad.linear_gram(a, b)
            projgrad.linear_dot(a, b, normal(o, i, dtype=dtype))
            projgrad.linear_combine(a, b, normal(n))
            projgrad.linear_moments(a, b)
        projgrad.linear_gram(a, b, a[:1], b[:1])
        projgrad.basis_project(normal(o, i, dtype=dtype), a[0, :i].mT.contiguous())
        yield f"feasible and the ops on factors in {dtype}"
    if device == "cuda":
        torch.cuda.synchronize()


def kernels(log: str) -> Counter:
    """Count the errors of each kernel: it is named after an "at" in the line after an error's own, or in that."""
    names = re.findall(r"^=+\s+(?:.*\baccess )?at (?:0x[0-9a-f]+ in )?(.+)", log, re.M)
    return Counter(re.split(r"\+0x|\(", name)[0].strip() for name in names)


def check(tool: str, seconds: float, log: Path) -> bool:
    """Run the calls under one tool. Return False where a kernel of ours has an error, or the calls themselves fail."""
    started = time.monotonic()
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(STATUS)]
    command += [sys.executable, "-m", "bench.sanitize", "--calls"]
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # tensors of their own bounds
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
    text = log.read_text(errors="replace")
    errors = kernels(text)
    ours = {name: count for name, count in errors.items() if OURS.search(name)}
    summary = re.findall(r"^=+ (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", text, re.M)
    took = f"{time.monotonic() - started:.0f} s"
    if any(refusal in text for refusal in REFUSED):
        print(f"{tool}: this device is not supported here; nothing was checked")
        return True
    if status is None:
        begun = [line for line in text.splitlines() if line and not line.startswith("=")]
        print(f"{tool}: not finished after {took}, last call made: {begun[-1] if begun else 'none'}")
        print(f"{tool}: in our kernels so far {ours or 'none'}", flush=True)
        return not ours
    print(f"{tool}: status {status} after {took}; {'; '.join(summary) or 'no summary'}")
    print(f"{tool}: in our kernels {ours or 'none'}; in others {sum(errors.values()) - sum(ours.values())}", flush=True)
    complete = "all calls made" in text
    if not complete:
        print("\n".join(text.splitlines()[-15:]))
    return complete and not ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", action="store_true", help="make the calls, without a checker")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=480.0, help="for all tools together")
    args = parser.parse_args()
    if args.calls:
        for name in calls():
            print(name, flush=True)
        print("all calls made", flush=True)
        return 0
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed; nothing was checked")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    # Without a checker first: Triton's compiled kernels are then on disk.
    plain = subprocess.run([sys.executable, "-m", "bench.sanitize", "--calls"], capture_output=True, text=True)
    if plain.returncode:
        print(f"the calls fail without a checker too:\n{plain.stderr[-3000:]}")
        return 1
    passed = True
    for k, tool in enumerate(args.tools):
        share = min(SECONDS, (end - time.monotonic()) / (len(args.tools) - k))
        passed &= check(tool, share, args.out / f"gpu_sanitize_{tool}.log")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
