"""What of the recording is in C++, csrc/recording.cpp: a module for one release of torch."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


def _module() -> ModuleType | None:
    """Return the module for this torch, None where it was not built: everything has a version in Python."""
    name = "projgrad._recording_" + re.sub(r"\W", "_", torch.__version__)
    return import_module(name) if find_spec(name) else None


compiled = _module()
