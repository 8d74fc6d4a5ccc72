"""Which features of models every way to per-sample gradients gets right: `python -m bench.support`.

A cell is made by running it, in a process of its own: K and the projected forget gradient of a small model against one
backward pass for every loss. `--feature` and `--contender` choose some cells; the others of the file stay.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import math
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.peers import PEERS, Peer
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.methods import projectors

from .features import FEATURES, Feature, Job
from .report import RESULTS

CONTENDERS = {  # of the ways that differ in the per-sample gradients, with their titles
    "projgrad": "projgrad",
    "vmap + Gram": "vmap(grad)",
    "one by one": "batches of one",
    "torchjd": "TorchJD",
    "torchjd unbatched": "TorchJD, unbatched",
    "opacus": "Opacus, hooks",
    "opacus ExpandedWeights": "Opacus, Expanded Weights",
    "backpack": "BackPACK",
    "nngeometry": "NNGeometry",
}
COLUMNS = ("feature", "title", "contender", "package", "verdict", "gram_error", "projection_error", "limit", "note")
LOOPED = "one backward pass per sample"  # in a warning: of parameters that there is no rule for
VERDICTS = ("right", "K only", "wrong", "no")
SECONDS = 60.0
FLOAT32_LIMIT = 1e-4
NOTE = 120  # characters of an error that are kept


def truth(job: Job) -> tuple[Tensor, Tensor]:
    """Return K [n, n] and the projected forget gradient [p] in float64, from one backward pass for every loss."""
    params = [p for p in job.model.parameters() if p.requires_grad]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([(g.to_dense() if g.is_sparse else g).double().flatten() for g in found])

    losses = job.retain()
    G = torch.stack([gradient(losses[j]) for j in range(len(losses))])
    return G @ G.mT, projectors.lstsq(gradient(job.forget()), G)


def attempt(start: Callable[[Job], Callable[[], Tensor]], job: Job, expected: Tensor) -> tuple[float | None, str]:
    """Return the relative error of the second of two calls, as in a loop, or None and what was raised."""
    try:
        call = start(job)
        call()
        found = call().detach().double()
    except Exception as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return None, f"{type(error).__name__}: {first_line}"[:NOTE]
    if found.shape != expected.shape:
        return None, f"Shape: {tuple(found.shape)} in the place of {tuple(expected.shape)}"
    error = float((found - expected).norm() / expected.norm())
    return (error if math.isfinite(error) else math.inf), ""


def cell(feature: Feature, peer: Peer) -> dict:
    """Return the verdict on one contender and one model, its errors, and what it raised.

    Where it is not right in float64 it is tried in float32, which some packages are made for.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row = _cell(feature, peer)
    if any(LOOPED in str(warning.message) for warning in caught):
        row["note"] = row["note"] or LOOPED
    if row["verdict"] != "right" and feature.dtype == torch.float64:
        narrow = _cell(dataclasses.replace(feature, dtype=torch.float32, limit=FLOAT32_LIMIT), peer)
        if VERDICTS.index(narrow["verdict"]) < VERDICTS.index(row["verdict"]):
            return narrow | {"note": f"float32 alone: {row['note'] or row['verdict']}"}
    return row


def _cell(feature: Feature, peer: Peer) -> dict:
    K, projected = truth(feature.job())
    gram_error, note = attempt(peer.start, feature.job(), K)
    row = {"gram_error": gram_error, "projection_error": None, "limit": feature.limit, "note": note}
    if gram_error is not None and not feature.whole:
        row["projection_error"], row["note"] = attempt(peer.project, feature.job(), projected)
    return row | {"verdict": verdict(row, feature)}


def verdict(row: dict, feature: Feature) -> str:
    """Return one of VERDICTS: "no" where there is no K, "K only" where there is no right projection."""
    if row["gram_error"] is None:
        return "no"
    if not row["gram_error"] <= feature.limit:
        return "wrong"
    projected = row["projection_error"]
    return "right" if feature.whole or (projected is not None and projected <= feature.limit) else "K only"


def isolated(task: Callable[[], dict], seconds: float) -> dict:
    """Return what a task returns in a process of its own, and a row without errors where that dies or takes longer."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        receiver.close()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            sender.send(task())

    process = context.Process(target=work)
    process.start()
    sender.close()
    nothing = {"gram_error": None, "projection_error": None, "verdict": "no"}
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return nothing | {"note": f"Timeout: more than {seconds:g} seconds"}
    except EOFError:
        process.join()
        return nothing | {"note": f"Crash: ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def package_of(peer: Peer) -> str:
    """Return name and version of what a contender is made of."""
    name = re.match(r"[\w-]*", peer.package)[0] or "torch"
    return f"{name} {importlib.metadata.version(name)}"


def measure(features: Iterable[str], contenders: Iterable[str], seconds: float = SECONDS) -> Iterable[dict]:
    """Yield a row for every cell that can be made here."""
    contenders = list(contenders)
    for name in features:
        feature = FEATURES[name]
        if missing := feature.missing():
            print(f"{name}: without {', '.join(missing)} it cannot be built", flush=True)
            continue
        for contender in contenders:
            peer = PEERS[contender]
            about = {"feature": name, "title": feature.title, "contender": contender, "package": package_of(peer)}
            yield about | isolated(lambda f=feature, p=peer: cell(f, p), seconds)


@functools.cache
def about_this_run() -> dict[str, str]:
    return {name: value for name, value in environment().items() if name != "threads"}


def write(rows: Iterable[dict], path: Path) -> list[dict]:
    """Write rows beside the other cells of the file, and return all of its rows."""
    about = about_this_run()
    kept = {(row["feature"], row["contender"]): row for row in (read_csv(path) if path.exists() else ())}
    kept |= {(row["feature"], row["contender"]): row | about for row in rows}
    ordered = [kept[name, contender] for name in FEATURES for contender in CONTENDERS if (name, contender) in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, ordered, [*COLUMNS, *about])
    return read_csv(path)


def shown(row: dict | None) -> str:
    """Return the text of a cell."""
    if row is None:
        return ""
    if row["verdict"] == "no":
        return f"no: {row['note'].partition(':')[0]}"
    error = f"{float(row['gram_error']):.0e}"
    if row["verdict"] == "right":
        mark = " ²" if row["note"].startswith("float32 alone") else " ³" if row["note"] == LOOPED else ""
        return f"{max(float(row['gram_error']), float(row['projection_error'] or 0)):.0e}{mark}"
    return f"K only, {error}" if row["verdict"] == "K only" else f"**wrong, {error}**"


def table(path: Path = RESULTS / "support.csv") -> str:
    """Return the matrix, and under it how many features each contender is right on."""
    rows = {(row["feature"], row["contender"]): row for row in read_csv(path)}
    names = [name for name in CONTENDERS if any(contender == name for _, contender in rows)]
    some = next(iter(rows.values()))
    packages = {rows[key]["package"] for key in rows} | {f"torch {some['torch']}"}
    lines = [
        f"{', '.join(sorted(packages))}, Python {some['python']}, commit "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows.values()))}:",
        "",
        "| feature | " + " | ".join(CONTENDERS[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    features = [name for name in FEATURES if any((name, contender) in rows for contender in names)]
    for name in features:
        title = FEATURES[name].title + (" ¹" if FEATURES[name].whole else "")
        lines.append(f"| {title} | " + " | ".join(shown(rows.get((name, contender))) for contender in names) + " |")
    for title, of in (("right", ("right",)), ("only K right", ("K only",)), ("wrong without a word", ("wrong",))):
        found = [sum(counts(rows.get((name, contender)), of) for name in features) for contender in names]
        lines.append(f"| **{title}**, of {len(features)} | " + " | ".join(map(str, found)) + " |")
    return "\n".join(lines)


def counts(row: dict | None, verdicts: tuple[str, ...]) -> bool:
    """Return whether a cell counts; to refuse what depends on the whole batch counts as right."""
    if row is None:
        return False
    refused = row["verdict"] == "no" and FEATURES[row["feature"]].whole
    return ("right" if refused else row["verdict"]) in verdicts


def main() -> None:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=list(FEATURES), metavar="NAME")
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit of one cell [{SECONDS:g}]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for support.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)  # before the first fork
    console, contenders = Console(width=150), []
    for name in args.contender:
        if missing := PEERS[name].missing():
            console.print(f"without {name}: {missing}")
            continue
        contenders.append(name)
        if PEERS[name].module:
            importlib.import_module(PEERS[name].module)  # once, for all its cells
    count = sum(not FEATURES[name].missing() for name in args.feature) * len(contenders)
    rows = []
    for row in track(measure(args.feature, contenders, args.seconds), "support", total=count, console=console):
        rows.append(row)
        if row["verdict"] != "right":
            console.print(f"{row['feature']}, {row['contender']}: {shown(row)}  {row['note']}", highlight=False)
        write(rows, args.out / "support.csv")
    console.print(f"{sum(row['verdict'] == 'right' for row in rows)} of {len(rows)} cells are right")


if __name__ == "__main__":
    main()
