"""What the numbers were made with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...kernels import extension
from ...version import __version__


def environment() -> dict[str, Any]:
    """Return versions and hardware as plain values; None for what is absent."""
    return {
        "projgrad": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed(package) for package in ("triton", "scikit-learn", "numpy")},
        "extension": extension(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def installed(package: str) -> str | None:
    """Return a package's version, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the name of the CPU's model, or of its kind where the system does not say."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
