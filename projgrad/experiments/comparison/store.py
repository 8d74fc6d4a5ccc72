"""Files that are complete or absent: JSON and models, written atomically."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..._atomic import replacing


def write_json(path: Path, content: Any) -> None:
    """Write a file in one step: a reader, or an interruption, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any | None:
    return json.loads(path.read_text()) if path.exists() else None


def save_model(path: Path, model: nn.Module) -> None:
    from safetensors.torch import save_model

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_model(model, str(partial))


def load_model(path: Path, model: nn.Module) -> nn.Module:
    from safetensors.torch import load_model

    load_model(model, str(path))
    return model
