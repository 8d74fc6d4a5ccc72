"""What the numbers were made with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ...kernels import extension
from ...version import __version__


def environment() -> dict[str, Any]:
    """Versions and hardware, as plain values; None for what is absent."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "projgrad": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed(package) for package in ("triton", "scikit-learn", "numpy")},
        "extension": extension(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "platform": f"{platform.system()} {platform.machine()}",
    }
