"""projgrad doctor: what is installed, what computes each op here, and whether the results are right."""

from __future__ import annotations

import argparse
import shutil
import time
from typing import Any

import torch

from ...recording.compiled import compiled
from ..comparison.environment import environment
from .dispatch import PLAIN, computed_by
from .problems import first_line
from .self_test import BUDGET, OPS, Found, example, self_test
from .terminal import print_json

ABSENT = "absent: everything works, slower"
AGAIN = "install projgrad again (pip install --no-build-isolation --force-reinstall --no-deps, and its folder)"
COMPILER = f"a C++ compiler such as g++ (or name one in CXX); then {AGAIN}"


def doctor(args: argparse.Namespace) -> int:
    """Print all of it; returns 1 where the self-test fails. Needs no package beyond those that projgrad requires."""
    about = environment() | {"recording": "Python" if compiled is None else "C++"}
    devices = ["cpu", *(["cuda"] if about["cuda"] else [])]
    start = time.monotonic()
    found = [line for device in devices for line in self_test(device, time.monotonic() + BUDGET[device])]
    seconds = time.monotonic() - start
    ops = {device: {name: _computed_by(name, device) for name in OPS} for device in devices}
    is_right = all(line.ok is not False for line in found)
    if args.json:
        tests = [line._asdict() for line in found]
        print_json({**about, "ops": ops, "self_test": tests, "ok": is_right, "faster": advice(about)})
    else:
        _print(about, ops, found, seconds)
        print(f"\nTo be faster: {advice(about)}")
        if any(line.ok is None for line in found):
            print("Not everything was tested, for lack of time. What was compiled is kept: give the command again.")
        if not is_right:
            print("A result is WRONG: do not trust what projgrad computes on this machine.")
    return 0 if is_right else 1


def _computed_by(name: str, device: str) -> dict[str, list[str]]:
    try:
        with torch.no_grad():
            return computed_by(example(name, device), device)
    except Exception as error:  # as the self-test has found
        return {f"fails: {first_line(error)}": []}


def advice(about: dict[str, Any]) -> str:
    """Say in one line what to install."""
    extension, has_gpu = about["extension"], about["cuda"] is not None
    if not has_gpu and shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            return "a torch with CUDA (pytorch.org says how): there is a GPU, and this torch cannot use it"
        return f"a driver for CUDA {torch.version.cuda}, with which torch was built: it finds no GPU; see nvidia-smi"
    if has_gpu and about["triton"] is None:
        return "pip install triton: the GPU computes all ops in plain PyTorch"
    if extension is None:
        return COMPILER
    if about["recording"] == "Python":
        return (
            f"{AGAIN}: a part of the extension, which saves time in every step, is not there for torch {about['torch']}"
        )
    if has_gpu and not extension["cuda"]:
        return f"the CUDA toolkit that torch was built with, and CUDA_HOME set to it; then {AGAIN}"
    return "nothing to install: all kernels that there are for this machine are in use"


def _print(about: dict[str, Any], ops: dict[str, Any], found: list[Found], seconds: float) -> None:
    extension = about["extension"]
    build = ABSENT if extension is None else ", ".join(f"{key} {value}" for key, value in extension.items())
    for name, value in {"C++ extension": build, **about}.items():
        if name != "extension":
            print(f"{name:16}{'absent' if value is None else value}")
    for device, computed in ops.items():
        print(f"\nComputed on {device} by")
        for name, parts in computed.items():
            print(f"  {name:18}{_named(parts, name)}")
    print(f"\n{f'Self-test against float64, {seconds:.1f} s':32}{'worst error':>12}{'limit':>9}  of")
    for line in found:
        where = "" if len(ops) == 1 else f" on {line.device}"
        worst = f"{_number(line.error):>12}{_number(line.limit):>9}  {line.dtype or '':9}"
        print(f"  {line.name + where:30}{worst}{_outcome(line)}")


def _named(parts: dict[str, list[str]], op: str) -> str:
    """Write "C++ extension", with the ops inside where they are not simply this one."""
    inner = {kind: [name.removesuffix("_pass") for name in names] for kind, names in parts.items()}
    if list(inner) == [PLAIN]:
        return PLAIN
    return "; ".join(kind if names in ([], [op]) else f"{kind}: {', '.join(names)}" for kind, names in inner.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1g}"


def _outcome(line: Found) -> str:
    if line.ok is None:
        return f"not run: {BUDGET[line.device]:g} s were over"
    return "ok" if line.ok else f"WRONG {line.why}".strip()
