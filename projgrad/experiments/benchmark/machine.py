"""Where and on what something is measured."""

import os
import subprocess
from pathlib import Path

import torch

from ..comparison import environment as machine

ROOT = Path(__file__).parents[3]  # of a checkout; of an installed package the folder of all packages


def environment(device: str = "cpu") -> dict[str, str]:
    """Return where and on what something is measured; COMMIT in the environment names a tree without .git."""
    about = machine.environment()
    common = {key: about[key] for key in ("torch", "python", "projgrad")}
    common["commit"] = os.environ.get("COMMIT") or _commit()
    if device != "cuda":
        return {"device": about["processor"], "threads": str(about["threads"]), **common}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    versions = {"driver": driver, "cuda": torch.version.cuda or "none", "triton": about["triton"] or "none"}
    return {"device": about["cuda"], **versions, **common}


def _commit() -> str:
    """Return the commit of the checkout that this file is in, "unknown" of an installed package."""
    top = _output("git", "rev-parse", "--show-toplevel")
    if top == "unknown" or Path(top).resolve() != ROOT.resolve():  # the repository of somebody's virtual environment
        return "unknown"
    return _output("git", "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    """Return what a command prints, "unknown" where it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return ended.stdout.strip() if ended.returncode == 0 and ended.stdout.strip() else "unknown"
