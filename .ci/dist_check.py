"""Checks what a user gets: the source distribution, the wheels built from it with and without a compiler, and each
wheel installed where nothing is but torch.

The environments are new folders with links to torch, to what torch requires, and to the tools that build: nothing is
downloaded, and nothing else that is installed here can be imported there. That pip installs the wheel without an index
proves that torch (and triton, on Linux) is all that projgrad requires.

python .ci/dist_check.py              both wheels
python .ci/dist_check.py --plain      only the one without a compiler
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ("setuptools", "torch", "triton", "pybind11", "ninja")
RUNS = ("torch", "triton")
LARGEST = 1 << 20  # bytes of the source distribution: it was 0.4 MB
TRIED = Path(__file__).with_name("try_installed.py")
EVALUATE = ("numpy",)  # what the README's examples need beside torch


def requirements(names: tuple[str, ...]) -> list[str]:
    """Return the names of packages and of all that they require, those that are installed."""
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # triton on a system without it
            continue
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return list(found)


def link(python: Path, names: tuple[str, ...]) -> None:
    """Link packages, with all that they require, from this environment into another one."""
    site = next((python.parents[1] / "lib").glob("python3*")) / "site-packages"
    for name in requirements(names):
        package = distribution(name)
        here = Path(package.locate_file("")).resolve()
        for file in package.files or ():
            path = Path(os.path.normpath(here / file))
            if path.is_relative_to(here):
                source = here / path.relative_to(here).parts[0]
                target = site / source.name
            else:  # commands, such as ninja
                source, target = path, python.parent / path.name
            if source.exists() and source.name != "__pycache__" and not target.exists():
                target.symlink_to(source)


def environment(folder: Path, names: tuple[str, ...]) -> Path:
    """Make an environment that holds some packages, linked; return its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    link(python, names)
    return python


def run(*command: object, cwd: Path | None = None, **env: str) -> str:
    """Run a command with nothing of this environment in its way, and return what it printed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\nended with code {done.returncode}")
    return done.stdout


def pip(python: Path, *words: object, **env: str) -> str:
    """Run this environment's pip on another one, with that one's ninja in PATH."""
    env["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *words, **env)


def tracked() -> set[str]:
    return set(run("git", "ls-files", cwd=ROOT).splitlines())


def build_sdist(python: Path, folder: Path) -> Path:
    """Build the source distribution from what git tracks, and check what is in it."""
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    hook = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    run(python, "-c", hook, folder, cwd=source)
    (path,) = folder.glob("projgrad-*.tar.gz")
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()} - {""}
    wanted = {name for name in tracked() if name.split("/")[0] in ("projgrad", "csrc", "docs", "examples")}
    wanted |= {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    wanted |= {"CITATION.cff", "SECURITY.md"}
    check(not wanted - files, f"the source distribution lacks {sorted(wanted - files)}")
    strange = [f for f in files if f.split("/")[0] in ("tests", "bench", ".ci") or f.endswith((".so", ".pyc"))]
    check(not strange, f"the source distribution should not hold {strange}")
    check(path.stat().st_size < LARGEST, f"the source distribution has {path.stat().st_size} bytes")
    return path


def build_wheel(python: Path, sdist: Path, folder: Path, *, compiler: bool) -> Path:
    """Build a wheel from the source distribution, and check what is in it."""
    env = {} if compiler else {"CXX": "/nonexistent/c++"}
    printed = pip(python, "wheel", "-v", "--no-build-isolation", "--no-index", "--no-deps", "-w", folder, sdist, **env)
    (path,) = folder.glob("projgrad-*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    wanted = {name for name in tracked() if name.startswith("projgrad/")}
    check(not wanted - names, f"the wheel lacks {sorted(wanted - names)}")
    compiled = "projgrad/_C.", "projgrad/_recording_"
    strange = [n for n in names - wanted if ".dist-info/" not in n and not n.startswith(compiled)]
    check(not strange, f"the wheel should not hold {strange}")
    built = all(any(name.startswith(start) for name in names) for start in compiled)
    check(built == compiler, "the extension is in the wheel" if built else "the extension is not in the wheel")
    check(("none-any" in path.name) != compiler, f"{path.name} has the wrong tag")
    check(compiler or "there is no compiler '/nonexistent/c++'. Everything works, slower" in printed, printed)
    return path


def try_out(wheel: Path, folder: Path) -> None:
    """Install a wheel beside torch alone, and use it far away from the repository."""
    python = environment(folder / "installed", RUNS)
    pip(python, "install", "--no-index", wheel)
    pip(python, "check")
    away = folder / "away"
    away.mkdir()
    built = "plain" if "none-any" in wheel.name else "extension"
    if built == "plain":  # what can be imported is the same with the extension
        print(run(python, TRIED, "imports", cwd=away, PYTHONWARNINGS="ignore"), end="")
    doctor = run(python.with_name("projgrad"), "doctor", cwd=away, OMP_WAIT_POLICY="passive")
    check(("absent: everything works, slower" in doctor) == (built == "plain"), doctor)
    link(python, EVALUATE)
    run(python, TRIED, built, ROOT / "README.md", cwd=away, OMP_WAIT_POLICY="passive")


def check(is_right: bool, message: str) -> None:
    if not is_right:
        sys.exit(f"dist-check: {message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="only the wheel without a compiler")
    plain = parser.parse_args().plain
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "building", BUILDS)
        sdist = build_sdist(python, folder)
        print(f"{sdist.name}: {sdist.stat().st_size / 1e3:.0f} kB")
        for compiler in (False,) if plain else (False, True):
            start, place = time.perf_counter(), folder / ("compiled" if compiler else "plain")
            place.mkdir()
            wheel = build_wheel(python, sdist, place, compiler=compiler)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, {time.perf_counter() - start:.0f} s")
            try_out(wheel, place)


if __name__ == "__main__":
    main()
